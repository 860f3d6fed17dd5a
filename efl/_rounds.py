"""Rounds of messages inside one step, in a thread of their own: the graph hands over a job, and waits on a queue.

A layer whose value takes several messages to and fro cannot run in a kernel: it would hold a thread of TensorFlow's
pool while it waits for a peer that may wait for another kernel. Its thread is handed what the layer needs, talks to the
peer through the exchange, as the graph's own sends and receives do, and puts the results into inboxes. A job belongs to
one step; where the step fails or ends, its waiting receive ends, and what it still brings is dropped.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import tensorflow.compat.v1 as tf

from efl._graph import call_python, op_name
from efl._inbox import Inbox
from efl._task_scope import TaskScope
from efl.errors import EflError, ModelError

if TYPE_CHECKING:
    from efl.communicator import Communicator

_log = logging.getLogger("efl")
_LONG = 10.0  # seconds after which a job says, now and again, that it is at work; sooner where deadlines are short


class Stale(Exception):
    """The step of a job is over: nobody waits for it any more. Or it cannot be completed."""


@dataclass(frozen=True)
class Message:
    """What travels in a layer's rounds.

    Attributes:
      direction: ``"send"`` or ``"recv"``.
      dtype: Of the array.
      shape: Its static shape.
    """

    direction: Literal["send", "recv"]
    dtype: tf.DType
    shape: tuple[int | None, ...]


class _Messages:
    """What has come for a layer and was not taken; whoever waits for it is a job of ``epoch``.

    Attributes:
      epoch: Changes where steps are over.
      ended: Nothing more will come in this step.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._held: dict[str, deque[np.ndarray]] = {}
        self.epoch, self.ended = 0, False

    def put(self, name: str, array: np.ndarray) -> None:
        with self._changed:
            self._held.setdefault(name, deque()).append(array)
            self._changed.notify_all()

    def end(self) -> None:
        """Nothing more will come. What is here may be all that a job needs: the peer has said goodbye, say."""
        with self._changed:
            self.ended = True
            self._changed.notify_all()

    def drain(self) -> None:
        """Ends all jobs, and drops what they did not take."""
        with self._changed:
            self.epoch, self.ended = self.epoch + 1, False
            self._held.clear()
            self._changed.notify_all()

    def take(self, name: str, epoch: int) -> np.ndarray:
        with self._changed:
            self._changed.wait_for(lambda: self.epoch != epoch or self.ended or self._held.get(name))
            if self.epoch != epoch or not self._held.get(name):
                raise Stale
            return self._held[name].popleft()


class _Sink:
    """Of one message, as the exchange drives it."""

    def __init__(self, name: str, messages: _Messages, short: str) -> None:
        self.name, self._messages, self._short = name, messages, short

    def put(self, array: np.ndarray) -> None:
        self._messages.put(self._short, array)

    def abort(self) -> None:
        self._messages.end()

    def drain(self) -> None:
        self._messages.drain()


class Job:
    """One piece of work of one step: the channel of ``efl.protocol``."""

    def __init__(self, rounds: Rounds, step: int, epoch: int) -> None:
        self._rounds, self.step, self._epoch = rounds, step, epoch
        self._begun = self._told = time.monotonic()

    def send(self, name: str, array: np.ndarray) -> None:
        """Sends a message of the layer."""
        self.check()
        self._rounds.send(name, array, self.step)

    def recv(self, name: str) -> np.ndarray:
        """Waits for a message of the layer.

        Raises:
          Stale: The step is over.
        """
        array = self._rounds.messages.take(name, self._epoch)
        self._told = time.monotonic()  # it was the peer that took its time
        return array

    def check(self, part: float = 0.0) -> None:
        """Says now and again that this party is at work. Raises Stale where nothing can come of it."""
        if not self.is_wanted() or (self._rounds.messages.ended and self._rounds.is_lost):
            raise Stale
        now = time.monotonic()
        if now - self._told > min(_LONG, self._rounds.deadline / 3):
            self._told = now
            self._rounds.still_at_work(self, now - self._begun)

    def is_wanted(self) -> bool:
        """Whether its step still runs."""
        return self._rounds.messages.epoch == self._epoch


Work = Callable[[Job, Sequence[np.ndarray]], Sequence[np.ndarray]]


class Rounds:
    """The rounds of one layer in one task and mode.

    Args:
      communicator: To the peer.
      name: Of the layer; its messages are ``name/…``.
      scope: Task and mode.
      messages: By name.

    Raises:
      ModelError: A layer of that name is there in this scope.
    """

    def __init__(
        self, communicator: Communicator, name: str, scope: TaskScope, messages: Mapping[str, Message]
    ) -> None:
        self.name, self.scope = name, scope
        self.messages = _Messages()
        self._communicator, self._state = communicator, communicator.scope_state(scope)
        self._wires: dict[str, str] = {}
        for short, message in messages.items():
            shape = tf.TensorShape(message.shape)
            wire = communicator.declare_message(message.direction, f"{name}/{short}", scope, message.dtype, shape)
            if message.direction == "send":
                self._wires[short] = wire
            else:
                self._state.sinks.append(_Sink(wire, self.messages, short))
        self._jobs: queue.SimpleQueue[tuple[Job, Work, Sequence[np.ndarray], Sequence[Inbox]]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._last_seconds = 0.0

    def run(
        self, what: str, work: Work, inputs: Sequence[tf.Tensor], results: Sequence[tuple[tf.DType, tf.TensorShape]]
    ) -> list[tf.Tensor]:
        """Makes the ops that hand a job over and wait for its results, once in a step.

        Args:
          what: Name of the job within the layer.
          work: Computes the results of the values of ``inputs``, in the layer's thread.
          inputs: Tensors of the graph.
          results: dtype and static shape of each result.

        Returns:
          The results.
        """
        wire = f"{self.scope.wire}/{self.name}/{what}"
        inboxes: list[Inbox] = []

        def hand_over(*values: np.ndarray) -> None:
            step = self._state.running
            if step is None:
                raise ModelError(f"{wire} runs outside of the steps of a federation")
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name=f"efl-rounds-{self.name}", daemon=True)
                self._thread.start()
            self._jobs.put((Job(self, step, self.messages.epoch), work, [np.asarray(v) for v in values], inboxes))

        with tf.control_dependencies(self._communicator.before_sends(self.scope)):
            handed = call_python(hand_over, list(inputs), op_name("efl_rounds", wire))
        for number, (dtype, shape) in enumerate(results):
            inboxes.append(Inbox(f"{wire}/{number}", dtype, shape, [handed]))
        self._communicator.own_inboxes(self._state, inboxes)
        return [inbox.tensor for inbox in inboxes]

    def send(self, name: str, array: np.ndarray, step: int) -> None:
        """Sends a message of a job."""
        self._communicator.exchange.send(self._state, self._wires[name], np.asarray(array, order="C"), step)

    @property
    def deadline(self) -> float:
        """Seconds after which a party that hears nothing gives up."""
        return self._communicator.exchange.timeout

    @property
    def is_lost(self) -> bool:
        """Whether the run has failed."""
        return self._communicator.exchange.is_lost

    def still_at_work(self, job: Job, seconds: float) -> None:
        """Tells the log and the peer."""
        before = f" (the last one took {self._last_seconds:.0f} s)" if self._last_seconds else ""
        _log.info(
            "%s: layer %r has been computing for %.0f s in step %d of %s%s",
            self._communicator.federal_role, self.name, seconds, job.step, self.scope.wire, before,
        )  # fmt: skip
        self._communicator.exchange.busy(self._state, job.step)

    def _serve(self) -> None:
        while True:
            job, work, values, inboxes = self._jobs.get()
            begun = time.monotonic()
            try:
                results = work(job, values)
                job.check()
                self._communicator.exchange.give(self._state, list(zip(inboxes, results, strict=True)), job.is_wanted)
                self._last_seconds = time.monotonic() - begun
            except Stale:
                self._communicator.exchange.give_up(inboxes, job.is_wanted)
            except EflError as error:
                self._failed(job, error, inboxes)
            except Exception as error:  # of ours, or of a library: the run must end with it, not wait for ever
                _log.exception("layer %r failed in step %d of %s", self.name, job.step, self.scope.wire)
                failed = ModelError(f"layer {self.name!r} failed: {type(error).__name__}: {error}")
                self._failed(job, failed, inboxes)
            del job, work, values, inboxes

    def _failed(self, job: Job, error: EflError, inboxes: Sequence[Inbox]) -> None:
        if job.is_wanted():  # else this may be what came of the reason for which it is not
            self._communicator.exchange.fail(error)
            self._communicator.exchange.give_up(inboxes, job.is_wanted)
