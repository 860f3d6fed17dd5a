"""Runs of two parties that die when they are told to, and the driver that starts them again.

A party dies by its own hand (kill -9) at an exact place of a step or of its recovery:

    Death("after", "train", 7)      step 7 is done
    Death("sent", "train", 7)       it has just sent what the peer waits for in step 7
    Death("within", "train", 7)     the leader: what was sent has come, its gradient is not computed;
                                    the follower: the gradient is at the door, and not taken
    Death("saving", "train", 6)     while it writes the checkpoint of step 6
    Death("starting", "train", 2)   at the beginning of its second start, before it connects
    Death("losing", "train", 1)     in its first start, when it has learnt that its peer is another process
    Death("restoring", "train", 6)  after the handshake, the variables of step 6 restored and nothing else

Each happens once; the process that is started in its place goes on.
"""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.data.records import example, write
from tests.parties import Party, free_address, start_party

_ROOT = Path(__file__).resolve().parents[2]
ROWS, BATCH = 120, 10
_PATIENCE = 45.0  # with a party whose peer has ended with an error
OPTIMIZERS = {
    "momentum": "tf.train.MomentumOptimizer(0.05, 0.9)",
    "adam": "tf.train.AdamOptimizer(0.01)",
}
TRAIN = "efl.procedure_fn.train(max_step=22)"

PROLOGUE = """
import json, os, signal
import numpy as np
import efl
import tensorflow.compat.v1 as tf
from tests.federation.problem import dense, cross_entropy, own_argument, start_value

ROLE, START = own_argument("federal_role"), int(os.environ["START"])
DEATHS, PASSED = f"deaths-{ROLE}.json", {}

def die(where, mode, step):
    deaths = json.load(open(DEATHS)) if os.path.exists(DEATHS) else []
    place = where, mode, int(step)
    PASSED[place] = PASSED.get(place, 0) + 1
    this = {"where": where, "mode": mode, "step": int(step), "time": PASSED[place]}
    if this in deaths:
        deaths.remove(this)
        with open(DEATHS + ".new", "w") as file:
            json.dump(deaths, file)
        os.replace(DEATHS + ".new", DEATHS)  # another thread may be reading it
        os.kill(os.getpid(), signal.SIGKILL)

def within(tensor, mode):
    # A place in the graph between what this party sends and what it gets back.
    def look(value, step):
        die("within", mode, step + 1)
    looked = tf.numpy_function(look, [tensor, tf.train.get_global_step()], [])
    with tf.control_dependencies([looked]):
        return tf.identity(tensor)

class Mortal(tf.train.SessionRunHook):
    def __init__(self, mode):
        self.mode = mode
        self.seen = 0
    def before_run(self, context):
        return tf.train.SessionRunArgs(tf.train.get_global_step())
    def after_run(self, context, values):
        self.seen += 1
        die("after", self.mode, model.steps_trained + 1 if self.mode == "train" else self.seen)

import efl._checkpoint as checkpoint
_plain = checkpoint._digest
def _digest(path):
    if path.parent.name.startswith(".writing"):
        die("saving", "train", model.steps_trained)
    return _plain(path)
checkpoint._digest = _digest

def dies(owner, method, where, step, first=False):
    # Makes a method of efl a place to die at: when it is done, or before it begins.
    plain = getattr(owner, method)
    def mortal(self, *arguments):
        if first:
            die(where, *step(self, *arguments))
        result = plain(self, *arguments)
        if not first:
            die(where, *step(self, *arguments))
        return result
    setattr(owner, method, mortal)

from efl._keeping import Keeping
from efl._run import Run
from efl._steps.exchange import Exchange
die("starting", "train", START)
dies(Run, "_give_up_attempt", "losing", lambda run, lost: ("train", START), first=True)
dies(Keeping, "restore", "restoring", lambda keeping, raw, position: ("train", position.trained))
dies(Exchange, "send", "sent", lambda exchange, scope, name, array, *of_step: (scope.wire, scope.running or 0))
if ROLE == "follower":
    dies(Exchange, "_put", "within", lambda ex, scope, sink, step, array: (scope.wire, step), first=True)

def reader(m, mode, epochs):
    dataio = efl.data.FederalDataIO(
        f"{ROLE}_data", BATCH, m.communicator, m.federal_role, 0, 1, num_epochs=epochs, data_mode="local",
        name=mode.value, shuffle=mode is efl.MODE.TRAIN, seed=5)
    dataio.fixedlen_feature("sample_id", 1, dtype=tf.int64)
    dataio.fixedlen_feature("x", 4)
    if ROLE == "leader":
        dataio.fixedlen_feature("label", 1, dtype=tf.int64)
    else:
        dataio.varlen_feature("words", dtype=tf.int64)
    return dataio.read()
""".replace("BATCH", str(BATCH))

NET = """
def input_fn(m, mode):
    features = reader(m, mode, EPOCHS)
    columns = {"x": [tf.feature_column.numeric_column("x", 4)]}
    if ROLE == "leader":
        columns["label"] = [tf.feature_column.numeric_column("label", 1)]
    else:
        words = tf.feature_column.categorical_column_with_identity("words", 20)
        columns["emb"] = [tf.feature_column.embedding_column(
            words, 3, initializer=tf.constant_initializer(start_value("emb", (20, 3))))]
    return efl.FederalSample(features, columns, m.federal_role, m.communicator, sample_id_name="sample_id")

def net(m, s, training):
    mode = "train" if training else "eval"
    if ROLE == "follower":
        own = dense(tf.concat([s["x"], s["emb"]], axis=1), 7, 5, "own", tf.nn.relu)
        m.send("own", own, require_grad=training)
        return own
    other = tf.reshape(m.recv("own", require_grad=training), [-1, 5])
    if training:
        other = within(other, mode)
    h = tf.concat([dense(s["x"], 4, 5, "own", tf.nn.relu), other], axis=1)
    logits = dense(h, 10, 3, "top")
    label = tf.reshape(tf.cast(s["label"], tf.int64), [-1])
    m.add_metric("accuracy", tf.metrics.accuracy(label, tf.argmax(logits, axis=1)), efl.MODE(mode))
    return cross_entropy(s["label"], logits)

model = efl.FederalModel(peer_timeout=60.0, seed=3)
model.input_fn(input_fn).loss_fn(lambda m, s: net(m, s, True)).optimizer_fn(
    efl.optimizer_fn.optimizer_setter(OPTIMIZER))
if EVALUATE:
    model.eval_fn(lambda m, s: tf.reduce_mean(net(m, s, False)))
    model.add_hooks([Mortal("eval")], mode=efl.MODE.EVAL)
model.add_hooks([Mortal("train")], mode=efl.MODE.TRAIN)
model.compile()
model.fit(PROCEDURE, log_step=LOG, checkpoint_dir="checkpoints", save_checkpoint_steps=SAVE)
np.savez(f"{ROLE}.npz", **model.get_weights())
json.dump(model.history, open(f"{ROLE}.json", "w"))
"""


@dataclass(frozen=True)
class Death:
    """Where a party dies; the places are listed at the top of this file."""

    where: str
    mode: str
    step: int
    time: int = 1  # the second time that a process comes there is after a recovery


def write_data(folder: Path) -> None:
    """Records of both parties, in files of the same names."""
    rng = np.random.RandomState(2)
    x = rng.uniform(-1, 1, (ROWS, 8)).astype(np.float32)
    label = (x @ rng.uniform(-1, 1, (8, 3))).argmax(1)
    for part in range(3):
        rows = range(part, ROWS, 3)
        for role, columns in (("leader", slice(0, 4)), ("follower", slice(4, 8))):
            more = [
                {"label": int(label[i])} if role == "leader" else {"words": rng.randint(0, 20, 1 + i % 3)} for i in rows
            ]
            records = [example({"sample_id": i, "x": x[i, columns], **m}) for i, m in zip(rows, more)]
            write(folder / f"{role}_data" / f"part-{part}.tfrecord", records)


def program(
    procedure: str, optimizer: str, epochs: int = 40, save: int = 3, evaluate: bool = False, log: int = 5
) -> str:
    """The script of both parties."""
    settings = {"PROCEDURE": procedure, "OPTIMIZER": optimizer, "EPOCHS": epochs, "SAVE": save, "EVALUATE": evaluate}
    settings["LOG"] = log
    text = NET
    for name, value in settings.items():
        text = text.replace(name, str(value))
    return PROLOGUE + text


SLOW = """
class Slow(tf.train.SessionRunHook):
    def after_run(self, context, values):
        import time
        time.sleep(0.1)
model.add_hooks([Slow()], mode=efl.MODE.TRAIN)
model.compile()
"""


def slow_program(**more: Any) -> str:
    """A script of 22 steps that take 0.1 s each, so that something can be done to the parties meanwhile."""
    return program(TRAIN, OPTIMIZERS["momentum"], **more).replace("\nmodel.compile()\n", SLOW)


class Federation:
    """Both parties' processes, started again whenever one has died."""

    def __init__(self, folder: Path, script: str, address: str | None = None, dial: str | None = None) -> None:
        self.folder = folder
        self._script = script
        self.address = address or free_address()
        self._dial = dial or self.address
        self.starts = {"leader": 0, "follower": 0}
        self.outputs: dict[str, list[str]] = {"leader": [], "follower": []}
        self.parties: dict[str, Party] = {}
        self.over = threading.Event()

    def start(self, role: str) -> None:
        """Starts (again) one party."""
        self.starts[role] += 1
        address = self.address if role == "leader" else self._dial
        env = {"PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])}
        env["START"] = str(self.starts[role])
        self.parties[role] = start_party(role, self._script, cwd=self.folder, address=address, env=env)

    def run(
        self,
        deaths: dict[str, list[Death]],
        timeout: float = 240.0,
        scene: Callable[[Federation], None] | None = None,
    ) -> None:
        """Runs to the end, starting again who was killed. Fails where a party ends otherwise than killed or well.

        Args:
          deaths: Who dies where.
          timeout: Seconds for all of it.
          scene: What happens meanwhile, in a thread of its own; it looks at ``over`` and ends soon after it is set.
        """
        for role, planned in deaths.items():
            (self.folder / f"deaths-{role}.json").write_text(json.dumps([asdict(d) for d in planned]))
        for role in ("leader", "follower"):
            self.start(role)
        limit = time.monotonic() + timeout
        with ThreadPoolExecutor(1) as pool:
            playing = pool.submit(scene or (lambda federation: None), self)
            try:
                while any(party.returncode is None for party in self.parties.values()) or self._revive():
                    assert time.monotonic() < limit, f"still running after {timeout} s:\n{self.told()}"
                    if any(party.returncode not in (None, 0, -signal.SIGKILL) for party in self.parties.values()):
                        limit = min(limit, time.monotonic() + _PATIENCE)
                    time.sleep(0.02)
                    self._revive()
            finally:
                self.over.set()
                for party in self.parties.values():
                    party.kill()
            codes = {role: party.returncode for role, party in self.parties.items()}
            assert codes == {"leader": 0, "follower": 0}, self.told()
            playing.result(60)

    def wait_for_step(self, step: int) -> None:
        """Waits until the leader has logged a training step that is at least this one.

        Raises:
          AssertionError: The run was over first.
        """
        while not any(int(told) >= step for told in re.findall(r" step=(\d+) ", self.parties["leader"].output)):
            assert not self.over.wait(0.01), f"over before step {step}:\n{self.told()}"

    def _revive(self) -> bool:
        revived = False
        for role, party in list(self.parties.items()):
            if party.returncode == -signal.SIGKILL:
                self.outputs[role].append(party.output)
                self.start(role)
                revived = True
        return revived

    def told(self) -> str:
        """What the parties have written."""
        return "\n".join(
            f"--- {role}, start {number + 1}:\n{text[-6000:]}"
            for role, party in self.parties.items()
            for number, text in enumerate([*self.outputs[role], party.output])
        )


def weights(folder: Path) -> dict[str, np.ndarray]:
    """Final weights of both parties."""
    found = {}
    for role in ("leader", "follower"):
        with np.load(folder / f"{role}.npz") as held:
            found.update({f"{role}/{name}": held[name] for name in held.files})
    return found


def differing(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> list[str]:
    """Names of the weights that are not the same to the last bit."""
    assert set(got) == set(expected)
    return [n for n, value in expected.items() if not np.array_equal(got[n].view(np.uint8), value.view(np.uint8))]


def assert_bit_equal(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Every weight is the same to the last bit."""
    for name in differing(got, expected):
        np.testing.assert_array_equal(got[name].view(np.uint8), expected[name].view(np.uint8), err_msg=name)
