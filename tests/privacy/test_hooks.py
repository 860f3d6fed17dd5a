"""The hook that ends training before it spends too much: a target is never passed, and never left unused."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import efl
from efl.errors import ConfigError
from tests.data.records import example, write
from tests.federation.harness import run_both
from tests.privacy import test_federation as federation

pytest.importorskip("dp_accounting")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
ROWS, BATCH, DELTA = 40, 4, 1e-3
X = np.random.default_rng(0).normal(size=(ROWS, 3)).astype(np.float32)
DONE = 1000  # steps, far more than any target here allows


class Crash(tf.train.SessionRunHook):
    """Ends the run after so many steps."""

    def __init__(self, steps: int) -> None:
        self._left = steps

    def after_run(self, run_context: object, run_values: object) -> None:
        self._left -= 1
        if self._left == 0:
            raise RuntimeError("crash")


def over_tensors(m: efl.Model) -> tf.Tensor:
    batches = tf.data.Dataset.from_tensor_slices(X).repeat().batch(BATCH)
    return tf.data.make_initializable_iterator(batches).get_next()


def over_python(m: efl.Model) -> tf.Tensor:
    """An input whose place no checkpoint holds: each process begins it anew."""
    batches = tf.data.Dataset.from_generator(lambda: iter(X), tf.float32, [3]).repeat().batch(BATCH)
    return tf.data.make_initializable_iterator(batches).get_next()


def model(
    target: float | None,
    every: int = 1,
    multiplier: float = 4.0,
    batch: object = over_tensors,
    dropout: bool = False,
    crash: int | None = None,
    **config: object,
) -> efl.Model:
    tf.reset_default_graph()
    made = efl.Model(seed=None if dropout else 1)

    def input_fn(m: efl.Model, mode: efl.MODE) -> efl.Sample:
        return efl.Sample({"x": batch(m)}, {"x": [tf.feature_column.numeric_column("x", 3)]})

    def forward(sample: efl.Sample) -> tf.Tensor:
        with tf.variable_scope("net", reuse=tf.AUTO_REUSE):
            x = tf.nn.dropout(sample["x"], rate=0.5) if dropout else sample["x"]
            return tf.square(tf.layers.dense(x, 2, name="d"))

    made.input_fn(input_fn)
    made.loss_fn(lambda m, sample: tf.reduce_sum(forward(sample), 1))
    made.eval_fn(lambda m, sample: tf.reduce_mean(forward(sample)))
    noisy = efl.DPGradientDescentGaussianOptimizer(1.0, multiplier, learning_rate=0.1)
    made.optimizer_fn(efl.optimizer_fn.optimizer_setter(noisy))
    made.compile(opt_config={"BATCH_SIZE": BATCH, "NUM_EXAMPLES": ROWS, **config})
    if crash is not None:
        made.add_hooks([Crash(crash)])
    made.add_hooks([efl.privacy.PrivacyHook(made, DELTA, every, target)], mode=efl.MODE.TRAIN)
    return made


def spent(made: efl.Model, further_steps: int = 0) -> float:
    epsilon = made.privacy_spent(DELTA, accountant="rdp", further_steps=further_steps).rows[0].epsilon
    assert epsilon is not None
    return epsilon


@pytest.mark.parametrize("every", [1, 7, 100])
def test_training_ends_before_the_step_that_would_pass_the_target(every: int, caplog: pytest.LogCaptureFixture) -> None:
    made = model(2.5, every)
    with caplog.at_level(logging.INFO, logger="efl"):
        made.fit(efl.procedure_fn.train(max_step=DONE))
    assert spent(made) <= 2.5 < spent(made, 1)
    assert made.steps_trained % (ROWS // BATCH) == 0 and made.steps_trained > 10  # whole passes: the next costs more
    assert "the next step would make epsilon" in caplog.text and "a hook asked to stop" in caplog.text


def test_a_target_that_the_steps_do_not_reach_ends_nothing() -> None:
    made = model(100.0)
    made.fit(efl.procedure_fn.train(max_step=25))
    assert made.steps_trained == 25


def test_the_first_step_is_refused_where_it_would_pass_the_target() -> None:
    made = model(0.5, every=100, multiplier=1.0)
    with pytest.raises(ConfigError, match=r"target_epsilon=0\.5: after the first step epsilon would be 3\.\d+ already"):
        made.fit(efl.procedure_fn.train(max_step=DONE))
    assert made._noise.phases() == []  # nothing was released


def test_where_there_is_no_epsilon_nothing_is_trained() -> None:
    made = model(3.0, multiplier=0.0)
    with pytest.raises(ConfigError, match="no epsilon to hold against target_epsilon: none"):
        made.fit(efl.procedure_fn.train(max_step=DONE))
    assert made._noise.phases() == []


def test_later_stages_train_nothing_more() -> None:
    made = model(2.5, every=7)

    def procedure(m: efl.Model) -> None:
        for _ in range(3):
            m.run_stage("train", efl.stage.LoopStage(m.train_op(), True, 60))
            m.run_stage("evaluate", efl.stage.LoopStage(m.eval_op(), False, 2))

    made.fit(procedure)
    assert spent(made) <= 2.5 < spent(made, 1)
    evaluations = [row for row in made.history if row["mode"] == "eval"]
    assert len(evaluations) == 3 and evaluations[-1]["step"] == made.steps_trained


@pytest.mark.parametrize("batch", [over_tensors, over_python])
@pytest.mark.parametrize("every", [3, 100])
def test_a_target_holds_across_restarts(tmp_path: Path, batch: object, every: int) -> None:
    steps = []
    for allowed in (7, 6, DONE, DONE):  # the second begins inside a pass, or anew
        made = model(4.0, every, batch=batch)
        made.fit(efl.procedure_fn.train(max_step=allowed), checkpoint_dir=str(tmp_path))
        assert spent(made) <= 4.0
        steps.append(made.steps_trained)
    assert steps[0] == 7 and steps[1] == 13 and steps[3] == steps[2]
    assert spent(made, 1) > 4.0


def test_a_run_with_less_noise_than_the_one_before_is_held_to_the_target_from_its_first_step(tmp_path: Path) -> None:
    made = model(4.0)
    made.fit(efl.procedure_fn.train(max_step=5), checkpoint_dir=str(tmp_path))
    first = spent(made)
    again = model(4.0, multiplier=0.5)  # one step of which costs more than what is left
    again.fit(efl.procedure_fn.train(max_step=DONE), checkpoint_dir=str(tmp_path))
    assert again.steps_trained == 5 and spent(again) == first


@pytest.mark.parametrize("target", [2.8, 3.2])
def test_steps_that_are_taken_again_are_held_to_the_target(tmp_path: Path, target: float) -> None:
    # After ten passes; a row is in a step of each, and each of these can be taken again within the next few steps.
    for crash in (100, None):
        made = model(target, dropout=True, crash=crash)
        options = {"checkpoint_dir": str(tmp_path), "save_checkpoint_steps": DONE}
        with pytest.raises(RuntimeError, match="crash") if crash else contextlib.nullcontext():
            made.fit(efl.procedure_fn.train(max_step=DONE), **options)
        assert spent(made) <= target
    assert 0 < made.steps_trained < 10 and spent(made, 1) > target


def test_poisson_samples(tmp_path: Path) -> None:
    write(tmp_path / "data" / "d.tfrecord", [example({"x": row}) for row in X])

    def batch(m: efl.Model) -> tf.Tensor:
        reader = efl.data.DataIO(str(tmp_path / "data"), 16, 0, 1, num_epochs=DONE, sampling="poisson")
        reader.fixedlen_feature("x", 3)
        return reader.read()["x"]

    made = model(2.0, 100, batch=batch, BATCH_SIZE=None, NUM_EXAMPLES=None)
    made.fit(efl.procedure_fn.train(max_step=DONE))
    assert made.privacy_spent(DELTA).rows[0].amplified
    assert 10 < made.steps_trained < DONE
    assert spent(made) <= 2.0 < spent(made, 1)


def test_it_logs_epsilon_every_so_many_steps(caplog: pytest.LogCaptureFixture) -> None:
    made = model(None, every=4)
    with caplog.at_level(logging.INFO, logger="efl"):
        made.fit(efl.procedure_fn.train(max_step=13))
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("epsilon=")]
    assert len(lines) == 3
    assert "delta=0.001 (as commonly reported, by RDP: " in lines[0] and "outsider who sees the model" in lines[0]


@pytest.mark.parametrize("wrong", [{"every": 0}, {"every": True}, {"target": 0.0}, {"target": float("inf")}])
def test_a_wrong_argument(wrong: dict) -> None:
    with pytest.raises(ConfigError, match="PrivacyHook: (every|target_epsilon)="):
        model(**{"target": 1.0, **wrong})


SIZES = {"NUM_EXAMPLES": 96, "BATCH_SIZE": 16, "BACKEND_MODE": "noise"}
SAY = """
print('STEPS', model.steps_trained)
print('SPENT', model.privacy_spent(1e-3, accountant='rdp').rows[0 if ROLE == 'leader' else 1].epsilon)
print('NEXT', model.privacy_spent(1e-3, accountant='rdp', further_steps=1).rows[0 if ROLE == 'leader' else 1].epsilon)
"""


def script(text: str, steps: int, target: float | None = None, every: int = 100) -> str:
    """A party's script, with more noise, and with the hook where there is a target."""
    text = text.replace(
        f"efl.procedure_fn.train(max_step={federation.STEPS})", f"efl.procedure_fn.train(max_step={steps})"
    ).replace(str(federation.SIGMA), "4.0")
    if target is not None:
        hook = f"model.add_hooks([efl.privacy.PrivacyHook(model, 1e-3, {every}, {target})], mode=efl.MODE.TRAIN)"
        text = text.replace("    model.compile(", f"    {hook}\n    model.compile(")
    # real noise, and a real ledger
    return federation.party(text, True, **SIZES).replace("install()\n", "") + SAY


def said(output: str, word: str) -> float:
    return float(output.split(f"{word} ")[1].split()[0])


@pytest.mark.parametrize("watches", ["leader", "follower"])
def test_one_party_that_reaches_its_target_ends_both(tmp_path: Path, watches: str) -> None:
    texts = {"leader": federation.LEADER, "follower": federation.FOLLOWER}
    scripts = [script(text, DONE, 4.0 if role == watches else None) for role, text in texts.items()]
    outputs = {role: result.output for role, result in run_both(tmp_path, *scripts).items()}
    steps = {said(output, "STEPS") for output in outputs.values()}
    assert len(steps) == 1 and 6 <= steps.pop() < DONE
    assert said(outputs[watches], "SPENT") <= 4.0 < said(outputs[watches], "NEXT")
    assert "a hook asked to stop" in outputs[watches]


@pytest.mark.parametrize("watches", ["leader", "follower"])
def test_a_party_with_nothing_left_of_its_target_ends_both_before_a_step(tmp_path: Path, watches: str) -> None:
    texts = {"leader": federation.LEADER, "follower": federation.FOLLOWER}
    args = [f"--checkpoint_dir={tmp_path / 'kept'}"]
    begun = [script(text, 12) for text in texts.values()]
    before = {role: result.output for role, result in run_both(tmp_path, *begun, args=args).items()}
    target = said(before[watches], "SPENT") + 1e-6
    scripts = [script(text, DONE, target if role == watches else None) for role, text in texts.items()]
    after = {role: result.output for role, result in run_both(tmp_path, *scripts, args=args).items()}
    assert {said(output, "STEPS") for output in after.values()} == {12}
    assert said(after[watches], "SPENT") <= target < said(after[watches], "NEXT")


def test_a_target_that_the_first_step_would_pass_is_an_error_of_both(tmp_path: Path) -> None:
    scripts = [script(federation.LEADER, DONE, 0.1), script(federation.FOLLOWER, DONE)]
    results = run_both(tmp_path, *scripts, expect=None)
    assert all(result.returncode for result in results.values())
    assert "after the first step epsilon would be" in results["leader"].output
    assert "after the first step epsilon would be" in results["follower"].output
