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
from efl.data._files import Block
from efl.data._poisson import PoissonSampler
from efl.errors import ConfigError, ModelError
from efl.privacy import _spent
from efl.privacy.accounting import Mechanism, compute_epsilon
from efl.privacy.noise import Ledger, Phase, ledger
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


def model(sample, dropout=True, multiplier=2.0, evaluates=False, optimizer=None, **config):
    """A model whose steps are never the same twice, where there is dropout."""
    made = efl.Model().input_fn(lambda m, mode: sample(m))

    def loss_fn(m, sample):
        x = tf.nn.dropout(sample["x"], rate=0.5) if dropout else sample["x"]
        return tf.reduce_sum(tf.square(tf.layers.dense(x, 2, name="d", reuse=tf.AUTO_REUSE)), 1)

    optimizer = optimizer or efl.DPGradientDescentGaussianOptimizer(1.0, multiplier, learning_rate=0.1)
    if evaluates:
        made.eval_fn(lambda m, s: tf.reduce_sum(tf.layers.dense(s["x"], 2, name="d", reuse=tf.AUTO_REUSE)))
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
    runs: Counter[int] = Counter()
    for first, last, times in steps.runs():
        runs.update(dict.fromkeys(range(first, last + 1), times))
    assert runs == seen


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


@pytest.mark.parametrize("changes", ["clip", "noise"])
def test_a_sample_is_the_same_one_also_under_other_terms(tmp_path, changes):
    """What a restarted run clips or noises otherwise is about the rows that were drawn before."""
    folder, records = str(tmp_path / "run"), over_records(tmp_path / "data", batch=10, sampling="poisson")
    multipliers = [3.0, 3.0 if changes == "clip" else 2.7]
    for number, multiplier in enumerate(multipliers):
        tf.reset_default_graph()
        optimizer = efl.DPGradientDescentGaussianOptimizer(
            1.0 + (changes == "clip") * number, multiplier, learning_rate=0.1
        )
        trained = model(records, optimizer=optimizer)
        if not number:
            trained.add_hooks([Crash(5)], mode=efl.MODE.TRAIN)
        try:
            trained.fit(efl.procedure_fn.train(max_step=7), checkpoint_dir=folder, save_checkpoint_steps=1000)
        except RuntimeError:
            assert not number
    (row,) = trained.privacy_spent(DELTA).rows
    assert [phase.often for phase in trained._noise.phases()] == [{1: 5}, {1: 7}]
    once = 0.75 ** (ROWS - 1)

    def of(noise: float, steps: int) -> Mechanism:
        return Mechanism(noise, steps, None, 0.25 / (1 - once), poisson=True, overflow=once)

    both = 1 / math.sqrt(sum(1 / each**2 for each in multipliers))
    expected = compute_epsilon([of(both, 5), of(multipliers[1], 2)], DELTA).epsilon
    assert row.epsilon == pytest.approx(expected, rel=1e-6) and row.amplified
    assert row.epsilon > 1.03 * compute_epsilon([of(multipliers[0], 5), of(multipliers[1], 7)], DELTA).epsilon


def test_samples_of_another_size_are_independent(tmp_path):
    drawn = []
    for batch in (10, 11):
        sampler = PoissonSampler(batch, 9)
        over_records(tmp_path / "data")
        sampler.load([Block("part", str(tmp_path / "data" / "part"))], "test")
        sampler.start(bytes(32), 0)
        drawn.append([set(sampler.draw(np.int64(step))[2].tolist()) for step in range(30)])
    shared = np.mean([len(one & other) / len(one) for one, other in zip(*drawn)])
    assert abs(shared - 11 / 40) < 0.12  # as of independent draws; gaps of one stream would share far more


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


def test_another_checkpoint_dir_does_not_forget_what_was_spent(tmp_path):
    tf.reset_default_graph()
    trained = model(over_tensors, BATCH_SIZE=BATCH, NUM_EXAMPLES=ROWS)
    trained.fit(efl.procedure_fn.train(max_step=2), checkpoint_dir=str(tmp_path / "a"))
    spent = trained.privacy_spent(DELTA).rows[0].epsilon
    for other in (str(tmp_path / "b"), None):
        with pytest.raises(ConfigError, match="its ledger lies in .*/a/.*: give every fit of a private model the same"):
            trained.fit(efl.procedure_fn.train(max_step=3), checkpoint_dir=other)
    assert trained.privacy_spent(DELTA).rows[0].epsilon == spent


def test_weights_that_were_trained_without_noise_stay_so(tmp_path):
    tf.reset_default_graph()
    made = efl.Model().input_fn(lambda m, mode: over_tensors(m))
    made.loss_fn(lambda m, s: tf.reduce_sum(tf.square(tf.layers.dense(s["x"], 2, name="d")), 1))
    made.optimizer_fn(efl.optimizer_fn.optimizer_setter(tf.train.GradientDescentOptimizer(0.1))).compile()
    made.fit(efl.procedure_fn.train(max_step=3), checkpoint_dir=str(tmp_path))
    for steps in (5, 6):  # told by the checkpoint of the one before
        tf.reset_default_graph()
        trained = model(over_tensors, BATCH_SIZE=BATCH, NUM_EXAMPLES=ROWS)
        trained.fit(efl.procedure_fn.train(max_step=steps), checkpoint_dir=str(tmp_path))
        (row,) = trained.privacy_spent(DELTA).rows
        assert row.reason == "none (weights updated without noise): model: d/bias, d/kernel"


def test_an_evaluation_before_it_does_not_hide_that_an_input_begins_anew(tmp_path):
    for number in range(3):
        tf.reset_default_graph()
        trained = model(over_a_generator, evaluates=True, BATCH_SIZE=BATCH, NUM_EXAMPLES=ROWS)
        trained.fit(efl.procedure_fn.eval(max_step=1), checkpoint_dir=str(tmp_path) if number else None)
        trained.fit(efl.procedure_fn.train(max_step=3 + number), checkpoint_dir=str(tmp_path))
    (row,) = trained.privacy_spent(DELTA).rows
    expected = compute_epsilon([Mechanism(2.0, 3 + 4 + 5, 3)], DELTA, sampling="none").epsilon
    assert row.epsilon == pytest.approx(expected, rel=1e-6)


def test_an_iterator_that_evaluation_reads_too_has_no_figure():
    tf.reset_default_graph()
    batch = tf.data.make_initializable_iterator(tf.data.Dataset.from_tensor_slices(X).repeat().batch(BATCH)).get_next()
    trained = model(lambda m: efl.Sample({"x": batch}, columns()), evaluates=True, BATCH_SIZE=BATCH, NUM_EXAMPLES=ROWS)
    trained.fit(efl.procedure_fn.train_and_evaluate(train_step=1, eval_step=1, max_iter=3))
    with pytest.raises(ModelError, match="is read by another task or mode too, .*: give each an iterator of its own"):
        trained.privacy_spent(DELTA)


def test_noise_that_changes_back_and_forth_is_counted_by_what_was_read_meanwhile():
    # Half a pass with one noise, half with another, six times: a row may always meet the same one.
    phases = [
        Phase({**TERMS, "noise_multiplier": noise}, 30, BATCH, 30 * BATCH, {1: 30}, {1: 30}, 0, first, first + 54)
        for noise, first in ((1.0, 0), (8.0, 5))
    ]
    one, other = _spent._of_stream([_spent._Part(phase, 1.0, phase.often, phase.runs) for phase in phases])
    assert one.participations >= 6 and other.participations >= 6


TERMS = {"group": "train", "batch_size": BATCH, "num_examples": ROWS, "stretch": "a", "inside": False}


def test_a_phase_in_the_middle_of_a_stretch_may_have_rows_twice_in_each_batch():
    phases = [Phase({**TERMS, "straddles": True, "n": n}, 1, BATCH, BATCH, {1: 1}, {1: 1}, 0, n, n) for n in range(2)]
    for found in _spent._of_stream([_spent._Part(phase, 3.0, phase.often, phase.runs) for phase in phases]):
        assert found.noise_multiplier == 1.5 and found.participations == 1


def test_what_a_power_cut_may_have_lost_is_booked_for_everybody_who_released(tmp_path, monkeypatch):
    held = Ledger(tmp_path)
    for step in range(3):
        for group in ("update", "returned"):
            held.enter({"group": group}, step, 8, f"{group}{step}".encode().ljust(16), (b"n" * 16, step))
    monkeypatch.setattr(ledger, "_BOOT_ID", tmp_path / "none")  # another boot
    lost = {phase.terms["group"]: phase.lost for phase in Ledger(tmp_path).phases()}
    assert lost == {"update": 994, "returned": 994}
    assert {p.terms["group"]: p.lost for p in Ledger(tmp_path).phases()} == lost


def test_steps_that_may_be_lost_follow_each_other(tmp_path, monkeypatch):
    held = Ledger(tmp_path)
    for again in range(3):  # the same steps, in three attempts of one process
        held.rest()
        for step in range(4):
            held.enter({"group": "a"}, step, 8, bytes([again, step]).ljust(16), (b"n" * 16, 4 * again + step))
    monkeypatch.setattr(ledger, "_BOOT_ID", tmp_path / "none")
    (phase,) = Ledger(tmp_path).phases()
    assert phase.often == {3: 4} and phase.lost == 996


def test_conversations_are_counted_across_openings(tmp_path: Path) -> None:
    for ends in (True, False, True):
        held = Ledger(tmp_path)
        held.conversation_begun()
        if ends:
            held.conversation_ended()
        held.close()
    assert Ledger(tmp_path).broken_off == 1
