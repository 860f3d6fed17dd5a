"""How long a step may wait for a peer that is alive."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

from efl._steps.scope import Scope
from efl.errors import DeadlineError


class Deadlines:
    """A thread that looks at the waiting steps from time to time.

    Args:
      role: This party's role.
      peer_role: The peer's.
      timeout: Seconds that a step may wait for a message.
      scan_interval: Seconds between two looks.
      scopes: The scopes whose steps may be late; none while the connection is lost.
      fail: Ends the run.
    """

    def __init__(
        self,
        role: str,
        peer_role: str,
        timeout: float,
        scan_interval: float,
        scopes: Callable[[], Iterable[Scope]],
        fail: Callable[[DeadlineError], None],
    ) -> None:
        self._role, self._peer_role, self._timeout, self._scopes, self._fail = role, peer_role, timeout, scopes, fail
        self._interval = min(scan_interval, timeout / 2)

    def watch(self, over: threading.Event) -> None:
        """Starts looking, until ``over`` or the first step that is late."""
        threading.Thread(target=self._watch, args=[over], name="efl-deadlines", daemon=True).start()

    def _watch(self, over: threading.Event) -> None:
        seen = time.monotonic()
        while not over.wait(self._interval):
            now = time.monotonic()
            slept, seen = now - seen - self._interval, now
            for scope in self._scopes():
                if slept > 1.0:
                    scope.idle_since += slept  # this process was stopped: nobody knows what the peer did meanwhile
                error = self._late(scope)
                if error is not None:
                    self._fail(error)
                    return

    def _late(self, scope: Scope) -> DeadlineError | None:
        waited, step, missing = time.monotonic() - scope.idle_since, scope.running, scope.missing()
        if step is None or not missing or waited <= self._timeout:
            return None
        return DeadlineError(
            f"{self._role} waited {waited:.1f} s at step {step} of {scope.wire} for {', '.join(missing)} from "
            f"{self._peer_role}, which is alive; raise default_timeout_milliseconds if its steps may take that long"
        )
