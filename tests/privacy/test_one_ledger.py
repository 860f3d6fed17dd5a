"""One ledger, that of the checkpoints: a lost one is noticed, a second process that opens it is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import efl
from efl import _checkpoint
from efl.errors import CheckpointError, EflError
from efl.privacy.accounting import Mechanism, compute_epsilon
from efl.privacy.noise import Ledger
from tests.federation.harness import run_both
from tests.privacy import test_federation as federation

pytest.importorskip("dp_accounting")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
ROWS, BATCH, DELTA = 40, 8, 1e-3
X = np.random.default_rng(0).normal(size=(ROWS, 3)).astype(np.float32)
GONE = "none (weights updated without noise): model: all that was trained in steps whose ledger is gone"
UNLIKE = "the ledger of what was released is not the one that the checkpoint of"


class Crash(tf.train.SessionRunHook):
    """Ends the run after so many steps."""

    def __init__(self, steps: int) -> None:
        self._left = steps

    def after_run(self, run_context: tf.train.SessionRunContext, run_values: tf.train.SessionRunValues) -> None:
        self._left -= 1
        if self._left == 0:
            raise RuntimeError("crash")


def fit(folder: Path, steps: int, crash: int | None = None, every: int = 5) -> efl.Model:
    """Another process, as far as files go, that trains; ends it after ``crash`` steps."""
    tf.reset_default_graph()
    data = tf.data.Dataset.from_tensor_slices(X).repeat().batch(BATCH)
    batch = tf.data.make_initializable_iterator(data).get_next()
    made = efl.Model(seed=1)
    made.input_fn(lambda m, mode: efl.Sample({"x": batch}, {"x": [tf.feature_column.numeric_column("x", 3)]}))
    made.loss_fn(lambda m, s: tf.reduce_sum(tf.square(tf.layers.dense(tf.nn.dropout(s["x"], 0.5), 2, name="d")), 1))
    optimizer = efl.DPGradientDescentGaussianOptimizer(1.0, 2.0, learning_rate=0.1)
    made.optimizer_fn(efl.optimizer_fn.optimizer_setter(optimizer))
    made.compile(opt_config={"BATCH_SIZE": BATCH, "NUM_EXAMPLES": ROWS})
    options = {"checkpoint_dir": str(folder), "save_checkpoint_steps": every}
    if crash is not None:
        made.add_hooks([Crash(crash)], mode=efl.MODE.TRAIN)
        with pytest.raises(RuntimeError, match="crash"):
            made.fit(efl.procedure_fn.train(max_step=steps), **options)
    else:
        made.fit(efl.procedure_fn.train(max_step=steps), **options)
    return made


def privacy(folder: Path) -> Path:
    return folder / "local" / "0" / "privacy"


def of_steps(steps: int) -> float:
    return compute_epsilon([Mechanism(2.0, steps, -(-steps // 5))], DELTA, sampling="none").epsilon


def nearly_all(path: Path) -> None:
    os.truncate(path / "releases", (path / "releases").stat().st_size - 5 * 60)  # records of 60 bytes


SPOILED = {
    "the folder": (shutil.rmtree, "had 20 releases then, and has 0 now, 20 of them or more are missing"),
    "the releases": (lambda path: (path / "releases").unlink(), "has 0 now, 20 of them or more are missing"),
    "the last ones": (nearly_all, "had 20 releases then, and has 16 now, 4 of them or more are missing"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_a_ledger_that_is_lost_leaves_no_figure_for_ever(tmp_path, caplog, what):
    fit(tmp_path, 20)
    spoil, message = SPOILED[what]
    spoil(privacy(tmp_path))
    for steps in (21, 23):  # the second goes on from a checkpoint that the new ledger has all of
        (row,) = fit(tmp_path, steps).privacy_spent(DELTA).rows
        assert (row.epsilon, row.reason) == (None, GONE)
    assert caplog.text.count(UNLIKE) == 1
    assert f"{UNLIKE} step 20 in {tmp_path}" in caplog.text and message in caplog.text
    assert str(privacy(tmp_path) / "releases") in caplog.text and "put the ledger back from a copy" in caplog.text


def test_where_nothing_is_released_afterwards_it_is_said_that_the_ledger_is_gone(tmp_path):
    fit(tmp_path, 5)
    (privacy(tmp_path) / "releases").unlink()
    with pytest.raises(EflError, match="privacy_spent: the ledger of what this model released is gone"):
        fit(tmp_path, 5).privacy_spent(DELTA)  # it had ended


def test_it_is_noticed_also_when_the_new_one_has_grown_longer(tmp_path, caplog):
    fit(tmp_path, 5)
    shutil.rmtree(privacy(tmp_path))
    fit(tmp_path, 30, crash=25, every=1000)  # saves nothing on its way
    assert sum(phase.releases for phase in Ledger(privacy(tmp_path)).phases()) > 5
    caplog.clear()
    (row,) = fit(tmp_path, 6).privacy_spent(DELTA).rows
    assert (row.epsilon, row.reason) == (None, GONE)
    assert re.search(r"had 5 releases then, and has \d+ now, other ones: it was cut off or begun anew", caplog.text)


def test_it_is_noticed_between_fits_of_one_process(tmp_path, caplog):
    made = fit(tmp_path, 10)
    shutil.rmtree(privacy(tmp_path))
    made.fit(efl.procedure_fn.train(max_step=2), checkpoint_dir=str(tmp_path))
    (row,) = made.privacy_spent(DELTA).rows
    assert row.reason == GONE and UNLIKE in caplog.text


def test_a_checkpoint_that_is_older_than_the_ledger_is_as_good_as_any(tmp_path, caplog):
    fit(tmp_path, 12, crash=9)  # the newest is that of step 5
    trained = fit(tmp_path, 12)
    (row,) = trained.privacy_spent(DELTA).rows
    assert row.epsilon is not None and row.epsilon > of_steps(12)  # what was taken again counts again
    assert UNLIKE not in caplog.text


def test_a_checkpoint_that_does_not_say_how_far_the_ledger_was_is_read(tmp_path, caplog):
    fit(tmp_path, 10)
    for path in (tmp_path / "local" / "0").glob("step-*/state.json"):
        manifest = json.loads(path.read_text())
        del manifest["state"]["ledger"]
        manifest["checksum"] = _checkpoint._checksum(manifest)
        path.write_text(json.dumps(manifest))
    (row,) = fit(tmp_path, 12).privacy_spent(DELTA).rows
    assert row.epsilon == pytest.approx(of_steps(22), rel=1e-6)  # another procedure goes on with the weights
    assert UNLIKE not in caplog.text and "damaged" not in caplog.text


# ---- two parties

KEPT = {
    f"max_step={federation.STEPS})": "max_step=STEPS), checkpoint_dir='kept', save_checkpoint_steps=2",
    "batch = batches()": "data = tf.data.Dataset.from_tensor_slices((X, LABEL, IDS)).repeat().batch(BATCH)\n"
    "batch = tf.data.make_initializable_iterator(data).get_next()",
    "install()\n": "",
}
SIZES = {"BATCH_SIZE": 16, "NUM_EXAMPLES": 96}


def parties(steps: int) -> list[str]:
    texts = [federation.party(text, True, **SIZES) for text in (federation.LEADER, federation.FOLLOWER)]
    for old, new in KEPT.items():
        assert all(old in text for text in texts), old
        texts = [text.replace(old, new.replace("STEPS", str(steps))) for text in texts]
    return [
        f"{text}\nprint('TABLE', [(r.adversary, r.reason) for r in model.privacy_spent(1e-3).rows])" for text in texts
    ]


def test_the_peer_hears_of_it(tmp_path):
    run_both(tmp_path, *parties(6))
    shutil.rmtree(tmp_path / "kept" / "leader" / "0" / "privacy")
    told = run_both(tmp_path, *parties(8))
    assert UNLIKE in told["leader"].output and UNLIKE not in told["follower"].output
    for result in told.values():
        rows = dict(eval(re.search(r"TABLE (.*)", result.output)[1]))
        assert rows["outsider who sees the leader's model"].startswith("none (weights updated without noise): leader: ")


EVALUATES = """
batch = batches()
def times(x):
    with tf.variable_scope("q", reuse=tf.AUTO_REUSE):
        return tf.matmul(x, tf.get_variable("v", [4, 2]))
BODY
model = efl.FederalModel()
model.input_fn(lambda m, mode: sample(m, batch, ROLE)).loss_fn(loss_fn).eval_fn(eval_fn)
model.optimizer_fn(optimizer(0.1)).compile()
for procedure in PROCEDURES:
    model.fit(procedure, checkpoint_dir="kept")
"""
SENDS = """
def loss_fn(m, s):
    m.send("y", times(s["x"]), require_grad=True)
def eval_fn(m, s):
    y = times(s["x"])
    m.send("e", efl.privacy.GaussianRelease(1.0, 5.0)(y) if RELEASES else y)
"""
RECEIVES = """
def loss_fn(m, s):
    y = tf.reshape(m.recv("y", require_grad=True), [-1, 2])
    return tf.reduce_mean(tf.square(y)) + tf.reduce_mean(tf.square(times(s["x"])))
def eval_fn(m, s):
    m.recv("e")
"""


def evaluation(procedures: str, releases: bool) -> list[str]:
    texts = [EVALUATES.replace("BODY", body).replace("PROCEDURES", procedures) for body in (RECEIVES, SENDS)]
    return [text.replace("RELEASES", str(releases)) for text in texts]


def test_an_evaluation_that_releases_does_not_write_to_a_ledger_that_is_in_use(tmp_path):
    run_both(tmp_path, *evaluation("[efl.procedure_fn.train(max_step=3)]", releases=True), end="")
    folder = tmp_path / "kept" / "follower" / "0" / "privacy"
    in_training = Ledger(folder)  # this process has it
    evaluates = "[efl.procedure_fn.eval(max_step=2)]"
    told = run_both(tmp_path, *evaluation(evaluates, releases=True), end="", expect=None)
    assert all(result.returncode for result in told.values())
    told_of = f"is in use by another process (pid {os.getpid()}, in {os.getcwd()})"
    for result in told.values():
        assert told_of in result.output and "privacy/releases" in result.output
    run_both(tmp_path, *evaluation(evaluates, releases=False), end="")  # which has nothing to enter
    in_training.close()
    run_both(tmp_path, *evaluation(evaluates, releases=True), end="")
    assert [(p.terms["group"], p.releases) for p in Ledger(folder).phases()] == [("eval/e", 2)]


# ---- the ledger itself

OPENS = """
import sys, time
from pathlib import Path
from efl.privacy.noise import Ledger
held = Ledger(Path(sys.argv[1]))
held.enter({"group": "theirs"}, 0, 8, bytes(16), (bytes(16), 0))
print("open", flush=True)
time.sleep(600)
"""


def test_a_second_process_is_refused_until_the_first_has_ended(tmp_path):
    first = subprocess.Popen(
        [sys.executable, "-c", OPENS, str(tmp_path / "ledger")], stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == "open\n"
        with pytest.raises(
            CheckpointError, match=f"releases is in use by another process .pid {first.pid}, in "
        ) as told:
            Ledger(tmp_path / "ledger")
        assert str(tmp_path) in str(told.value)
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    held = Ledger(tmp_path / "ledger")
    held.enter({"group": "ours"}, 0, 8, b"1" * 16, (bytes(16), 0))
    held.close()
    assert [p.terms["group"] for p in Ledger(tmp_path / "ledger").phases()] == ["theirs", "ours"]


def test_one_process_may_open_it_again_and_the_last_to_open_it_writes(tmp_path):
    first = Ledger(tmp_path)
    first.enter({"group": "a"}, 0, 8, b"1" * 16, (bytes(16), 0))
    second = Ledger(tmp_path)
    second.enter({"group": "b"}, 0, 8, b"2" * 16, (bytes(16), 0))
    with pytest.raises(EflError, match="was opened once more in this process, or this is a fork"):
        first.enter({"group": "c"}, 0, 8, b"3" * 16, (bytes(16), 0))
    first.close()
    second.close()
    assert [(p.terms["group"], p.releases) for p in Ledger(tmp_path).phases()] == [("a", 1), ("b", 1)]


def test_a_forked_worker_neither_keeps_it_nor_writes_to_it(tmp_path):
    held = Ledger(tmp_path)
    reading, writing = os.pipe()
    waiting, go = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            held.enter({"group": "a"}, 0, 8, b"1" * 16, (bytes(16), 0))
            os.write(writing, b"entered")
        except EflError as error:
            os.write(writing, str(error).encode())
        os.close(go)
        os.read(waiting, 1)  # lives on
        os._exit(0)
    try:
        assert b"or this is a fork of the one that opened it" in os.read(reading, 1000)
        held.close()
        code = f"from pathlib import Path; from efl.privacy.noise import Ledger; Ledger(Path({str(tmp_path)!r}))"
        subprocess.run([sys.executable, "-c", code], check=True)
    finally:
        os.close(go)
        os.waitpid(child, 0)


def test_half_a_record_is_taken_back(tmp_path, monkeypatch):
    held = Ledger(tmp_path)
    held.enter({"group": "a"}, 0, 8, b"1" * 16, (bytes(16), 0))
    whole = os.write
    monkeypatch.setattr(os, "write", lambda file, data: whole(file, data[:7]))
    with pytest.raises(
        CheckpointError, match="cannot be written .No space left on device., so nothing may be released"
    ):
        held.enter({"group": "a"}, 1, 8, b"2" * 16, (bytes(16), 1))
    monkeypatch.undo()
    held.enter({"group": "a"}, 2, 8, b"3" * 16, (bytes(16), 2))
    held.close()
    assert [(p.terms["group"], p.releases) for p in Ledger(tmp_path).phases()] == [("a", 2)]
