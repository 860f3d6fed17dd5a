"""Of the shape of a Poisson sample, the number of rows is a secret and the other sizes are none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import efl
from efl.errors import ModelError
from efl.privacy import per_example
from tests.data.records import example, write

pytest.importorskip("dp_accounting")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
Make = Callable[[tf.Tensor], tf.Tensor]
SECRET = "a number that says how many rows were drawn"
ROWS = 5


@pytest.fixture(autouse=True)
def _fresh_graph() -> None:
    tf.reset_default_graph()
    tf.set_random_seed(3)


def _placeholder() -> tf.Tensor:
    return tf.placeholder(tf.float32, [None, 4], "x")


def _count(x: tf.Tensor) -> tf.Tensor:
    return tf.shape(x)[0]


def _dense(x: tf.Tensor, units: int = 4) -> tf.Tensor:
    return tf.layers.dense(x, units)


def _labels(x: tf.Tensor) -> tf.Tensor:
    return tf.one_hot(tf.cast(x[:, 0] > 0, tf.int32), 4)


def _sum(h: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(tf.square(h), list(range(1, h.shape.rank)))


def _differentiate(loss: tf.Tensor) -> per_example.Gradients:
    return per_example.differentiate(per_example.Objective(loss, sampled=True), tf.trainable_variables())


def _size(x: tf.Tensor) -> tf.Tensor:
    """How long rows are, where the static shape does not say it to whom asks the tensor."""
    return tf.raw_ops.Shape(input=x)


def _normalised(x: tf.Tensor, scale: Callable[[tf.Tensor], tf.Tensor]) -> tf.Tensor:
    """As Keras normalises layers: each example is a channel."""
    rows = tf.reduce_prod(_size(x)[:1])
    channels = tf.reshape(_dense(x), [1, rows, tf.reduce_prod(_size(x)[1:]), 1])
    made, _, _ = tf.nn.fused_batch_norm(channels, scale(rows), tf.zeros([rows]), data_format="NCHW")
    return tf.ensure_shape(tf.reshape(made, _size(x)), [None, 4])


def _reshaped(x: tf.Tensor, *shape: object) -> tf.Tensor:
    """Dense layers on rows in a shape that the graph does not show to be one of TensorFlow's static ones."""
    return _sum(tf.reshape(_dense(tf.ensure_shape(tf.reshape(x, tf.stack(shape)), [None, 4])), [-1, 4]))


ACCEPTED: dict[str, Make] = {
    "cross entropy": lambda x: tf.nn.softmax_cross_entropy_with_logits_v2(labels=_labels(x), logits=_dense(x)),
    "cross entropy of the first version": lambda x: tf.nn.softmax_cross_entropy_with_logits(
        labels=_labels(x), logits=_dense(x)
    ),
    "mean of a row by its length": lambda x: _sum(_dense(x)) / tf.cast(_size(x)[1], tf.float32),
    "by a gathered length": lambda x: _sum(_dense(x)) / tf.cast(tf.gather(_size(x), [1])[0], tf.float32),
    "by a sliced length": lambda x: _sum(_dense(x)) / tf.cast(tf.slice(_size(x), [1], [1])[0], tf.float32),
    "by a product of lengths": lambda x: _sum(_dense(x)) / tf.cast(tf.reduce_prod(_size(x)[1:]), tf.float32),
    "dense in three dimensions": lambda x: _sum(_dense(tf.reshape(x, [-1, 2, 2]), 3)),
    "tensordot": lambda x: _sum(tf.tensordot(x, tf.get_variable("w", [4, 3]), 1)),
    "normalised layer": lambda x: _sum(_normalised(x, lambda rows: tf.ones([rows])) * tf.get_variable("g", [4])),
    "class weights": lambda x: (
        _sum(_dense(x)) * tf.where(x[:, 0] > 0, 2 * tf.ones_like(x[:, 0]), tf.ones_like(x[:, 0]))
    ),
    "whole rows chosen": lambda x: _sum(tf.where(x[:, 0] > 0, _dense(x), tf.zeros_like(x))),
    "elements chosen": lambda x: _sum(tf.where(x > 0, _dense(x), tf.fill(tf.shape(x), 2.0))),
    "a scale for each place that is trained": lambda x: (
        tf.where(x[:, 0] > 0, tf.get_variable("w", []) * tf.ones_like(x[:, 0]), tf.zeros_like(x[:, 0]))
        + _sum(_dense(x))
    ),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_sizes_that_the_graph_says_are_none_of_a_sample(name: str) -> None:
    """Norms are those of each row by itself."""
    x = _placeholder()
    loss = ACCEPTED[name](x)
    gradients = _differentiate(loss)
    norms = sum(gradients.squared_norm(v) for v in gradients.variables)
    holds = [e.holds for e in gradients.groups.walk.expectations]
    alone = tf.gradients(tf.reduce_sum(loss), gradients.variables)
    value = np.random.default_rng(0).normal(size=(ROWS, 4)).astype(np.float32)
    with tf.Session() as sess:
        sess.run(tf.global_variables_initializer())
        found, right = sess.run([norms, holds], {x: value})
        single = [sum(np.square(g).sum() for g in sess.run(alone, {x: value[i : i + 1]})) for i in range(ROWS)]
    assert all(right) and max(single) > 0
    np.testing.assert_allclose(found, single, rtol=1e-4, atol=1e-6)


REFUSED: dict[str, Make] = {
    "scaled": lambda x: _sum(_dense(x)) / tf.cast(_count(x), tf.float32),
    "cross entropy, scaled": lambda x: (
        tf.nn.softmax_cross_entropy_with_logits_v2(labels=_labels(x), logits=_dense(x))
        / tf.cast(tf.slice(_size(x), [0], [1])[0], tf.float32)
    ),
    "by a gathered number": lambda x: _sum(_dense(x)) * tf.cast(tf.gather(_size(x), [0])[0], tf.float32),
    "by both sizes": lambda x: _sum(_dense(x)) * tf.cast(tf.reduce_prod(_size(x)), tf.float32),
    "by what is at the number's place": lambda x: (
        _sum(_dense(x)) * tf.cast(tf.gather(tf.range(100), _size(x)[0]), tf.float32)
    ),
    "by a slice that begins at the number": lambda x: (
        _sum(_dense(x)) * tf.cast(tf.slice(tf.range(100), _size(x)[:1], [1])[0], tf.float32)
    ),
    "by the number and nothing": lambda x: _sum(_dense(x)) * tf.cast(_size(x)[0] * _size(x)[1], tf.float32),
    "a length that a set shape hides": lambda x: _sum(_dense(x)) * tf.cast(_size(_told(x))[0], tf.float32),
    "as long rows as there are rows": lambda x: tf.reduce_sum(tf.reshape(_dense(x), [4, _count(x)]), 1),
    "a width that follows from the number": lambda x: _sum(
        tf.ensure_shape(tf.reshape(_dense(x), tf.stack([tf.maximum(_count(x), 4), -1])), [None, None])
    ),
    "the number on two axes": lambda x: _sum(tf.reshape(_dense(x), [_count(x), 4 // _count(x), _count(x)])),
    "axes before it": lambda x: tf.reduce_sum(tf.reshape(_dense(x), [2, _count(x), 2]), [0, 2]),
    "scale by the number": lambda x: _sum(_normalised(x, lambda rows: tf.fill([rows], tf.cast(rows, tf.float32)))),
    "scale by places": lambda x: _sum(_normalised(x, lambda rows: tf.cast(tf.range(rows), tf.float32))),
    "weights by the number": lambda x: (
        _sum(_dense(x)) * tf.where(x[:, 0] > 0, tf.fill([_count(x)], tf.cast(_count(x), tf.float32)), x[:, 1])
    ),
    "weights by places": lambda x: (
        _sum(_dense(x)) * tf.where(x[:, 0] > 0, tf.cast(tf.range(_count(x)), tf.float32), tf.ones_like(x[:, 0]))
    ),
    "chosen by the number": lambda x: _sum(tf.where(tf.fill([_count(x)], _count(x) > 3), _dense(x), -x)),
    "summed ones, chosen": lambda x: (
        _sum(_dense(x)) * tf.where(x[:, 0] > 0, x[:, 0], tf.fill([_count(x)], tf.reduce_sum(tf.ones_like(x[:, 0]))))
    ),
}


def _told(x: tf.Tensor) -> tf.Tensor:
    """Rows of which the program says how many there are, without anything that would see to it."""
    h = tf.identity(tf.reshape(x, tf.stack([_count(x), tf.placeholder_with_default(4, [])])))
    h.set_shape([7, None])
    return h


@pytest.mark.parametrize("name", REFUSED)
def test_the_number_of_rows_stays_one(name: str) -> None:
    loss = REFUSED[name](_placeholder())
    with pytest.raises(ModelError, match=f"{SECRET}|batch normalisation in training mode"):
        _differentiate(loss)


def _model(tmp_path: Path, loss_of: Callable[[efl.Sample], tf.Tensor], sampling: str | None = "poisson") -> efl.Model:
    tf.reset_default_graph()
    rng = np.random.default_rng(0)
    write(
        tmp_path / "a.tfrecord",
        [example({"x": rng.normal(size=3), "y": i % 3, "words": np.arange(1 + i % 4)}) for i in range(40)],
    )
    made = efl.Model(seed=1)
    numeric = tf.feature_column.numeric_column
    words = tf.feature_column.categorical_column_with_identity("words", 8)

    def input_fn(m: efl.Model, mode: efl.MODE) -> efl.Sample:
        reader = efl.data.DataIO(str(tmp_path), 8, 0, 1, num_epochs=9, sampling=sampling)
        reader.fixedlen_feature("x", 3)
        reader.fixedlen_feature("y", 1, dtype=tf.int64)
        reader.varlen_feature("words", dtype=tf.int64)
        columns = {"x": [numeric("x", 3)], "y": [numeric("y")], "words": [tf.feature_column.indicator_column(words)]}
        return efl.Sample(reader.read(), columns)

    made.input_fn(input_fn).loss_fn(lambda m, s: loss_of(s))
    optimizer = efl.DPGradientDescentGaussianOptimizer(1.0, 2.0, learning_rate=0.1)
    return made.optimizer_fn(efl.optimizer_fn.optimizer_setter(optimizer)).compile()


def test_cross_entropy_of_a_poisson_sample(tmp_path: Path) -> None:
    def loss(s: efl.Sample) -> tf.Tensor:
        labels = tf.one_hot(tf.cast(s["y"][:, 0], tf.int32), 3)
        return tf.nn.softmax_cross_entropy_with_logits_v2(labels=labels, logits=_dense(s["x"], 3))

    trained = _model(tmp_path, loss)
    trained.fit(efl.procedure_fn.train(max_step=3))
    assert trained.privacy_spent(1e-3).rows[0].epsilon is not None
    with pytest.raises(ModelError, match=SECRET):
        _model(tmp_path, lambda s: loss(s) / tf.cast(_count(s["x"]), tf.float32))


@pytest.mark.parametrize("sampling", [None, "poisson"])
def test_an_indicator_column_of_rows_of_different_lengths(tmp_path: Path, sampling: str | None) -> None:
    trained = _model(tmp_path, lambda s: _sum(_dense(s["words"], 2)), sampling)
    trained.fit(efl.procedure_fn.train(max_step=3))


COUNTS: dict[str, tuple[Make, bool]] = {
    "ids": (lambda ids: tf.reduce_sum(tf.one_hot(ids, 4), 1), True),
    "ids, and one axis more": (lambda ids: tf.reduce_sum(tf.one_hot(ids, 4), [-2], keepdims=True)[:, 0], True),
    "places without an id": (lambda ids: tf.reduce_sum(tf.one_hot(ids, 4, 0.0, 1.0), 1), False),
    "places": (lambda ids: tf.reduce_mean(tf.one_hot(ids, 4), 1), False),
    "places of each": (lambda ids: tf.reduce_sum(tf.one_hot(ids, 4), 2)[:, :1] * tf.ones([1, 4]), False),
    "in half precision": (
        lambda ids: tf.cast(tf.reduce_sum(tf.one_hot(ids, 4, dtype=tf.float16), 1), tf.float32),
        False,
    ),
    "ids by how many places there are": (
        lambda ids: tf.reduce_sum(tf.one_hot(ids, 4), 1) / tf.cast(tf.shape(ids)[1], tf.float32),
        False,
    ),
}


@pytest.mark.parametrize("name", [*COUNTS, "padded with an id"])
def test_of_padded_rows_only_counts_of_their_ids_are_read(name: str) -> None:
    count, accepted = COUNTS.get(name, (COUNTS["ids"][0], False))
    lists = tf.data.Dataset.range(4).map(lambda n: tf.SparseTensor(tf.range(n)[:, tf.newaxis], tf.range(n), [n]))
    rows = tf.data.make_initializable_iterator(lists.batch(2)).get_next()
    ids = tf.sparse.to_dense(rows, default_value=0 if name == "padded with an id" else -1)
    loss = _sum(_dense(tf.ensure_shape(count(ids), [None, 4])))
    if accepted:
        _differentiate(loss)
    else:
        with pytest.raises(ModelError, match="it pads rows to the length of the longest"):
            _differentiate(loss)
