"""What says how an op works (sizes, places, a table, how long another input is) must not come from other rows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import efl
from efl.errors import ModelError
from efl.privacy import per_example
from tests.privacy.graphs import Built, assert_equal, image, random
from tests.privacy.test_what_is_public import compiled, read

pytest.importorskip("dp_accounting")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(autouse=True)
def _fresh_graph() -> None:
    tf.reset_default_graph()


def _differentiate(loss: tf.Tensor) -> per_example.PerExample:
    return per_example.differentiate(per_example.Objective(loss), tf.trainable_variables())


def _scale() -> tf.Tensor:
    return tf.get_variable("w", [], initializer=tf.ones_initializer())


# ---- sizes and places. x is [2, 4], n has a number for each of its two rows

Make = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]


def _of_static_size(taken: tf.Tensor) -> tf.Tensor:
    taken.set_shape([2, *taken.shape[1:]])
    return taken


def _spaced(x: tf.Tensor, paddings: tf.Tensor | list[list[int]], crops: tf.Tensor | list[list[int]]) -> tf.Tensor:
    images = tf.reshape(x, [-1, 2, 2, 1])
    return tf.batch_to_space_nd(tf.space_to_batch_nd(images, [2, 2], paddings), [2, 2], crops)


def _of_none(n: tf.Tensor) -> tf.Tensor:
    return tf.stack([tf.zeros_like(n), n], 0)


PLACES: dict[str, Make] = {
    "split": lambda x, n: tf.split(x, n, axis=1, num=2)[0],
    "slice": lambda x, n: _of_static_size(tf.slice(x, [0, 0], n)),
    "crops": lambda x, n: _spaced(x, [[0, 0], [0, 0]], _of_none(n)),
    "paddings": lambda x, n: _spaced(x, _of_none(n), [[0, 0], [0, 0]]),
    "pad": lambda x, n: tf.pad(x, _of_none(n)),
    "tile": lambda x, n: tf.tile(x, n),
    "reshape": lambda x, n: tf.reshape(x, n),
    "resize": lambda x, n: tf.image.resize_nearest_neighbor(tf.reshape(x, [-1, 2, 2, 1]), n),
    "largest": lambda x, n: tf.math.top_k(x, tf.reshape(n[:1] + 0 * n[:1], []))[0],
    "depth": lambda x, n: tf.one_hot(tf.cast(x, tf.int32), tf.reshape(n, [-1])[0]),
}


@pytest.mark.parametrize("name", PLACES)
def test_places_that_come_from_rows_are_refused(name: str) -> None:
    x, n = tf.placeholder(tf.float32, [2, 4]), tf.placeholder(tf.int32, [2])
    taken = PLACES[name](x * _scale(), n)
    loss = tf.reduce_sum(taken, list(range(1, taken.shape.rank or 2)))
    with pytest.raises(ModelError, match="depends on other rows, so clipping would not bound"):
        _differentiate(loss)


def test_the_batch_as_a_single_number_is_refused() -> None:
    """A reshape to no axis runs where a batch has one row: it would be added to rows that look like none of its own."""
    x, y = tf.placeholder(tf.float32, [None]), tf.placeholder(tf.float32, [None, 4])
    with pytest.raises(ModelError, match=r"\(Reshape\): it makes a single number of the batch"):
        _differentiate(tf.reduce_sum(y * tf.reshape(x, []) * _scale(), 1))


def test_places_that_do_not_come_from_rows_are_taken() -> None:
    def build() -> Built:
        x = image("x", 4)
        half = tf.shape(x)[1] // 2
        h = tf.split(x * _scale(), tf.stack([half, half]), axis=1, num=2)[0]
        h = tf.slice(h, [0, 0], [-1, 2])
        return Built(tf.reduce_sum(tf.sin(h), 1), {"x": x})

    assert_equal(build, {"x": random(4)})


# ---- tables

KEY = 7


def _looked_up(handle: tf.Tensor, default: tf.Tensor | float = 0.0, keys: int = 1) -> tf.Tensor:
    found = tf.raw_ops.LookupTableFindV2(
        table_handle=handle, keys=tf.constant([KEY] * keys, tf.int64), default_value=tf.convert_to_tensor(default)
    )
    return tf.ensure_shape(found, [keys])


def _mutable(total: tf.Tensor) -> tf.Tensor:
    handle = tf.raw_ops.AnonymousMutableHashTable(key_dtype=tf.int64, value_dtype=tf.float32)
    return _filled(tf.raw_ops.LookupTableInsertV2, handle, total)


def _behind_identity(total: tf.Tensor) -> tf.Tensor:
    table = tf.lookup.experimental.MutableHashTable(tf.int64, tf.float32, 0.0)
    return tf.identity(_filled(tf.raw_ops.LookupTableInsertV2, table.resource_handle, total))


def _dense(total: tf.Tensor) -> tf.Tensor:
    handle = tf.raw_ops.AnonymousMutableDenseHashTable(
        empty_key=tf.constant(-1, tf.int64), deleted_key=tf.constant(-2, tf.int64), value_dtype=tf.float32
    )
    return _filled(tf.raw_ops.LookupTableInsertV2, handle, total)


def _filled_once(total: tf.Tensor) -> tf.Tensor:
    handle = tf.raw_ops.AnonymousHashTable(key_dtype=tf.int64, value_dtype=tf.float32)
    return _filled(tf.raw_ops.InitializeTableV2, handle, total)


def _filled_by_its_name(total: tf.Tensor) -> tf.Tensor:
    kind = {"key_dtype": tf.int64, "value_dtype": tf.float32, "shared_name": "of_rows"}
    _filled(tf.raw_ops.InitializeTableV2, tf.raw_ops.HashTableV2(**kind), total)
    return tf.raw_ops.HashTableV2(**kind)


def _filled(fill: Callable[..., tf.Operation], handle: tf.Tensor, total: tf.Tensor) -> tf.Tensor:
    put = fill(table_handle=handle, keys=tf.constant([KEY], tf.int64), values=total[tf.newaxis])
    with tf.control_dependencies([put]):
        return tf.identity(handle)


@pytest.mark.parametrize("table", [_mutable, _behind_identity, _dense, _filled_once, _filled_by_its_name])
@pytest.mark.parametrize("is_handed_rows", [True, False])
def test_a_table_that_rows_are_put_into_is_refused(table: Callable[[tf.Tensor], tf.Tensor], is_handed_rows) -> None:
    x = tf.placeholder(tf.float32, [None, 3])
    handle = table(tf.reduce_sum(x))
    if is_handed_rows:
        keys = tf.cast(x[:, 0], tf.int64)
        found = tf.raw_ops.LookupTableFindV2(table_handle=handle, keys=keys, default_value=tf.constant(0.0))
        found = tf.ensure_shape(found, [None])
    else:
        found = _looked_up(handle)[0]
    with pytest.raises(ModelError, match="a table that may change|it fills a table that the loss reads with what it"):
        _differentiate(x[:, 0] * _scale() * found)


def test_what_stands_for_keys_that_a_table_has_not_is_of_no_row() -> None:
    x = tf.placeholder(tf.float32, [2])
    handle = tf.raw_ops.HashTableV2(key_dtype=tf.int64, value_dtype=tf.float32)
    with pytest.raises(ModelError, match="what stands for keys that it has not, depends on examples"):
        _differentiate(x * _scale() * _looked_up(handle, x, 2)[::-1])


def test_a_table_that_is_filled_once_is_shared() -> None:
    x = tf.placeholder(tf.float32, [None, 3])
    filled = tf.lookup.KeyValueTensorInitializer(tf.constant([KEY], tf.int64), tf.constant([2.0]))
    table = tf.lookup.StaticHashTable(filled, 0.0)
    looked = table.lookup(tf.cast(x[:, 0], tf.int64)) * table.lookup(tf.constant(KEY, tf.int64))
    norms = _differentiate(looked * _scale()).squared_norm(tf.trainable_variables()[0])
    with tf.Session() as sess:
        sess.run([tf.global_variables_initializer(), tf.tables_initializer()])
        np.testing.assert_allclose(sess.run(norms, {x: [[KEY, 0, 0], [1, 0, 0]]}), [16, 0], atol=1e-6)


# ---- a batch of one row beside what is longer


def _flat(f: tf.Tensor) -> tf.Tensor:
    """``[B * 3]``, of which nothing is known before it runs."""
    return tf.reshape(tf.sin(tf.reshape(f, [tf.shape(f)[0], -1])), [-1])


def _wide(f: tf.Tensor) -> tf.Tensor:
    """``[B, 3, 1]`` as ``[B * 3, 1, 1]``."""
    return tf.reshape(_flat(f), [-1, 1, 1])


LONGER: dict[str, Callable[[tf.Tensor, tf.Tensor], tf.Tensor]] = {
    "sum": lambda f, w: f[:, 0] + _flat(f) * w,
    "sum, the other way round": lambda f, w: _flat(f) * w + f[:, 0],
    "three": lambda f, w: tf.where_v2(_flat(f) > 0, f[:, 0] * w, f[:, 1]),
    "product": lambda f, w: tf.matmul(f[:, :1, tf.newaxis] * w, _wide(f))[:, 0, 0],
    "cross entropy": lambda f, w: tf.nn.softmax_cross_entropy_with_logits(
        labels=tf.reshape(_wide(f), [-1, 1]) * tf.ones([1, 2]), logits=f[:, :2] * w
    ),
}


@pytest.mark.parametrize("name", LONGER)
def test_a_batch_of_one_row_is_not_repeated_by_rows_of_more_places(name: str) -> None:
    rows = np.full((4, 3), 5.0, np.float32)

    def loss_fn(m: efl.Model, s: efl.Sample) -> tf.Tensor:
        made = LONGER[name](s["x"], _scale())
        return tf.reduce_sum(tf.reshape(made, [tf.shape(s["x"])[0], -1]), 1)

    made = compiled(
        lambda: read(tf.data.Dataset.from_tensor_slices(rows).batch(1).repeat()),
        loss_fn,
        BATCH_SIZE=1,
        NUM_EXAMPLES=4,
    )
    with pytest.raises(ModelError, match=r"repeats the row of a batch of one\. Places in its inputs"):
        made.fit(efl.procedure_fn.train(max_step=1))


@pytest.mark.parametrize("batch", [1, 3])
def test_rows_of_as_many_places_meet_whatever_the_batch(batch: int) -> None:
    def build() -> Built:
        f = image("f", 3)
        made = (_flat(f) + _flat(2.0 * f)) * _scale()
        return Built(tf.reduce_sum(tf.reshape(made, [tf.shape(f)[0], -1]), 1), {"f": f})

    assert_equal(build, {"f": random(3, batch=batch)})


# ---- what is refused, and what to do


def test_a_convolution_in_groups_of_keras_is_refused_with_the_remedy() -> None:
    h = tf.keras.layers.Conv2D(4, 3, groups=2)(tf.placeholder(tf.float32, [None, 5, 5, 4]))
    with pytest.raises(ModelError, match=r"PartitionedCall .*In place of Keras' Conv2D with groups, tf\.nn\.conv2d"):
        _differentiate(tf.reduce_sum(h, [1, 2, 3]))
