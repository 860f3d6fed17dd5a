"""What happens when the parties' sample ids differ: both find out in which row, say so, and stop."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from efl._steps.sample_ids import Batch
from efl._steps.scope import Scope
from efl.errors import EflError, LinkError, ProtocolError, SampleMismatch

PATIENCE = 5.0  # seconds to wait for the peer's row digests after a mismatch


class Disputed(EflError):
    """Aborts a step whose sample ids differ, while the parties find out where. Never reaches the user."""


class Disputes:
    """Compares the batches' ids and settles differences.

    Args:
      role: This party's role.
      peer_role: The peer's.
      lock: Guards the scopes.
      tell: Sends row digests to the peer.
      fail: Ends the run.
    """

    def __init__(
        self,
        role: str,
        peer_role: str,
        lock: threading.RLock,
        tell: Callable[[dict[str, Any]], None],
        fail: Callable[[EflError], None],
    ) -> None:
        self._role, self._peer_role, self._lock, self._tell, self._fail = role, peer_role, lock, tell, fail
        self.key = b""

    def note(self, scope: Scope, batch: Batch) -> None:
        """Takes the sample ids of the running step's batch. Called inside a kernel, before anything of the step.

        Raises:
          Disputed: The peer's ids of this step are here already, and differ.
          LinkError: No step is running.
        """
        digest = batch.digest(self.key)
        with self._lock:
            step = scope.running
            if step is None:
                raise LinkError(f"{self._role}: sample ids of {scope.wire} outside a step of a running federation")
            scope.ids.note(step, batch, digest)
            agreed = scope.ids.agrees(step)
        if not agreed:
            self.open(scope, step)
            raise Disputed(f"sample ids differ at step {step} of {scope.wire}")

    def open(self, scope: Scope, step: int) -> None:
        """The digests of a step differ: asks the peer for its rows."""
        with self._lock:
            if scope.ids.disputed is not None:
                return
            scope.ids.disputed = step
            body = scope.ids.rows(step, self.key) or {}
        self._tell({**body, "scope": scope.wire, "step": step})
        silent = SampleMismatch(f"{self._differ(scope, step)}; {self._peer_role} did not say which rows it has")
        timer = threading.Timer(PATIENCE, self._fail, [silent])
        timer.daemon = True
        timer.start()

    def on_rows(self, scope: Scope, step: int, body: Mapping[str, Any]) -> None:
        """The peer's row digests have come: names the first difference and ends the run."""
        with self._lock:
            answer = scope.ids.rows(step, self.key)
            told, scope.ids.disputed = scope.ids.disputed is not None, step
            try:
                where = scope.ids.verdict(step, self.key, body, self._role, self._peer_role)
            except (KeyError, TypeError, ValueError):
                where = None
        if answer is None or where is None:
            self._fail(
                ProtocolError(f"{self._peer_role} sent row digests that cannot be for step {step} of {scope.wire}")
            )
            return
        if not told:
            self._tell({**answer, "scope": scope.wire, "step": step})
        self._fail(
            SampleMismatch(
                f"{self._differ(scope, step)}: {where}. Both parties must read the same rows in the same order: "
                "compare what both sides read there"
            )
        )

    def _differ(self, scope: Scope, step: int) -> str:
        return f"sample ids of {self._role} and {self._peer_role} differ at step {step} of {scope.wire}"
