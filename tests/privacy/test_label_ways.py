"""Other ways to a label than the one by which it is randomised, and other ids: refused when the model is compiled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import efl
from efl.errors import ModelError
from efl.privacy import LabelDP
from tests.data.records import example, write
from tests.privacy.labels import (
    FIELDS,
    NUMBER,
    ROWS,
    Loss,
    X,
    Y,
    compiled,
    entropy,
    lines,
    records,
    rows,
    rows_alone,
    told,
    wide,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def of_cut(cut: Callable[[tf.Tensor], tf.Tensor], used: Callable[[tf.Tensor], tf.Tensor]) -> Loss:
    """The label is what ``cut`` takes; what ``used`` takes goes into the loss."""

    def loss(batch: dict[str, tf.Tensor]) -> tf.Tensor:
        label = told(batch["id"], cut(batch["w"]))
        columns = used(batch["w"])
        return entropy(label, tf.reshape(columns, [-1, int(np.prod(columns.shape[1:].as_list()))]))

    return loss


def of_parse(keys: dict[str, Any]) -> Loss:
    def loss(batch: dict[str, tf.Tensor]) -> tf.Tensor:
        parsed = tf.io.parse_example(batch["s"], {key: FIELDS[key] for key in ("y", "id")})
        other = tf.io.parse_example(batch["s"], keys)
        label = told(parsed["id"], parsed["y"])
        columns = tf.reshape(tf.cast(other[next(iter(keys))], tf.float32), [8, -1])[:, :1]
        return entropy(label, tf.reshape(columns, [-1, 1]))

    return loss


def of_csv(field: int) -> Loss:
    def loss(batch: dict[str, tf.Tensor]) -> tf.Tensor:
        one, other = (tf.io.decode_csv(batch["s"], [[0.0], [0], [0]]) for _ in range(2))
        return entropy(told(one[2], one[1]), tf.cast(other[field], tf.float32)[:, tf.newaxis])

    return loss


def asserted(w: tf.Tensor) -> tf.Tensor:
    with tf.control_dependencies([tf.debugging.assert_less(w[:, 3], 9.0)]):
        return tf.identity(w)


CUTS: dict[str, tuple[Callable[[tf.Tensor], tf.Tensor], Callable[[tf.Tensor], tf.Tensor], bool]] = {
    "a column twice": (lambda w: w[:, 3], lambda w: w[:, 3:], True),
    "all of it": (lambda w: w[:, 3], lambda w: w, True),
    "another cast of it": (lambda w: tf.cast(w, tf.float64)[:, 3], lambda w: w[..., 3:], True),
    "the last": (lambda w: w[:, -1], lambda w: w[:, 2:], True),
    "unstacked": (lambda w: tf.unstack(w, axis=1)[3], lambda w: tf.unstack(w, axis=1)[3][:, tf.newaxis], True),
    "split": (lambda w: tf.split(w, [3, 1], 1)[1], lambda w: tf.split(w, 2, 1)[1], True),
    "gathered": (lambda w: tf.gather(w, [3], axis=1), lambda w: tf.gather(w, [0, 3], axis=1), True),
    "sliced": (lambda w: tf.slice(w, [0, 3], [-1, 1]), lambda w: tf.slice(w, [0, 1], [-1, -1]), True),
    "reshaped first": (lambda w: tf.reshape(w, [-1, 4])[:, 3], lambda w: w[:, 3:], True),
    "cut twice": (lambda w: w[:, 1:][:, 2], lambda w: w[:, 3:], True),
    "transposed": (lambda w: tf.transpose(w)[3], lambda w: w[:, 3:], True),
    "multiplied": (lambda w: (w * 1.0)[:, 3], lambda w: w[:, 3:], True),
    "joined": (lambda w: tf.concat([w, w], 1)[:, 7], lambda w: w[:, 2:], True),
    "masked": (lambda w: tf.where(w[:, 0] > 9, w[:, 1], w[:, 3]), lambda w: w[:, 3:], True),
    "where nobody knows": (lambda w: w[:, 3], lambda w: tf.gather(w, tf.cast(w[0, :1], tf.int32), axis=1), True),
    "other columns, normalised": (lambda w: w[:, 3], lambda w: (w * [1.0, 2.0, 3.0, 4.0])[:, :3], False),
    "other columns, reshaped": (lambda w: w[:, 3], lambda w: tf.reshape(w, [-1, 4])[:, :3], False),
    "other columns, joined": (lambda w: tf.concat([w, w], 1)[:, 7], lambda w: tf.concat([w, w], 1)[:, 4:7], False),
    "other columns, but asserted": (lambda w: asserted(w)[:, 3], lambda w: w[:, :3], False),
    "other columns": (lambda w: w[:, 3], lambda w: w[:, :3], False),
    "other columns of a cast": (lambda w: tf.cast(w, tf.float64)[:, 3], lambda w: w[..., :3], False),
    "other columns, unstacked": (
        lambda w: tf.unstack(w, axis=1)[3], lambda w: tf.stack(tf.unstack(w, axis=1)[:3], 1), False),
    "other columns, split": (lambda w: tf.split(w, [3, 1], 1)[1], lambda w: tf.split(w, [3, 1], 1)[0], False),
    "other columns, gathered": (lambda w: w[:, 3], lambda w: tf.gather(w, [0, 2], axis=1), False),
    "other columns, sliced": (lambda w: w[:, 3], lambda w: tf.slice(w, [0, 1], [-1, 2]), False),
}  # fmt: skip


@pytest.mark.parametrize("case", CUTS)
def test_a_label_that_is_cut_out_of_a_wider_tensor(case: str) -> None:
    cut, used, refused = CUTS[case]
    if not refused:
        compiled(wide, of_cut(cut, used))
        return
    with pytest.raises(ModelError, match="the label itself .* is used in train for the loss"):
        compiled(wide, of_cut(cut, used))


def test_a_label_that_a_table_maps_and_one_that_is_looked_up_by_id() -> None:
    def of(label: Callable[[dict[str, tf.Tensor]], tf.Tensor], used: str) -> Loss:
        return lambda batch: (
            entropy(told(batch["id"], label(batch)) if used == "told" else batch["y"], batch["x"])
            + 0.0 * (tf.cast(told(batch["id"], label(batch)), tf.float32))
        )

    mapped = lambda batch: tf.gather(tf.constant([1, 0], tf.int64), batch["y"])  # noqa: E731
    looked_up = lambda batch: tf.gather(tf.constant(Y), batch["id"])  # noqa: E731
    compiled(rows, of(mapped, "told"))
    compiled(rows, of(looked_up, "told"))
    with pytest.raises(ModelError, match="the label itself .* is used in train for the loss"):
        compiled(rows, of(mapped, "raw"))


def test_what_only_looks_like_an_assertion_is_none() -> None:
    def loss(batch: dict[str, tf.Tensor]) -> tf.Tensor:
        tells = lambda: tf.numpy_function(lambda y: y, [batch["y"]], tf.int64)  # noqa: E731
        guard = tf.cond(tf.reduce_any(batch["y"] > 9), tells, lambda: batch["y"], name="AssertGuard")
        with tf.control_dependencies([guard]):
            return entropy(told(batch["id"], batch["y"]), tf.identity(batch["x"]))

    with pytest.raises(ModelError, match="the label itself .* is used in train for the operation"):
        compiled(rows, loss)


def test_a_label_that_is_parsed_twice() -> None:
    with pytest.raises(ModelError, match="the label itself .* is used in train for the loss"):
        compiled(records, of_parse({"y": FIELDS["y"]}))
    compiled(records, of_parse({"x": FIELDS["x"]}))
    with pytest.raises(ModelError, match="the label itself .* is used in train for the loss"):
        compiled(lines, of_csv(1))
    compiled(lines, of_csv(0))


@pytest.mark.parametrize("stacked", [lambda y: y[tf.newaxis], lambda y: tf.reshape(y, [1]), lambda y: tf.stack([y])])
def test_a_row_that_is_read_alone(stacked: Callable[[tf.Tensor], tf.Tensor]) -> None:
    def loss(batch: dict[str, tf.Tensor], leaks: bool) -> tf.Tensor:
        label = told(tf.reshape(batch["id"], [1]), stacked(batch["y"]))
        return entropy(tf.reshape(batch["y"], [1]) if leaks else label, batch["x"][tf.newaxis]) + 0.0 * tf.cast(
            label, tf.float32
        )

    compiled(rows_alone, lambda batch: loss(batch, False))
    with pytest.raises(ModelError, match="the label itself .* is used in train for the loss"):
        compiled(rows_alone, lambda batch: loss(batch, True))


@pytest.mark.parametrize("leaks", ["made dense again", "its values", ""])
def test_a_label_of_variable_length(leaks: str) -> None:
    def loss(batch: dict[str, tf.Tensor]) -> tf.Tensor:
        sparse = tf.io.parse_example(batch["s"], {"y": tf.VarLenFeature(tf.int64), "id": NUMBER, "x": FIELDS["x"]})
        dense = lambda: tf.reshape(tf.sparse.to_dense(sparse["y"]), [-1])  # noqa: E731
        label = told(sparse["id"], dense())
        used = {"made dense again": dense, "its values": lambda: sparse["y"].values, "": lambda: label}[leaks]()
        return entropy(used, sparse["x"])

    if not leaks:
        compiled(records, loss)
        return
    with pytest.raises(ModelError, match="the label itself .* is used in train for the loss"):
        compiled(records, loss)


@pytest.mark.parametrize("options", [{}, {"sampling": "poisson"}, {"shuffle": True}])
def test_ids_and_labels_of_a_reader(tmp_path: Path, options: dict[str, Any]) -> None:
    write(tmp_path / "data" / "part", [example({"x": X[i], "y": int(Y[i]), "id": i}) for i in range(ROWS)])
    tf.reset_default_graph()

    def sample(model: Any, mode: Any) -> efl.Sample:
        reader = efl.data.DataIO(str(tmp_path / "data"), 8, 0, 1, num_epochs=2, **options)
        reader.fixedlen_feature("x", 3)
        for name in ("y", "id"):
            reader.fixedlen_feature(name, 1, dtype=tf.int64)
        return efl.Sample(reader.read(), {"x": [tf.feature_column.numeric_column("x", 3)]})

    model = efl.Model(seed=1).input_fn(sample)
    model.loss_fn(lambda m, s: entropy(told(s.features["id"], s.features["y"]), s["x"]))
    model.optimizer_fn(efl.optimizer_fn.optimizer_setter(tf.train.GradientDescentOptimizer(0.1))).compile()
    model.fit(efl.procedure_fn.train(max_step=3))
    assert "0.1" in str(model.privacy_spent(1e-5))


def test_ids_that_change_are_refused() -> None:
    def of(change: Callable[[tf.Tensor], tf.Tensor]) -> Loss:
        return lambda batch: entropy(told(change(batch["id"]), batch["y"]), batch["x"])

    step = lambda ids: ids + 1000 * tf.cast(tf.train.get_or_create_global_step(), tf.int64)  # noqa: E731
    drawn = tf.function(lambda ids: ids + tf.random.uniform([], 0, 9, tf.int64))
    now = lambda ids: ids + tf.cast(tf.timestamp(), tf.int64)  # noqa: E731
    for change in (step, lambda ids: ids + tf.random.uniform([], 0, 9, tf.int64), drawn, now):
        with pytest.raises(ModelError, match=r"sample ids depend on .*, which changes while the model is trained"):
            compiled(rows, of(change))
    compiled(rows, of(lambda ids: ids * 2 + 1))

    def waits(ids: tf.Tensor) -> tf.Tensor:
        with tf.control_dependencies([tf.identity(tf.train.get_or_create_global_step())]):
            return tf.identity(ids)

    compiled(rows, of(waits))


def test_one_label_under_two_ids_is_refused() -> None:
    def of(change: Callable[[tf.Tensor], tf.Tensor], name: str = "label") -> Loss:
        def loss(batch: dict[str, tf.Tensor]) -> tf.Tensor:
            second = LabelDP(0.1, 2, name=name)(change(batch["id"]), batch["y"])
            return entropy(told(batch["id"], batch["y"]) + tf.cast(second, tf.int64), batch["x"])

        return loss

    with pytest.raises(ModelError, match="is randomised under the ids .* and under .*, which releases it twice"):
        compiled(rows, of(lambda ids: ids + 1000))
    cut_anew = lambda batch: entropy(sum(told(batch["id"] + k, batch["w"][:, 3]) for k in (0, 9)), batch["w"][:, :3])  # noqa: E731
    with pytest.raises(ModelError, match="is randomised under the ids .* and under .*, which releases it twice"):
        compiled(wide, cut_anew)
    compiled(rows, of(lambda ids: tf.reshape(ids, [-1])))
    compiled(rows, of(lambda ids: ids + 1000, name="again"))
