"""Private training through deaths: a step that is repeated has the noise that it had, and rows are owed none twice."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from tests.faults.runs import BATCH, PROLOGUE, TRAIN, Death, Federation, weights, write_data

STEPS, SAVE = 22, 3
CLIP, MULTIPLIER, RATE = 1.0, 2.0, 0.5
ROWS, WIDTH, READ = 5000, 3, 20  # of the table; the words that records hold are below READ
RETURNED = CLIP * MULTIPLIER  # standard deviation of what the noise adds to a number that goes back

SCRIPT = (
    PROLOGUE
    + """
import hashlib

class Looks(tf.train.SessionRunHook):
    # Writes down what the dense weights are after each step.
    def begin(self):
        self.held = [v for v in tf.trainable_variables() if "table" not in v.name]
    def after_run(self, context, values):
        held = context.session.run(self.held)
        digest = hashlib.sha256(b"".join(value.tobytes() for value in held)).hexdigest()
        with open(f"{ROLE}.steps", "a") as file:
            file.write(json.dumps([START, model.steps_trained + 1, digest]) + "\\n")

plain_put = Exchange._put
def put(self, scope, sink, step, array):
    # What the peer sends back, before anything of this party has seen it.
    if ROLE == "follower":
        np.save(f"returned-{START}-{step}-{os.urandom(4).hex()}.npy", array)
    return plain_put(self, scope, sink, step, array)
Exchange._put = put

def input_fn(m, mode):
    features = reader(m, mode, 40)
    columns = {"x": [tf.feature_column.numeric_column("x", 4)]}
    if ROLE == "leader":
        columns["label"] = [tf.feature_column.numeric_column("label", 1)]
    else:
        words = tf.feature_column.categorical_column_with_identity("words", ROWS_OF_TABLE)
        columns["table"] = [tf.feature_column.embedding_column(words, 3, initializer=tf.zeros_initializer())]
    return efl.FederalSample(features, columns, m.federal_role, m.communicator, sample_id_name="sample_id")

def loss_fn(m, s):
    if ROLE == "follower":
        own = dense(tf.concat([s["x"], s["table"]], axis=1), 7, 5, "own", tf.nn.relu)
        if LIES is True and START > 1:
            own += 1.0  # in the steps that are repeated the leader gets something else
        if LIES == "idle":
            own = tf.concat([own, tf.fill([tf.shape(own)[0], 1], float(START))], 1)
        m.send("own", own, require_grad=True)
        return own
    other = tf.reshape(m.recv("own", require_grad=True), [-1, 6 if LIES == "idle" else 5])
    if LIES == "idle":
        other = other[:, :5] + 0.0 * other[:, 5:]  # makes no difference to what the leader computes
    h = tf.concat([dense(s["x"], 4, 5, "own", tf.nn.relu), other], axis=1)
    label = tf.reshape(tf.cast(s["label"], tf.int64), [-1])
    return tf.nn.sparse_softmax_cross_entropy_with_logits(labels=label, logits=dense(h, 10, 3, "top"))

model = efl.FederalModel(peer_timeout=60.0, seed=3)
model.input_fn(input_fn).loss_fn(loss_fn)
model.optimizer_fn(efl.optimizer_fn.optimizer_setter(
    efl.DPGradientDescentGaussianOptimizer(CLIP, MULTIPLIER, learning_rate=RATE)))
model.add_hooks([Looks(), Mortal("train")], mode=efl.MODE.TRAIN)
model.compile(opt_config={"BACKEND_MODE": "noise", "DEFER_NOISE": DEFERS})
assert bool(model._noise.deferred) == (DEFERS and ROLE == "follower")
model.fit(PROCEDURE, log_step=5, checkpoint_dir="checkpoints", save_checkpoint_steps=SAVE)
np.savez(f"{ROLE}.npz", **model.get_weights())
json.dump([[phase.terms["group"], phase.releases] for phase in model._noise.phases()], open(f"{ROLE}.phases", "w"))
json.dump(model._noise_holder.broken_off, open(f"{ROLE}.broken", "w"))
"""
)


def run(folder: Path, deaths: dict[str, list[Death]], lies: bool | str = False, defer: bool = False) -> Federation:
    write_data(folder)
    script = SCRIPT
    values = {"ROWS_OF_TABLE": ROWS, "PROCEDURE": TRAIN, "SAVE": SAVE, "LIES": repr(lies), "DEFERS": defer}
    for name, value in {**values, "CLIP": CLIP, "MULTIPLIER": MULTIPLIER, "RATE": RATE}.items():
        script = script.replace(name, str(value))
    federation = Federation(folder, script)
    federation.run(deaths)
    assert sum(federation.starts.values()) == 2 + sum(map(len, deaths.values())), federation.told()
    return federation


def steps_of(folder: Path, role: str) -> dict[int, list[tuple[int, str]]]:
    """Step -> (start, digest of the dense weights after it), each time that it was taken."""
    found = defaultdict(list)
    for line in (folder / f"{role}.steps").read_text().splitlines():
        start, step, digest = json.loads(line)
        found[step].append((start, digest))
    return found


def returned(folder: Path) -> dict[int, list[np.ndarray]]:
    """Step -> what the leader has sent back, each time, in the order of the follower's starts."""
    found = defaultdict(list)
    for path in sorted(folder.glob("returned-*.npy"), key=lambda path: path.stat().st_mtime_ns):
        found[int(path.stem.split("-")[2])].append(np.load(path))
    return found


def repeated(steps: dict[int, list]) -> list[int]:
    return [step for step, held in sorted(steps.items()) if len(held) > 1]


@pytest.mark.parametrize("victims", [["follower"], pytest.param(["leader", "follower"], marks=pytest.mark.full)])
def test_what_is_repeated_has_the_noise_that_it_had(tmp_path: Path, victims: list[str]) -> None:
    run(tmp_path, {role: [Death("after", "train", 5)] for role in victims})
    for role in ("leader", "follower"):
        steps = steps_of(tmp_path, role)
        assert sorted(steps) == list(range(1, STEPS + 1))
        assert {4, 5} <= set(repeated(steps))
        for step, held in steps.items():
            assert len({digest for _, digest in held}) == 1, f"{role}, step {step}"
        releases = json.loads((tmp_path / f"{role}.phases").read_text())
        assert {count for _, count in releases} == {STEPS}, releases  # nothing is released twice
        # What the other released in its last step, before it died or after this one did, this party cannot know.
        assert json.loads((tmp_path / f"{role}.broken").read_text()) == 1
    for step, arrays in returned(tmp_path).items():
        for array in arrays[1:]:
            np.testing.assert_array_equal(array, arrays[0], err_msg=str(step))


def test_a_peer_that_asks_again_with_something_else_gets_other_noise(tmp_path: Path) -> None:
    run(tmp_path, {"follower": [Death("after", "train", 5)]}, lies=True)
    answers = returned(tmp_path)
    asked_anew = repeated(answers)
    assert asked_anew == [4, 5]
    for step in asked_anew:
        # What clipping leaves of a row is at most 1, of 5 numbers; without noise of its own the difference was exact.
        difference = answers[step][1] - answers[step][0]
        assert 0.5 < difference.var() / (2 * RETURNED**2) < 2.0
    (count,) = {n for group, n in json.loads((tmp_path / "leader.phases").read_text()) if "own" in group}
    assert count == STEPS + 2  # what was answered twice is counted twice


def test_what_makes_no_difference_is_not_told_by_the_noise(tmp_path: Path) -> None:
    # A row whose sum is the same whatever the peer sends: the same noise would say so.
    run(tmp_path, {"follower": [Death("after", "train", 5)]}, lies="idle")
    answers = returned(tmp_path)
    assert repeated(answers) == [4, 5]
    difference = answers[4][1][:, :5] - answers[4][0][:, :5]  # in the first step that is repeated all else is equal
    assert 0.5 < difference.var() / (2 * RETURNED**2) < 2.0
    assert {count for _, count in json.loads((tmp_path / "leader.phases").read_text())} == {STEPS + 2}


def test_rows_that_nobody_reads_are_owed_the_noise_of_each_step_once(tmp_path: Path) -> None:
    run(tmp_path, {"follower": [Death("after", "train", 5), Death("saving", "train", 12)]}, defer=True)
    (table,) = [value for name, value in weights(tmp_path).items() if value.shape == (ROWS, WIDTH)]
    moved = table[READ:].astype(np.float64)
    deviation = RATE * CLIP * MULTIPLIER / BATCH
    assert abs(moved.var() / (STEPS * deviation**2) - 1) < 5 * np.sqrt(2 / moved.size)
    assert np.all(moved.std(0) > 0) and len(np.unique(moved)) > 100
