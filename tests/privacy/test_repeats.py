"""What repeated steps cost: a row is told of again, although no further step was taken."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tensorflow.compat.v1 as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import efl
from efl.errors import ConfigError
from efl.privacy.accounting import Mechanism, compute_epsilon
from efl.privacy.noise import Ledger
from efl.privacy.noise.steps import Steps
from tests.data.records import example, write

pytest.importorskip("dp_accounting")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
ROWS, BATCH, DELTA = 40, 4, 1e-3
X = np.random.default_rng(0).normal(size=(ROWS, 3)).astype(np.float32)


class Crash(tf.train.SessionRunHook):
    """Ends the run after so many steps."""

    def __init__(self, steps):
        self._left = steps

    def after_run(self, run_context, run_values):
        self._left -= 1
        if self._left == 0:
            raise RuntimeError("crash")


def model(sample, dropout=True, multiplier=2.0, **config):
    """A model whose steps are never the same twice, where there is dropout."""
    made = efl.Model().input_fn(lambda m, mode: sample(m))

    def loss_fn(m, sample):
        x = tf.nn.dropout(sample["x"], rate=0.5) if dropout else sample["x"]
        return tf.reduce_sum(tf.square(tf.layers.dense(x, 2, name="d")), 1)

    optimizer = efl.DPGradientDescentGaussianOptimizer(1.0, multiplier, learning_rate=0.1)
    made.loss_fn(loss_fn).optimizer_fn(efl.optimizer_fn.optimizer_setter(optimizer))
    return made.compile(opt_config=config or None)


def columns():
    return {"x": [tf.feature_column.numeric_column("x", 3)]}


def over_tensors(m):
    batch = tf.data.make_initializable_iterator(tf.data.Dataset.from_tensor_slices(X).repeat().batch(BATCH))
    return efl.Sample({"x": batch.get_next()}, columns())


def over_a_generator(m):
    data = tf.data.Dataset.from_generator(lambda: iter(X), tf.float32, [3]).batch(BATCH)
    return efl.Sample({"x": tf.data.make_initializable_iterator(data).get_next()}, columns())


def over_records(folder, batch=BATCH, **kwargs):
    if not folder.exists():
        write(folder / "part", (example({"x": x}) for x in X))

    def sample(m):
        reader = efl.data.DataIO(str(folder), batch, 0, 1, num_epochs=9, **kwargs)
        reader.fixedlen_feature("x", 3)
        return efl.Sample(reader.read(), columns())

    return sample


def with_crashes(folder, sample, crashes, steps, **options):
    """The model after so many runs that ended in a crash, and one that did not, none of which saved on its way."""
    for number in range(crashes + 1):
        tf.reset_default_graph()
        made = model(sample, **options)
        if number < crashes:
            made.add_hooks([Crash(steps)], mode=efl.MODE.TRAIN)
            with pytest.raises(RuntimeError, match="crash"):
                made.fit(efl.procedure_fn.train(max_step=steps), checkpoint_dir=folder, save_checkpoint_steps=1000)
        else:
            made.fit(efl.procedure_fn.train(max_step=steps), checkpoint_dir=folder, save_checkpoint_steps=1000)
    return made


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 12), max_size=40))
def test_steps_are_counted_as_a_counter_counts_them(taken):
    steps, seen = Steps(), Counter()
    for step in taken:
        assert steps.add(step) == (seen[step] == 0)
        seen[step] += 1
    assert steps.first == min(taken, default=None)
    assert steps.often() == Counter(seen.values())


def test_steps_that_are_taken_again_are_about_the_same_rows(tmp_path):
    sizes = {"BATCH_SIZE": BATCH, "NUM_EXAMPLES": ROWS}
    trained = with_crashes(str(tmp_path), over_tensors, 3, 5, **sizes)
    (row,) = trained.privacy_spent(DELTA).rows
    expected = compute_epsilon([Mechanism(2.0, 20, 4)], DELTA, sampling="none").epsilon  # half an epoch, four times
    assert row.epsilon == pytest.approx(expected, rel=1e-6)


def test_steps_that_are_repeated_as_they_were_count_once(tmp_path):
    sizes = {"BATCH_SIZE": BATCH, "NUM_EXAMPLES": ROWS}
    trained = with_crashes(str(tmp_path), over_tensors, 3, 5, dropout=False, **sizes)
    (row,) = trained.privacy_spent(DELTA).rows
    assert row.epsilon == pytest.approx(compute_epsilon([Mechanism(2.0, 5, 1)], DELTA, sampling="none").epsilon)


def test_a_sample_that_is_read_again_is_the_same_sample(tmp_path):
    folder, records = str(tmp_path / "run"), over_records(tmp_path / "data", batch=10, sampling="poisson")
    trained = with_crashes(folder, records, 3, 5, multiplier=8.0)
    (row,) = trained.privacy_spent(DELTA).rows
    (phase,) = trained._noise.phases()
    assert phase.often == {4: 5}
    once = 0.75 ** (ROWS - 1)
    same = Mechanism(8.0 / math.sqrt(4), 5, None, 0.25 / (1 - once), poisson=True, overflow=once)
    assert row.epsilon == pytest.approx(compute_epsilon([same], DELTA).epsilon, rel=1e-6)
    assert row.amplified


def test_an_input_that_begins_anew_brings_its_first_rows_again(tmp_path):
    for number in range(4):  # three steps each, of ten that an epoch has
        tf.reset_default_graph()
        trained = model(over_a_generator, BATCH_SIZE=BATCH, NUM_EXAMPLES=ROWS)
        trained.fit(efl.procedure_fn.train(max_step=3 + number), checkpoint_dir=str(tmp_path))
    (row,) = trained.privacy_spent(DELTA).rows
    expected = compute_epsilon([Mechanism(2.0, 3 + 4 + 5 + 6, 4)], DELTA, sampling="none").epsilon
    assert row.epsilon == pytest.approx(expected, rel=1e-6)


def test_an_input_that_goes_on_does_not(tmp_path):
    for number in range(3):
        tf.reset_default_graph()
        trained = model(over_tensors, BATCH_SIZE=BATCH, NUM_EXAMPLES=ROWS)
        trained.fit(efl.procedure_fn.train(max_step=2 + number), checkpoint_dir=str(tmp_path))
    (row,) = trained.privacy_spent(DELTA).rows
    assert row.epsilon == pytest.approx(compute_epsilon([Mechanism(2.0, 9, 1)], DELTA, sampling="none").epsilon)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"BATCH_SIZE": 2}, "BATCH_SIZE: 2, but the reader of train has batch_size=4, .* leave BATCH_SIZE out"),
        ({"NUM_EXAMPLES": 41}, "NUM_EXAMPLES: 41, but the data's reader has 40 records, .* leave NUM_EXAMPLES out"),
    ],
)
def test_sizes_that_the_reader_knows_better_are_refused(tmp_path, config, message):
    tf.reset_default_graph()
    with pytest.raises(ConfigError, match=message):
        model(over_records(tmp_path / "data"), **config).fit(efl.procedure_fn.train(max_step=2))


def test_fewer_examples_than_the_reader_has_count_more(tmp_path):
    tf.reset_default_graph()
    trained = model(over_records(tmp_path / "data"), NUM_EXAMPLES=20, BATCH_SIZE=BATCH)  # rows come in pairs, say
    trained.fit(efl.procedure_fn.train(max_step=10))
    (row,) = trained.privacy_spent(DELTA).rows
    assert row.epsilon == pytest.approx(compute_epsilon([Mechanism(2.0, 10, 2)], DELTA, sampling="none").epsilon)


def test_conversations_are_counted_across_openings(tmp_path: Path) -> None:
    for ends in (True, False, True):
        held = Ledger(tmp_path)
        held.conversation_begun()
        if ends:
            held.conversation_ended()
        held.close()
    assert Ledger(tmp_path).broken_off == 1
