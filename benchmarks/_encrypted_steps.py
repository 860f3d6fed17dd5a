"""Whole steps of encrypted layers, both parties in one process: seconds of all cores, and of the clock."""

from __future__ import annotations

import os
import queue
import statistics
import threading
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from efl.paillier import PrivateKey
from efl.paillier.engine import Engine
from efl.paillier.scheme import PrivatePaillier, PublicPaillier
from efl.protocol import ActiveLayer, Kind, PassiveLayer
from efl.protocol.rounds import Share, first_share

RATE = 0.05
Messages = queue.SimpleQueue[tuple[str, np.ndarray]]


class Step(NamedTuple):
    """What one step took.

    Attributes:
      cpu: Seconds of this process and its workers.
      wall: Seconds of the clock.
      sent: Bytes in both directions.
      error: Largest difference of the output to numpy's.
    """

    cpu: float
    wall: float
    sent: int
    error: float


class _Line:
    """One end of a channel within a process."""

    def __init__(self, out: Messages, come: Messages) -> None:
        self._out, self._come, self.sent = out, come, 0
        self._held: dict[str, np.ndarray] = {}

    def send(self, name: str, array: np.ndarray) -> None:
        self.sent += array.nbytes
        self._out.put((name, array))

    def recv(self, name: str) -> np.ndarray:
        while name not in self._held:
            key, array = self._come.get()
            self._held[key] = array
        return self._held.pop(name)


def cpu_seconds() -> float:
    """Of this process and of its children that run."""
    total = time.process_time()
    ticks = os.sysconf("SC_CLK_TCK")
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[1]) == os.getpid():
                total += (int(fields[11]) + int(fields[12])) / ticks
    return total


class Pair:
    """Both parties of one layer.

    Args:
      key: The follower's.
      kind: Of the layer.
      inputs: Columns of the embedding.
      outputs: Of the layer.
      batch: Rows.
      workers: Processes of both parties together; 0 computes here.
    """

    def __init__(self, key: PrivateKey, kind: Kind, inputs: int, outputs: int, batch: int, workers: int) -> None:
        self._kind, self._shape = kind, (batch, inputs, outputs)
        self._engines = [Engine(key.public, workers=workers) for _ in range(2)]
        self._active = ActiveLayer(PrivatePaillier(self._engines[0], key), kind, inputs, outputs)
        self._passive = PassiveLayer(PublicPaillier(self._engines[1]), kind, inputs, outputs, learning_rate=RATE)
        self._rng = np.random.default_rng(0)
        shape = (inputs, outputs) if kind is Kind.DENSE else (inputs,)
        weights = self._rng.normal(size=shape) * (inputs**-0.5 if kind is Kind.DENSE else 0.1)
        half = self._rng.normal(size=shape) * 0.1
        origin = 1.0 if kind is Kind.ELEMENTWISE else 0.0
        self._shares: tuple[Share, Share] = first_share(origin + weights - half), first_share(half)

    def step(self, train: bool = True) -> Step:
        """Takes one step on random numbers."""
        batch, inputs, outputs = self._shape
        x = np.clip(self._rng.normal(size=(batch, inputs)), -8, 8)
        gradient = self._rng.normal(size=(batch, outputs)) / batch
        one, two = Messages(), Messages()
        follower, leader = _Line(one, two), _Line(two, one)
        mine, theirs = self._shares
        weights = (mine.values + theirs.values) * 2.0**-16
        found = []

        def follow() -> None:
            share = self._active.forward(follower, x, theirs, train)
            if train:
                found.append(self._active.backward(follower, x, share)[0])

        thread = threading.Thread(target=follow)
        cpu, begun = cpu_seconds(), time.perf_counter()
        thread.start()
        output = self._passive.forward(leader, mine, batch)
        if train:
            mine = self._passive.backward(leader, gradient, mine)
        thread.join()
        taken = Step(cpu_seconds() - cpu, time.perf_counter() - begun, follower.sent + leader.sent, 0.0)
        if train:
            self._shares = mine, found[0]
        expected = x @ weights if self._kind is Kind.DENSE else x * weights
        return taken._replace(error=float(np.abs(output - expected).max()))

    def median(self, steps: int, train: bool = True) -> Step:
        """The middle of some steps, after one that makes tables."""
        self.step(train)
        taken = [self.step(train) for _ in range(steps)]
        return Step(*(statistics.median(each) for each in zip(*taken)))

    def close(self) -> None:
        """Ends the workers."""
        for engine in self._engines:
            engine.close()
