"""Runs several programs side by side in one terminal, as one thing that succeeds, fails or is interrupted."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.text import Text

from efl.cli._transcript import Transcript
from efl.cli.noise import Noise

_COLOURS = ("cyan", "magenta", "green", "yellow", "blue")
_PATIENCE = 5.0  # seconds between asking, insisting (SIGTERM) and killing
# Seconds that a party has which waits for a first connection when the other has failed: that cannot come any more, but
# it may be about to say why there was none.
_VAIN = 2.0
_DRAIN = 1.0  # seconds that the rest of an ended program's output may take; its own children may hold the pipe open

# What a party's environment has where the user's says nothing else: TensorFlow's chatter and its advice to replace
# tf.layers, in a script that must use tf.layers, are no news.
_QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONWARNINGS": "ignore::UserWarning:__main__"}


@dataclass(frozen=True)
class Program:
    """What to run.

    Attributes:
      name: Stands before each of its lines.
      command: Program and arguments.
    """

    name: str
    command: Sequence[str]


class _Running:
    """One started program and the thread that reads its output. ``said`` has followed what was printed of it."""

    def __init__(
        self, program: Program, cwd: Path, environ: Mapping[str, str], lines: queue.Queue[tuple[str, str]]
    ) -> None:
        self.name = program.name
        self.said = Transcript()
        self.noise = Noise()
        self.process = subprocess.Popen(
            program.command,
            cwd=cwd,
            stdin=subprocess.DEVNULL,  # two programs cannot share one keyboard
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**environ, "PYTHONUNBUFFERED": "1"},  # lines appear when they are written
            start_new_session=True,  # Ctrl-C reaches us alone, and we decide what becomes of it
        )
        self.started = time.monotonic()
        self.ended: float | None = None
        self.stopped_by_us = False
        self._reader = threading.Thread(target=self._read, args=[lines], daemon=True)
        self._reader.start()

    def _read(self, lines: queue.Queue[tuple[str, str]]) -> None:
        assert self.process.stdout is not None
        with contextlib.suppress(ValueError):  # closed while a child of the program still holds the other end
            for line in self.process.stdout:
                lines.put((self.name, line.rstrip("\n")))

    @property
    def is_running(self) -> bool:
        if self.ended is None and self.process.poll() is not None:
            self.ended = time.monotonic()
        return self.ended is None

    @property
    def is_read(self) -> bool:
        """True when nothing more is to be expected of its output."""
        late = self.ended is not None and time.monotonic() - self.ended > _DRAIN
        return not self.is_running and (late or not self._reader.is_alive())

    @property
    def exit_code(self) -> int:
        """As a shell counts: 128 and the signal's number for a program that a signal ended."""
        code = self.process.returncode
        return 128 - code if code < 0 else code

    def signal(self, signum: int) -> None:
        """Signals the program and everything it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signum)


class Launcher:
    """Runs programs until all have ended, or one has failed and the others have been given time to end.

    Args:
      programs: What to run, at the same time.
      cwd: Folder in which they run.
      grace: Seconds that the others have to end by themselves after one has failed.
      verbose: Leave the programs' environment and lines as they are. Otherwise TensorFlow's log level and Python's
        warnings are turned down, unless the user's environment sets them, and TensorFlow's notes on the machine and on
        its version 1 API are dropped.
      console: Where their lines go; plain where it is no terminal.
    """

    def __init__(
        self,
        programs: Sequence[Program],
        *,
        cwd: Path,
        grace: float = 10.0,
        verbose: bool = False,
        console: Console | None = None,
    ) -> None:
        self._programs = programs
        self._cwd = cwd
        self._grace = grace
        self._verbose = verbose
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._lines: queue.Queue[tuple[str, str]] = queue.Queue()
        self._colours = dict(zip((program.name for program in programs), _COLOURS * len(programs)))
        self._width = max(len(program.name) for program in programs)
        self._interrupts: list[int] = []

    def run(self) -> int:
        """Runs the programs.

        Returns:
          0 where all succeeded; otherwise the highest exit code among those that failed of themselves, or 128 and
          the signal's number where this process was interrupted.
        """
        environ = {**({} if self._verbose else _QUIET), **os.environ}
        with self._signals_noted():
            running: list[_Running] = []
            try:
                for program in self._programs:
                    running.append(_Running(program, self._cwd, environ, self._lines))
                self._watch(running)
            finally:
                for party in running:
                    # Also where the program itself has ended: what it started may have missed the gentler signals.
                    party.signal(signal.SIGKILL)
        self._summarize(running)
        return self._exit_code(running)

    def _watch(self, running: Sequence[_Running]) -> None:
        reported: set[str] = set()
        vain_until: float | None = None  # after a failure: when those that wait for a first connection are stopped
        stop_at: float | None = None  # when to take the next step against those that still run
        steps: Iterator[int] = iter(())
        seen_interrupts = 0
        while True:
            self._print_lines(running)
            for party in running:
                if party.is_read and party.name not in reported:
                    self._print_lines(running)
                    reported.add(party.name)
                    if party.exit_code and stop_at is None:
                        self._announce(party, [other for other in running if other.is_running])
                        stop_at, steps = time.monotonic() + self._grace, iter((signal.SIGTERM, signal.SIGKILL))
                        vain_until = time.monotonic() + min(_VAIN, self._grace)
            if len(reported) == len(running):
                return
            if len(self._interrupts) > seen_interrupts:
                if not seen_interrupts:
                    steps = iter((self._interrupts[0], signal.SIGTERM, signal.SIGKILL))
                seen_interrupts = len(self._interrupts)
                vain_until = None
                stop_at = time.monotonic()  # a second Ctrl-C does not wait for the patience of the first
            if vain_until is not None and all(party.said.waits_for for party in running if party.is_running):
                stop_at = vain_until
            if stop_at is not None and time.monotonic() >= stop_at:
                vain_until = None
                signum = next(steps, signal.SIGKILL)
                for party in running:
                    if party.is_running:
                        party.stopped_by_us = True
                        party.signal(signum)
                stop_at = time.monotonic() + _PATIENCE

    def _print_lines(self, running: Sequence[_Running]) -> None:
        """Prints what has been read; waits a moment for a first line."""
        parties = {party.name: party for party in running}
        with contextlib.suppress(queue.Empty):
            name, line = self._lines.get(timeout=0.05)
            while True:
                if self._verbose or not parties[name].noise.is_noise(line):
                    self._print(name, line)
                    parties[name].said.add(line)
                name, line = self._lines.get_nowait()

    def _print(self, name: str, line: str) -> None:
        prefix = f"{name:<{self._width}} | ", self._colours.get(name, "bold")
        with contextlib.suppress(OSError):  # the terminal may be gone: the parties are to end all the same
            self._console.print(Text.assemble(prefix, line))

    def _announce(self, party: _Running, others: Sequence[_Running]) -> None:
        """Says at once that a party has failed, and what becomes of the others."""
        if others:
            verb, grace = "has" if len(others) == 1 else "have", f"{self._grace:g} s to end (--grace)"
            if all(other.said.waits_for for other in others):
                verb, grace = "waits" if len(others) == 1 else "wait", "for it in vain and will be stopped"
            left = f"the {' and the '.join(other.name for other in others)} {verb} {grace}"
            self._print("efl", f"{party.name} failed (exit code {party.exit_code}); {left}")

    def _summarize(self, running: Sequence[_Running]) -> None:
        """Says last, in the order of their ends, how the parties that did not succeed have ended."""
        for party in sorted(running, key=lambda party: party.ended or 0.0):
            seconds = (party.ended or 0.0) - party.started
            if party.stopped_by_us:
                vain = f" of waiting for the {party.said.waits_for}" if party.said.waits_for else ""
                self._print("efl", f"{party.name} was stopped after {seconds:.1f} s{vain}")
            elif party.exit_code:
                first, *more = party.said.last_words() or [""]
                why = f": {first}" if first else ""
                self._print("efl", f"{party.name} failed after {seconds:.1f} s (exit code {party.exit_code}){why}")
                for line in more:
                    self._print("efl", f"  {line}")

    def _exit_code(self, running: Sequence[_Running]) -> int:
        if self._interrupts:
            return 128 + self._interrupts[0]
        own = [party.exit_code for party in running if not party.stopped_by_us]
        return max(own, default=1)

    @contextlib.contextmanager
    def _signals_noted(self) -> Iterator[None]:
        def note(signum: int, frame: FrameType | None) -> None:
            # A terminal that is closed asks the parties to save and go; it cannot be written to any more.
            self._interrupts.append(signal.SIGTERM if signum == signal.SIGHUP else signum)

        noted = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup has it
            noted.append(signal.SIGHUP)
        previous = {number: signal.signal(number, note) for number in noted}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
