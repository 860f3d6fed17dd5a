"""Both parties of a layer in one process, over a channel that records what is sent."""

from __future__ import annotations

import queue
import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from efl.paillier import PrivateKey
from efl.paillier.engine import Engine
from efl.paillier.scheme import PrivatePaillier, PublicPaillier
from efl.protocol import ActiveLayer, Kind, PassiveLayer
from efl.protocol.rounds import Share, first_share

PATIENCE = 60.0


class Line:
    """One end. ``sent`` has every message; ``change`` may replace one on its way out."""

    def __init__(self, out: queue.SimpleQueue[Any], come: queue.SimpleQueue[Any]) -> None:
        self._out, self._come, self._held = out, come, {}
        self.sent: dict[str, np.ndarray] = {}
        self.change: dict[str, Any] = {}

    def send(self, name: str, array: np.ndarray) -> None:
        assert name not in self.sent
        self.sent[name] = np.array(array)
        change = self.change.get(name)
        self._out.put((name, array if change is None else change(np.array(array))))

    def recv(self, name: str) -> np.ndarray:
        while name not in self._held:
            key, array = self._come.get(timeout=PATIENCE)
            if key is None:
                raise ConnectionError("the other party has ended")
            self._held[key] = array
        return self._held.pop(name)

    def hang_up(self) -> None:
        self._out.put((None, None))


@dataclass
class Step:
    """What came of one step: of a party that failed, its error."""

    output: np.ndarray | None = None
    gradient: np.ndarray | None = None
    shares: tuple[Share, Share] | None = None
    errors: dict[str, Exception] = field(default_factory=dict)
    sent: dict[str, np.ndarray] = field(default_factory=dict)


class Pair:
    """A leader and a follower with shares of the weights ``[inputs, outputs]`` or ``[inputs]``."""

    def __init__(
        self, key: PrivateKey, kind: Kind, weights: np.ndarray, rate: float = 0.1, momentum: float = 0.0, **more: Any
    ) -> None:
        outputs = weights.shape[-1]
        shape = kind, weights.shape[0], outputs
        self.kind, self.rate, self.key = kind, rate, key
        private, public = (
            PrivatePaillier(Engine(key.public, workers=0), key),
            PublicPaillier(Engine(key.public, workers=0)),
        )
        self.active = ActiveLayer(private, *shape, momentum=momentum, **more)
        self.passive = PassiveLayer(public, *shape, learning_rate=rate, momentum=momentum)
        half = np.random.default_rng(5).normal(size=weights.shape) * 0.1
        self.leader, self.follower = first_share(weights - half, momentum), first_share(half, momentum)

    @property
    def weights(self) -> np.ndarray:
        """W, as nobody has it."""
        return (self.leader.values + self.follower.values) * 2.0**-16

    def product(self, x: np.ndarray) -> np.ndarray:
        return x @ self.weights if self.kind is Kind.DENSE else x * self.weights

    def step(
        self,
        x: np.ndarray,
        gradient: np.ndarray | None = None,
        changes: dict[str, Any] | None = None,
        rows: int | None = None,
        keep: bool = True,
    ) -> Step:
        """One step, in training where there is a gradient."""
        one, two = queue.SimpleQueue(), queue.SimpleQueue()
        follower, leader = Line(one, two), Line(two, one)
        follower.change = leader.change = changes or {}
        found, train = Step(), gradient is not None
        new: list[Share] = []

        def follow() -> None:
            try:
                share = self.active.forward(follower, x, self.follower, train)
                if train:
                    share, found.gradient = self.active.backward(follower, x, share)
                    new.append(share)
            except Exception as error:
                found.errors["follower"] = error
            follower.hang_up()

        thread = threading.Thread(target=follow)
        thread.start()
        try:
            found.output = self.passive.forward(leader, self.leader, len(x) if rows is None else rows)
            if gradient is not None:
                moved = self.passive.backward(leader, gradient, self.leader)
        except Exception as error:
            found.errors["leader"] = error
        leader.hang_up()
        thread.join(PATIENCE)
        found.sent = {**follower.sent, **leader.sent}
        if train and not found.errors:
            found.shares = moved, new[0]
            if keep:
                self.leader, self.follower = found.shares
        return found
