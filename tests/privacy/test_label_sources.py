"""Where a label comes from, by whatever ops it does: what else is made of it is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import efl
from efl.errors import ModelError
from tests.privacy.labels import (
    IDS,
    WIDE,
    Loss,
    Y,
    compiled,
    entropy,
    known,
    lines,
    rows,
    rows_alone,
    slices,
    told,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def of_both(
    label: Callable[[dict[str, tf.Tensor]], tf.Tensor], raw: Callable[[dict[str, tf.Tensor]], tf.Tensor]
) -> Loss:
    """What ``label`` gives is randomised; what ``raw`` gives goes into the loss beside it."""
    return lambda batch: (
        entropy(told(batch["id"], label(batch)), tf.ones([8, 1])) + tf.cast(raw(batch), tf.float32) * head()
    )


def head() -> tf.Tensor:
    return tf.layers.dense(tf.ones([8, 1]), 1, name="e")[:, 0]


def by_python(*given: tf.Tensor) -> tf.Tensor:
    made = tf.numpy_function(lambda *held: np.int64(held[0] > 0), list(given), tf.int64)
    made.set_shape([8])
    return made


def first_of_two(batch: dict[str, tf.Tensor]) -> tf.Tensor:
    return tf.identity_n([batch["x"], batch["y"]])[1]


def as_column(batch: dict[str, tf.Tensor]) -> list[tf.Tensor]:
    return tf.io.decode_csv(tf.identity(batch["s"][:, tf.newaxis])[:, 0], [[0.0], [0], [0]])


def of_other_kind(batch: dict[str, tf.Tensor]) -> tf.Tensor:
    (whole,) = tf.io.decode_csv(batch["s"], [[""]], field_delim=";")
    return tf.strings.to_number(tf.strings.substr(whole, -3, 1))


def stacked(rows_of: Callable[[tf.Tensor], list[tf.Tensor]]) -> Callable[[dict[str, tf.Tensor]], tf.Tensor]:
    return lambda batch: tf.stack([row[3] for row in rows_of(batch["w"])])


def even() -> tf.data.Dataset:
    return slices(w=WIDE, id=IDS).batch(8, drop_remainder=True)


@pytest.mark.parametrize(
    ("data", "label", "raw"),
    [
        (rows, lambda b: by_python(b["y"]), lambda b: b["y"]),
        (rows, lambda b: by_python(b["y"], b["x"]), lambda b: b["x"][:, 0]),
        (rows, first_of_two, lambda b: b["y"]),
        (rows, lambda b: b["y"], first_of_two),
        (even, lambda b: b["w"][:, 3], stacked(lambda w: tf.unstack(w, axis=0))),
        (even, stacked(lambda w: tf.unstack(w, axis=0)), lambda b: b["w"][:, 3]),
        (even, lambda b: b["w"][:, 3], stacked(lambda w: [w[i] for i in range(8)])),
        (even, lambda b: b["w"][:, 3], stacked(lambda w: [tf.gather(w, i) for i in range(8)])),
        (even, lambda b: b["w"][:, 3], lambda b: b["w"][tf.newaxis, :, 3][0]),
        (even, lambda b: b["w"][:, 3], lambda b: tf.reshape(b["w"][tf.newaxis][:, :, 1:], [8, 3])[:, 2]),
        (known, lambda b: as_column(b)[1], lambda b: tf.io.decode_csv(b["s"][0:8], [[0.0], [0], [0]])[1]),
        (known, lambda b: as_column(b)[1], of_other_kind),
        (known, lambda b: as_column(b)[1], lambda b: tf.strings.length(tf.strings.substr(b["s"], -3, 1))),
    ],
    ids=[
        "Python function", "of Python function", "second of two", "second of two, raw", "rows", "of rows",
        "indexed rows", "gathered rows", "axis before rows", "axis before rows, cut", "records in part",
        "parsed otherwise", "a byte",
    ],
)  # fmt: skip
def test_a_label_that_comes_another_way(data: Any, label: Any, raw: Any) -> None:
    with pytest.raises(ModelError, match="the label itself .* is used in train for the loss"):
        compiled(data, of_both(label, raw))


def test_what_a_python_function_or_a_parse_of_a_column_makes_is_a_label() -> None:
    nothing = lambda b: b["id"]  # noqa: E731
    compiled(rows, of_both(lambda b: by_python(b["y"]), nothing))
    compiled(rows, of_both(lambda b: by_python(b["id"]), nothing))  # which looks the label up
    compiled(rows, of_both(first_of_two, lambda b: tf.identity_n([b["x"], b["y"]])[0][:, 0]))
    compiled(
        lines, lambda b: of_both(lambda b: as_column(b)[1], lambda b: as_column(b)[0])(b | {"id": as_column(b)[2]})
    )


def test_labels_that_come_in_other_ways_than_from_an_iterator() -> None:
    def single() -> dict[str, tf.Tensor]:
        return tf.data.experimental.get_single_element(rows_alone().batch(8))

    def staged() -> dict[str, tf.Tensor]:
        batch = single()
        with tf.control_dependencies([tf.raw_ops.Stage(values=[batch["x"], batch["y"], batch["id"]])]):
            x, y, ids = tf.raw_ops.Unstage(dtypes=[tf.float32, tf.int64, tf.int64])
        return {"x": tf.ensure_shape(x, [8, 3]), "y": tf.ensure_shape(y, [8]), "id": tf.ensure_shape(ids, [8])}

    def called() -> dict[str, tf.Tensor]:
        iterator = tf.data.make_one_shot_iterator(rows_alone().batch(8, drop_remainder=True).repeat())
        return tf.function(iterator.get_next, autograph=False)()

    def optional() -> dict[str, tf.Tensor]:
        iterator = tf.data.make_one_shot_iterator(rows_alone().batch(8, drop_remainder=True).repeat())
        return tf.data.experimental.get_next_as_optional(iterator).get_value()

    for read in (single, staged, called, optional):
        for leaks in (False, True):
            tf.reset_default_graph()
            batch = read()
            label = told(batch["id"], batch["y"])
            loss = entropy(label, batch["x"]) + head() * tf.cast(batch["y" if leaks else "id"], tf.float32)
            model = efl.Model(seed=1)
            model.input_fn(
                lambda m, mode: efl.Sample({"x": tf.zeros([8, 3])}, {"x": [tf.feature_column.numeric_column("x", 3)]})
            )
            model.loss_fn(lambda m, sample, loss=loss: loss)
            model.optimizer_fn(efl.optimizer_fn.optimizer_setter(tf.train.GradientDescentOptimizer(0.1)))
            if not leaks:
                model.compile()
                continue
            with pytest.raises(ModelError, match="the label itself .* is used in train for the loss"):
                model.compile()


def test_a_label_out_of_a_variable_is_refused() -> None:
    def loss(batch: dict[str, tf.Tensor]) -> tf.Tensor:
        held = tf.get_variable("held", [8], tf.int64, tf.zeros_initializer(), trainable=False)
        with tf.control_dependencies([held.assign(batch["y"])]):
            return entropy(told(batch["id"], held.read_value()), batch["x"])

    with pytest.raises(ModelError, match="the label .* is read from a variable .*: what was written there"):
        compiled(rows, loss)


def test_a_label_that_is_looked_up_twice() -> None:
    labels = lambda: tf.constant(Y)  # noqa: E731

    def of(table: tf.Tensor, batch: dict[str, tf.Tensor]) -> tf.Tensor:
        return of_both(lambda b: tf.gather(table, b["id"]), lambda b: tf.gather(table, b["id"]))(batch)

    with pytest.raises(ModelError, match="the label itself .* is used in train for the loss"):
        compiled(rows, lambda batch: of(labels(), batch))

    def hashed(batch: dict[str, tf.Tensor], leaks: bool) -> tf.Tensor:
        made = tf.lookup.StaticHashTable(tf.lookup.KeyValueTensorInitializer(IDS, Y), 0)
        return of_both(lambda b: made.lookup(b["id"]), lambda b: made.lookup(b["id"]) if leaks else b["id"])(batch)

    compiled(rows, lambda batch: hashed(batch, False))
    with pytest.raises(ModelError, match="the label itself .* is used in train for the loss"):
        compiled(rows, lambda batch: hashed(batch, True))
