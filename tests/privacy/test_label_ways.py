"""Other ways to a label than the one by which it is randomised, and other ids: refused when the model is compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import efl
from efl.errors import ModelError
from efl.privacy import LabelDP
from tests.data.records import example

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
ROWS = 40
X = np.random.default_rng(0).normal(size=(ROWS, 3)).astype(np.float32)
Y, IDS = np.random.default_rng(1).integers(0, 2, ROWS), np.arange(ROWS)
WIDE = np.concatenate([X, Y[:, np.newaxis]], 1).astype(np.float32)
NUMBER = tf.FixedLenFeature([], tf.int64)
FIELDS = {"x": tf.FixedLenFeature([3], tf.float32), "y": NUMBER, "id": NUMBER}
Loss = Callable[[dict[str, tf.Tensor]], tf.Tensor]


def compiled(data: Callable[[], tf.data.Dataset], loss: Loss) -> None:
    """Compiles a model whose loss is a function of what one batch has."""
    tf.reset_default_graph()
    batch = tf.data.make_initializable_iterator(data().repeat()).get_next()
    anything = {"x": tf.zeros([8, 3])}
    model = efl.Model(seed=1)
    model.input_fn(lambda m, mode: efl.Sample(anything, {"x": [tf.feature_column.numeric_column("x", 3)]}))
    model.loss_fn(lambda m, sample: loss(batch))
    model.optimizer_fn(efl.optimizer_fn.optimizer_setter(tf.train.GradientDescentOptimizer(0.1))).compile()


def slices(**parts: np.ndarray) -> tf.data.Dataset:
    return tf.data.Dataset.from_tensor_slices(parts)


def told(ids: tf.Tensor, label: tf.Tensor) -> tf.Tensor:
    return LabelDP(0.1, 2)(ids, tf.cast(label, tf.int32))


def entropy(label: tf.Tensor, columns: tf.Tensor) -> tf.Tensor:
    logits = tf.layers.dense(columns, 1, name="d")[:, 0]
    return tf.nn.sigmoid_cross_entropy_with_logits(labels=tf.cast(label, tf.float32), logits=logits)


def rows_alone() -> tf.data.Dataset:
    return slices(x=X, y=Y, id=IDS)


def rows() -> tf.data.Dataset:
    return rows_alone().batch(8)


def wide() -> tf.data.Dataset:
    return slices(w=WIDE, id=IDS).batch(8)


def records() -> tf.data.Dataset:
    held = [example({"x": X[i], "y": int(Y[i]), "id": i}) for i in range(ROWS)]
    return slices(s=np.array(held, object)).batch(8)


def lines() -> tf.data.Dataset:
    return slices(s=np.array([f"{x[0]},{y},{i}" for x, y, i in zip(X, Y, IDS)])).batch(8)


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


CUTS: dict[str, tuple[Callable[[tf.Tensor], tf.Tensor], Callable[[tf.Tensor], tf.Tensor], bool]] = {
    "a column twice": (lambda w: w[:, 3], lambda w: w[:, 3:], True),
    "all of it": (lambda w: w[:, 3], lambda w: w, True),
    "another cast of it": (lambda w: tf.cast(w, tf.float64)[:, 3], lambda w: w[..., 3:], True),
    "the last": (lambda w: w[:, -1], lambda w: w[:, 2:], True),
    "unstacked": (lambda w: tf.unstack(w, axis=1)[3], lambda w: tf.unstack(w, axis=1)[3][:, tf.newaxis], True),
    "split": (lambda w: tf.split(w, [3, 1], 1)[1], lambda w: tf.split(w, 2, 1)[1], True),
    "gathered": (lambda w: tf.gather(w, [3], axis=1), lambda w: tf.gather(w, [0, 3], axis=1), True),
    "sliced": (lambda w: tf.slice(w, [0, 3], [-1, 1]), lambda w: tf.slice(w, [0, 1], [-1, -1]), True),
    "where nobody knows": (lambda w: w[:, 3], lambda w: tf.gather(w, tf.cast(w[0, :1], tf.int32), axis=1), True),
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


def test_ids_that_change_are_refused() -> None:
    def of(change: Callable[[tf.Tensor], tf.Tensor]) -> Loss:
        return lambda batch: entropy(told(change(batch["id"]), batch["y"]), batch["x"])

    step = lambda ids: ids + 1000 * tf.cast(tf.train.get_or_create_global_step(), tf.int64)  # noqa: E731
    for change in (step, lambda ids: ids + tf.random.uniform([], 0, 9, tf.int64)):
        with pytest.raises(ModelError, match=r"sample ids depend on .*, which changes while the model is trained"):
            compiled(rows, of(change))
    compiled(rows, of(lambda ids: ids * 2 + 1))


def test_one_label_under_two_ids_is_refused() -> None:
    def of(change: Callable[[tf.Tensor], tf.Tensor], name: str = "label") -> Loss:
        def loss(batch: dict[str, tf.Tensor]) -> tf.Tensor:
            second = LabelDP(0.1, 2, name=name)(change(batch["id"]), batch["y"])
            return entropy(told(batch["id"], batch["y"]) + tf.cast(second, tf.int64), batch["x"])

        return loss

    with pytest.raises(ModelError, match="is randomised under the ids .* and under .*, which releases it twice"):
        compiled(rows, of(lambda ids: ids + 1000))
    compiled(rows, of(lambda ids: tf.reshape(ids, [-1])))
    compiled(rows, of(lambda ids: ids + 1000, name="again"))
