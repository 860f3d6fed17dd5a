"""Sample against tf.feature_column.input_layer and numpy."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pytest
import tensorflow
import tensorflow.compat.v1 as tf
from tensorflow.python.eager import context  # to make what a user makes by accident: eager tensors

import efl
from efl.errors import DataError, ModelError

fc = tf.feature_column
HASHED = fc.categorical_column_with_hash_bucket("word", 50)
IDENTITY = fc.categorical_column_with_identity("id", 10)
AGE = fc.numeric_column("age")
BUCKETS = fc.bucketized_column(AGE, [1.0, 3.0])


def values(sample: Any) -> Any:
    with tf.Session() as sess:
        sess.run([tf.global_variables_initializer(), tf.tables_initializer()])
        return sess.run(sample)


def data() -> dict[str, Any]:
    return {
        "age": tf.constant([[0.5], [2.0], [9.0]]),
        "count": tf.constant([[1, 2], [3, 4], [5, 6]], tf.int64),
        "id": tf.constant([[1], [2], [9]], tf.int64),
        "ids": tf.SparseTensor([[0, 0], [0, 1], [2, 0]], tf.constant([1, 2, 3], tf.int64), [3, 4]),
        "weight": tf.SparseTensor([[0, 0], [0, 1], [2, 0]], [0.5, 2.0, 3.0], [3, 4]),
        "word": tf.constant([["a"], ["b"], ["a"]]),
    }


def sparse_ids() -> Any:
    return fc.categorical_column_with_identity("ids", 10)


def constant_table(width: int) -> Any:
    def init(shape: Any, dtype: Any = tf.float32, partition_info: Any = None) -> Any:
        return tf.reshape(tf.range(shape[0] * shape[1], dtype=dtype), shape)

    return init


COLUMNS = {
    "numeric": lambda: AGE,
    "numeric_int": lambda: fc.numeric_column("count", 2, dtype=tf.int32),
    "normalised": lambda: fc.numeric_column("age", normalizer_fn=lambda x: (x - 1.0) / 2.0),
    "bucketized": lambda: BUCKETS,
    "embedding": lambda: fc.embedding_column(IDENTITY, 3, initializer=constant_table(3)),
    "embedding_sum": lambda: fc.embedding_column(sparse_ids(), 3, "sum", initializer=constant_table(3)),
    "hashed": lambda: fc.embedding_column(HASHED, 2, initializer=constant_table(2)),
    "indicator": lambda: fc.indicator_column(sparse_ids()),
    "indicator_hashed": lambda: fc.indicator_column(HASHED),
    "vocabulary": lambda: fc.indicator_column(fc.categorical_column_with_vocabulary_list("word", ["a", "b"])),
    "crossed": lambda: fc.indicator_column(fc.crossed_column([BUCKETS, "word"], 20)),
    "crossed_ids": lambda: fc.embedding_column(
        fc.crossed_column(["word", IDENTITY], 20), 2, initializer=constant_table(2)
    ),
    "weighted": lambda: fc.embedding_column(
        fc.weighted_categorical_column(sparse_ids(), "weight"), 2, "sum", initializer=constant_table(2)
    ),
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_every_kind_of_column_equals_input_layer(kind: str) -> None:
    features = data()
    sample = efl.Sample(features, {"group": [COLUMNS[kind]()]})
    with tf.variable_scope("reference"):
        reference = fc.input_layer(features, [COLUMNS[kind]()])
    got, want = values([sample["group"], reference])
    assert sample["group"].dtype == tf.float32
    assert sample["group"].shape.as_list()[1] == want.shape[1]
    np.testing.assert_array_equal(got, want)


def test_columns_stand_in_the_order_given() -> None:
    features = data()
    zebra, apple = fc.numeric_column("count", 2), fc.numeric_column("age")
    sample = efl.Sample(features, {"g": [zebra, apple], "h": (apple, zebra), "single": apple})
    got = values(sample.to_dict())
    count, age = np.array([[1, 2], [3, 4], [5, 6]], np.float32), np.array([[0.5], [2], [9]], np.float32)
    np.testing.assert_array_equal(got["g"], np.hstack([count, age]))
    np.testing.assert_array_equal(got["h"], np.hstack([age, count]))
    np.testing.assert_array_equal(got["single"], age)


@pytest.mark.parametrize(
    ("shape", "known"),
    [([6, 4], True), ([6, 2, 2], True), ([6, 4], False), ([6, 2, 2], False)],
)
def test_numeric_features_of_any_rank(shape: list[int], known: bool) -> None:
    array = np.arange(24, dtype=np.int32).reshape(shape)
    feature = tf.constant(array) if known else tf.placeholder_with_default(array, None)
    sample = efl.Sample(
        {"x": feature}, {"flat": [fc.numeric_column("x", 4)], "square": [fc.numeric_column("x", (2, 2))]}
    )
    for got in values(sample.to_dict()).values():
        np.testing.assert_array_equal(got, array.reshape(6, 4).astype(np.float32))
    assert sample["flat"].shape.as_list()[1] == 4


@pytest.mark.parametrize("known", [True, False])
def test_rank_one_features_are_one_value_a_row(known: bool) -> None:
    def feature(array: Any) -> tf.Tensor:
        return tf.constant(array) if known else tf.placeholder_with_default(array, None)

    features = {"x": feature(np.array([1.5, 2.5], np.float64)), "c": feature(np.array([3, 4]))}
    column = fc.indicator_column(fc.categorical_column_with_identity("c", 5))
    got = values(efl.Sample(features, {"x": [fc.numeric_column("x")], "c": [column]}).to_dict())
    np.testing.assert_array_equal(got["x"], [[1.5], [2.5]])
    np.testing.assert_array_equal(got["c"], np.eye(5)[[3, 4]])


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("sparse", [True, False])
def test_categorical_features_of_rank_three_are_one_bag_a_row(known: bool, sparse: bool) -> None:
    array = np.array([[[1, 2], [3, 3]], [[4, -1], [-1, -1]]])  # -1: nothing, in a dense feature
    feature: Any
    if sparse:
        shape = tf.constant([2, 2, 2], tf.int64)
        shape = shape if known else tf.placeholder_with_default(np.array([2, 2, 2]), None)
        where = np.argwhere(array >= 0)
        feature = tf.SparseTensor(tf.constant(where), tf.constant(array[array >= 0]), shape)
    else:
        feature = tf.constant(array) if known else tf.placeholder_with_default(array, None)
    column = fc.indicator_column(fc.categorical_column_with_identity("c", 5))
    got = values(efl.Sample({"c": feature}, {"c": [column]})["c"])
    np.testing.assert_array_equal(got, [[0, 1, 1, 2, 0], [0, 0, 0, 0, 1]])


def test_a_row_without_any_category_embeds_to_zero() -> None:
    empty = tf.SparseTensor(np.zeros((0, 2), np.int64), tf.constant([], tf.int64), [3, 0])
    column = fc.embedding_column(fc.categorical_column_with_identity("c", 5), 2)
    np.testing.assert_array_equal(values(efl.Sample({"c": empty}, {"c": [column]})["c"]), np.zeros((3, 2)))


def test_a_wrong_number_of_values_at_run_time_does_not_change_the_batch() -> None:
    feature = tf.placeholder_with_default(np.zeros((4, 6), np.float32), None)
    sample = efl.Sample({"x": feature}, {"x": [fc.numeric_column("x", 3)]})
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"values"):
        values(sample["x"])


def test_sample_is_a_mapping_from_group_to_tensor() -> None:
    sample = efl.Sample(data(), {"a": [AGE], "b": [fc.numeric_column("count", 2)]})
    assert list(sample) == ["a", "b"]
    assert len(sample) == 2
    assert "a" in sample
    assert "age" not in sample
    assert list(sample.keys()) == ["a", "b"]
    assert dict(sample.items()) == sample.to_dict()
    assert sample.get("a") is sample["a"]
    assert sample.get("age") is None
    assert sample.get("age", 3) == 3
    assert list(sample.features) == list(data())
    assert sample.before_step_ops() == []
    assert "'b': (3, 2)" in repr(sample)
    with pytest.raises(ModelError, match=r"^sample has no group 'age'; there is: 'a', 'b'$"):
        sample["age"]
    with pytest.raises(KeyError):
        sample["age"]


def test_groups_can_be_replaced_in_a_copy_or_in_place() -> None:
    sample = efl.Sample(data(), {"a": [AGE], "b": [fc.numeric_column("count", 2)]})
    before, doubled = sample["a"], sample["a"] * 2.0
    copy = sample.create({"a": doubled, "new": doubled})
    assert type(copy) is efl.Sample
    assert list(copy) == ["a", "b", "new"]
    assert copy["a"] is doubled
    assert sample["a"] is before
    assert copy["b"] is sample["b"]
    assert copy.features == sample.features
    sample.set_transformed_feature_groups({"a": doubled})
    assert sample["a"] is doubled
    assert list(sample) == ["a", "b"]
    with pytest.raises(ModelError, match=r"group 'a': expected a tensor"):
        sample.create({"a": np.zeros(3)})
    with pytest.raises(ModelError, match=r"expected a dict of group -> tensor"):
        sample.set_transformed_feature_groups([doubled])  # type: ignore[arg-type]  # the mistake


def embedding(key: str, dimension: int = 4) -> Any:
    return fc.embedding_column(fc.categorical_column_with_identity(key, 10), dimension)


def test_train_and_eval_share_tables_without_a_reuse_scope_whatever_their_names() -> None:
    feature = {"u": tf.constant([[1]], tf.int64), "v": tf.constant([[2]], tf.int64)}
    with efl.task_scope(efl.MODE.TRAIN):
        train = efl.Sample(feature, {"e": [embedding("u"), embedding("v")], "f": [embedding("u")]}, name="train")
    names = [v.op.name for v in tf.trainable_variables()]
    assert len(names) == 3
    with efl.task_scope(efl.MODE.EVAL):  # other order, other name
        test = efl.Sample(feature, {"f": [embedding("u")], "e": [embedding("v"), embedding("u")]}, name="eval")
    assert [v.op.name for v in tf.trainable_variables()] == names
    assert all(name.startswith(("e/u_embedding/", "e/v_embedding/", "f/u_embedding/")) for name in names)
    step = tf.train.GradientDescentOptimizer(0.5).minimize(tf.reduce_sum(tf.square(train["e"] - 7.0)))
    with tf.Session() as sess:
        sess.run(tf.global_variables_initializer())
        for _ in range(60):
            sess.run(step)
        trained, seen = sess.run([train["e"], test["e"]])
    np.testing.assert_allclose(trained, np.full((1, 8), 7.0), rtol=1e-3)
    np.testing.assert_array_equal(seen, np.hstack([trained[:, 4:], trained[:, :4]]))


def test_plain_input_layer_makes_two_tables() -> None:
    """The trap that Sample is there for; if this fails, TensorFlow has changed."""
    feature = {"u": tf.constant([[1]], tf.int64)}
    for _ in range(2):
        fc.input_layer(feature, [embedding("u")])
    assert len(tf.trainable_variables()) == 2


def test_tables_are_named_by_scope_task_group_and_column() -> None:
    feature = {"u": tf.constant([[1]], tf.int64)}
    for _ in range(2):
        with tf.variable_scope("input_fn", reuse=tf.AUTO_REUSE):
            efl.Sample(feature, {"a b": [embedding("u")], "a_b": [embedding("u")]})
        for task in ("ctr", "cvr"):
            with efl.task_scope(efl.MODE.TRAIN, task):
                efl.Sample(feature, {"g": [embedding("u")]})
    prefixes = ["/".join(v.op.name.split("/")[:3]) for v in tf.global_variables()]
    assert prefixes == [
        f"input_fn/a_b_{zlib.crc32(b'a b'):08x}/u_embedding",
        "input_fn/a_b/u_embedding",
        "ctr/g/u_embedding",
        "cvr/g/u_embedding",
    ]


def test_shared_embeddings_share_across_groups_and_modes_but_not_across_tasks() -> None:
    feature = {"u": tf.constant([[1]], tf.int64), "v": tf.constant([[1]], tf.int64)}

    def make() -> efl.Sample:
        categories = [fc.categorical_column_with_identity(key, 10) for key in ("u", "v")]
        u, v = fc.shared_embedding_columns(categories, 3)
        return efl.Sample(feature, {"user": [u], "item": [v, u]})

    with efl.task_scope(efl.MODE.TRAIN):
        train = make()
    with efl.task_scope(efl.MODE.EVAL):
        test = make()
    assert len(tf.global_variables()) == 1
    with efl.task_scope(efl.MODE.TRAIN, "other"):
        other = make()
    assert len(tf.global_variables()) == 2
    user, item, seen, apart = values([train["user"], train["item"], test["item"], other["user"]])
    np.testing.assert_array_equal(item, np.hstack([user, user]))
    np.testing.assert_array_equal(seen, item)
    assert not np.array_equal(apart, user)


def test_two_tables_of_one_name_and_different_size_are_refused() -> None:
    feature = {"u": tf.constant([[1]], tf.int64)}
    efl.Sample(feature, {"g": [embedding("u", 4)]})
    with pytest.raises(ModelError, match=r"group 'g', column 'u_embedding': .*shape"):
        efl.Sample(feature, {"g": [embedding("u", 8)]})


def test_a_column_without_its_feature_is_named() -> None:
    with pytest.raises(
        DataError, match=r"sample: group 'g', column 'price' needs the feature 'price'; the features are: 'age'"
    ):
        efl.Sample({"age": data()["age"]}, {"g": [AGE, fc.numeric_column("price")]})
    crossed = fc.indicator_column(fc.crossed_column([BUCKETS, "word"], 20))
    with pytest.raises(DataError, match=r"needs the feature 'word'"):
        efl.Sample({"age": data()["age"]}, {"g": [crossed]})
    with pytest.raises(DataError, match=r"the features are: none"):
        efl.Sample({}, {"g": [AGE]})


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ([AGE], "columns: expected a dict of group -> list of feature columns, got list$"),
        ({"g": []}, "group 'g': expected a name"),
        ({3: [AGE]}, "group 3: expected a name"),
        (
            {"g": ["age"]},
            r"'age': expected a tf.feature_column, got str; write tf.feature_column.numeric_column\('age'\)$",
        ),
        (
            {"g": list(tensorflow.feature_column.shared_embeddings([IDENTITY], 3))},
            r"got SharedEmbeddingColumn of TensorFlow 2's shared_embeddings; use tf.compat.v1.feature_column",
        ),
        ({"g": [3]}, "group 'g', column 3: expected a tf.feature_column, got int$"),
        ({"g": [IDENTITY]}, "group 'g', column 'id': .*embedding_column or indicator_column"),
        ({"g": [fc.numeric_column("word")]}, "holds strings; a numeric column needs numbers"),
        ({"g": [fc.numeric_column("ids")]}, "is sparse; a numeric column needs a dense one"),
        ({"g": [embedding("age")]}, "group 'g', column 'age_embedding': Invalid input, not integer"),
    ],
)
def test_columns_that_do_not_fit_are_refused(columns: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        efl.Sample(data(), columns)


def test_features_of_the_wrong_size_are_refused() -> None:
    with pytest.raises(DataError, match=r"feature 'count' has 2 value\(s\) a row .*the column asks for \[3\]"):
        efl.Sample(data(), {"g": [fc.numeric_column("count", 3)]})
    with pytest.raises(DataError, match=r"feature 'age' is a scalar"):
        efl.Sample({"age": tf.constant(1.0)}, {"g": [AGE]})
    features = {"age": tf.zeros([3, 1]), "x": tf.zeros([2, 1])}
    with pytest.raises(DataError, match=r"group 'g': its columns differ in batch size"):
        efl.Sample(features, {"g": [AGE, fc.numeric_column("x")]})


def eager(make: Any) -> Any:
    with context.eager_mode():
        return make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: eager(lambda: tf.constant([[1.0]])), "an eager tensor: .*efl needs graph mode: import efl"),
        (lambda: eager(lambda: iter(tf.data.Dataset.range(3).batch(1))), "an iterator made in eager mode; import efl"),
        (lambda: tf.data.make_one_shot_iterator(tf.data.Dataset.range(3)), r"an iterator; .*get_next\(\)"),
        (lambda: tf.data.Dataset.range(3), r"Dataset; use tf.data.make_one_shot_iterator\(dataset\).get_next\(\)"),
        (lambda: np.zeros((2, 1)), "ndarray: it would be the same batch in every step"),
        (lambda: [[1.0]], "list: it would be"),
        (lambda: None, "got NoneType"),
        (lambda: tf.ragged.constant([[1.0], []]), "a RaggedTensor; use its to_sparse"),
    ],
)
def test_features_that_are_no_graph_tensors_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ModelError, match=r"sample: feature 'age': expected a tensor.*" + message):
        efl.Sample({"age": make()}, {"g": [AGE]})
    value = make()
    if not isinstance(value, (tf.Tensor, list)):
        with pytest.raises(ModelError, match=r"sample: features: expected a dict"):
            efl.Sample(value, {"g": [AGE]})


def test_tensors_of_another_graph_and_eager_sparse_tensors_are_refused() -> None:
    with tf.Graph().as_default():
        foreign = tf.constant([[1.0]])
    with pytest.raises(ModelError, match=r"feature 'age' was made in another graph"):
        efl.Sample({"age": foreign}, {"g": [AGE]})
    sparse = eager(lambda: tf.SparseTensor([[0, 0]], [1.0], [1, 1]))
    with pytest.raises(ModelError, match=r"an eager tensor"):
        efl.Sample({"age": sparse}, {"g": [AGE]})
    with pytest.raises(ModelError, match=r"feature name 3"):
        efl.Sample({3: tf.zeros([1])}, {"g": [AGE]})  # type: ignore[dict-item]


def test_name_scope_of_the_caller_holds_the_ops() -> None:
    with tf.name_scope("outer"):
        sample = efl.Sample(data(), {"g": [AGE]}, name="my sample")
    assert sample["g"].op.name.startswith("outer/my_sample")
    with pytest.raises(ModelError, match=r"sample name=''"):
        efl.Sample(data(), {"g": [AGE]}, name="")
