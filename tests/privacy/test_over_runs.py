"""What several runs over one folder have spent together: earlier training, orders that change, repeated steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import efl
from efl.privacy.accounting import Mechanism, compute_epsilon
from tests.privacy import test_spent as spent

pytest.importorskip("dp_accounting")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
ROWS, BATCH, SIGMA = 40, 8, 2.0
X = np.random.default_rng(0).normal(size=(ROWS, 3)).astype(np.float32)
Loss = Callable[[efl.Model, efl.Sample], tf.Tensor]


class Query:
    """Adds up what it is given: a mechanism of the user's own that adds nothing."""

    def initial_global_state(self) -> Any:
        return ()

    def derive_sample_params(self, state: Any) -> Any:
        return ()

    def initial_sample_state(self, template: Any) -> Any:
        return [tf.zeros_like(each) for each in template]

    def preprocess_record(self, parameters: Any, record: Any) -> Any:
        return record

    def accumulate_record(self, parameters: Any, state: Any, record: Any) -> Any:
        return [a + b for a, b in zip(state, record)]

    def accumulate_preprocessed_record(self, state: Any, record: Any) -> Any:
        return self.accumulate_record((), state, record)

    def merge_sample_states(self, one: Any, other: Any) -> Any:
        return [a + b for a, b in zip(one, other)]

    def get_noised_result(self, state: Any, parameters: Any) -> Any:
        return state, parameters, ()


class Stop(tf.train.SessionRunHook):
    """Ends a run after some steps, as a death would: no checkpoint is made of them."""

    def __init__(self, steps: int) -> None:
        self._left = steps

    def after_run(self, context: Any, values: Any) -> None:
        self._left -= 1
        if not self._left:
            raise RuntimeError("stopped")


def squares(x: tf.Tensor, name: str = "d") -> tf.Tensor:
    return tf.reduce_sum(tf.square(tf.layers.dense(x, 2, name=name)), 1)


def run(
    folder: Path,
    steps: int,
    loss: Loss = lambda m, s: squares(s["x"]),
    optimizer: Any = None,
    data: Callable[[], tf.data.Dataset] = lambda: tf.data.Dataset.from_tensor_slices(X).batch(BATCH).repeat(),
    stop: int | None = None,
    save: int = 5,
) -> efl.Model:
    tf.reset_default_graph()
    batch = tf.data.make_initializable_iterator(data()).get_next()
    model = efl.Model()
    model.input_fn(lambda m, mode: efl.Sample({"x": batch}, {"x": [tf.feature_column.numeric_column("x", 3)]}))
    noisy = efl.DPGradientDescentGaussianOptimizer(1.0, SIGMA, learning_rate=0.1)
    model.loss_fn(loss).optimizer_fn(efl.optimizer_fn.optimizer_setter(noisy if optimizer is None else optimizer))
    if stop is not None:
        model.add_hooks([Stop(stop)], mode=efl.MODE.TRAIN)
    model.compile(opt_config={"BATCH_SIZE": BATCH, "NUM_EXAMPLES": ROWS})
    try:
        model.fit(efl.procedure_fn.train(max_step=steps), checkpoint_dir=str(folder), save_checkpoint_steps=save)
    except RuntimeError:
        if stop is None:
            raise
    return model


def epsilon(participations: int) -> float:
    found = compute_epsilon([Mechanism(SIGMA, participations, participations)], 1e-3, sampling="none").epsilon
    assert found is not None
    return found


def of_mean(moves: bool) -> Loss:
    def loss(model: efl.Model, sample: efl.Sample) -> tf.Tensor:
        mean = tf.get_variable("mean", [3], trainable=False, initializer=tf.zeros_initializer())
        if moves:
            model.add_train_op(tf.assign(mean, 0.9 * mean + 0.1 * tf.reduce_mean(sample["x"], 0)))
            return squares(sample["x"])
        return squares(sample["x"] - mean)

    return loss


def test_what_an_earlier_run_moved_by_the_data_is_remembered(tmp_path: Path) -> None:
    run(tmp_path, 5, of_mean(True))
    (row,) = run(tmp_path, 6, of_mean(False)).privacy_spent(1e-3).rows
    assert row.epsilon is None and "weights updated without noise" in row.guarantee and "mean" in row.guarantee


def test_what_an_earlier_run_trained_by_a_query_of_its_own_is_remembered(tmp_path: Path) -> None:
    run(tmp_path, 5, optimizer=efl.DPGradientDescentOptimizer(Query(), learning_rate=0.1))
    (row,) = run(tmp_path, 6).privacy_spent(1e-3).rows
    assert row.epsilon is None and "d/kernel" in row.guarantee


def with_dropout(model: efl.Model, sample: efl.Sample) -> tf.Tensor:
    return squares(tf.nn.dropout(sample["x"], rate=0.5))


@pytest.mark.parametrize("seed", [None, 3])
def test_steps_taken_again_are_of_other_rows_where_the_order_is_another(tmp_path: Path, seed: int | None) -> None:
    data = lambda: tf.data.Dataset.from_tensor_slices(X).shuffle(ROWS, seed=seed).batch(BATCH).repeat()  # noqa: E731
    for stop in (3, 6, 6, 6, 6, None):  # each begins three steps before the last one ended, so all are taken twice
        model = run(tmp_path, 15, with_dropout, data=data, stop=stop, save=3)
    found = model.privacy_spent(1e-3).rows[0].epsilon
    assert found is not None and model.steps_trained == 15
    # Three passes, each step of which was taken twice, about the same rows or about others.
    assert found == pytest.approx(epsilon(6), rel=1e-6) if seed is not None else found > 1.3 * epsilon(6)


def test_a_part_of_another_dtype_that_changes_makes_a_repeated_step_a_new_release(tmp_path: Path) -> None:
    def loss(model: efl.Model, sample: efl.Sample) -> tf.Tensor:
        fixed = tf.layers.dense(sample["x"], 2, name="a", kernel_initializer=ones)
        wide = tf.layers.dense(
            tf.nn.dropout(tf.cast(sample["x"], tf.float64), rate=0.5), 2, name="c", kernel_initializer=ones
        )
        return 0.01 * (tf.reduce_sum(tf.square(fixed), 1) + tf.cast(tf.reduce_sum(tf.square(wide), 1), tf.float32))

    ones = tf.ones_initializer()
    for stop in (1, 1, None):
        model = run(tmp_path, 1, loss, stop=stop, save=100)
    assert {v.dtype.base_dtype for v in tf.trainable_variables()} == {tf.float32, tf.float64}
    assert model.privacy_spent(1e-3).rows[0].epsilon == pytest.approx(epsilon(3), rel=1e-6)


def test_the_peer_is_told_of_what_the_data_move(tmp_path: Path) -> None:
    moved = """
    mean = tf.get_variable("mean", [4], trainable=False, initializer=tf.zeros_initializer())
    m.add_train_op(tf.assign(mean, 0.9 * mean + 0.1 * tf.reduce_mean(s['x'], 0)))
"""
    rows = spent.tables(tmp_path, lambda text: text.replace("def loss_fn(m, s):\n", "def loss_fn(m, s):" + moved))
    for table in rows.values():
        epsilon, reason = table["outsider who sees the follower's model"]
        assert epsilon is None and "weights updated without noise" in reason, rows
