"""Runs the parties of a federation as real processes, without paying TensorFlow's import for each of them.

    result = run_parties({"leader": LEADER, "follower": FOLLOWER}, args=["--seed=1"], cwd=tmp_path)
    assert result["leader"].returncode == 0, result["leader"].output

Every party runs as ``python script.py`` would run it: as ``__main__``, in its own process, working folder and process
group, with its own exit code and its output in a file. Only the start differs: it is forked from a process of this
test session that has imported TensorFlow and efl and done nothing else with them. What must be seen from a fresh
interpreter (the order of imports, variables that are read when TensorFlow is imported) needs ``subprocess``.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from efl._ports import free_port

_ROOT = Path(__file__).resolve().parent.parent
_SERVER = _ROOT / "tests" / "_fork_server.py"


@dataclass(frozen=True)
class PartyResult:
    """How a party ended.

    Attributes:
      returncode: Its exit code; negative where a signal ended it, as with ``subprocess``.
      output: What it wrote to stdout and stderr.
    """

    returncode: int
    output: str


class PartiesTimeout(AssertionError):
    """A party did not end in time; the message holds what every party wrote."""


class Party:
    """One running (or ended) party. Made by :func:`start_party`.

    Attributes:
      role: The role it was started with.
      pid: Its process id, also the id of its process group.
    """

    def __init__(self, role: str, pid: int, output_file: Path, ended: threading.Event, codes: dict[int, int]) -> None:
        self.role = role
        self.pid = pid
        self._output_file = output_file
        self._ended = ended
        self._codes = codes

    @property
    def output(self) -> str:
        """What it has written so far."""
        return self._output_file.read_text(errors="replace")

    @property
    def returncode(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._codes[self.pid] if self._ended.is_set() else None

    def wait(self, timeout: float = 120) -> PartyResult:
        """Waits for its end.

        Raises:
          PartiesTimeout: It still runs after ``timeout`` seconds; it is killed.
        """
        if not self._ended.wait(timeout):
            self.kill()
            raise PartiesTimeout(f"{self.role} still ran after {timeout} s and was killed. It wrote:\n{self.output}")
        return PartyResult(self._codes[self.pid], self.output)

    def wait_for(self, text: str, timeout: float = 60) -> None:
        """Waits until ``text`` stands in its output.

        Raises:
          AssertionError: It ended, or ``timeout`` seconds passed, without writing it.
        """
        limit = time.monotonic() + timeout
        while text not in self.output:
            over = self._ended.is_set() and text not in self.output
            if over or time.monotonic() > limit:
                raise AssertionError(f"{self.role} did not write {text!r} but:\n{self.output}")
            time.sleep(0.02)

    def kill(self, signum: int = signal.SIGKILL) -> None:
        """Sends a signal to the party and everything it started; nothing happens if it has ended."""
        if not self._ended.is_set():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signum)
        if signum == signal.SIGKILL:
            self._ended.wait(10)


class _ForkServer:
    """The client's side of ``_fork_server.py``; thread-safe."""

    def __init__(self) -> None:
        path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [sys.executable, str(_SERVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "TF_CPP_MIN_LOG_LEVEL": "2"},
            # Ctrl-C in the terminal is for pytest; the server ends when this process does.
            start_new_session=True,
        )
        self._lock = threading.Lock()
        self._started = threading.Condition()
        self._pids: list[int] = []
        self._codes: dict[int, int] = {}
        self._ended: dict[int, threading.Event] = {}
        self._dead = False
        threading.Thread(target=self._read, daemon=True).start()
        atexit.register(self._close)

    def start(self, request: dict[str, object]) -> tuple[int, threading.Event, dict[int, int]]:
        assert self._process.stdin is not None
        with self._lock:  # one request at a time: the next pid that is reported is ours
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            with self._started:
                arrived = self._started.wait_for(lambda: self._pids or self._dead, timeout=120)
                if not arrived or not self._pids:
                    raise RuntimeError("the process that forks the parties does not answer; its errors are above")
                pid = self._pids.pop()
        return pid, self._ended[pid], self._codes

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            report = json.loads(line)
            with self._started:
                if "started" in report:
                    self._ended[report["started"]] = threading.Event()
                    self._pids.append(report["started"])
                    self._started.notify_all()
                else:
                    self._codes[report["ended"]] = report["returncode"]
                    self._ended[report["ended"]].set()
        with self._started:
            self._dead = True
            self._started.notify_all()

    def _close(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.wait(30)


_server: _ForkServer | None = None
_server_lock = threading.Lock()


def _fork_server() -> _ForkServer:
    global _server
    with _server_lock:
        if _server is None:
            _server = _ForkServer()
        return _server


def free_address() -> str:
    """A loopback address, ``127.0.0.1:port``, on which nobody listens at this moment."""
    return f"127.0.0.1:{free_port()}"


def start_party(
    role: str,
    script: str | Path,
    *,
    cwd: Path,
    address: str | None = None,
    args: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> Party:
    """Starts one party and returns while it runs.

    Args:
      role: Its role, given to the script as ``--federal_role``. ``""``: a script of one process, without role and
        address.
      script: The file to run, or (a ``str``) the text of a script, which may be indented.
      cwd: Its working folder.
      address: Where the leader listens and everybody else dials; None: an address that is free.
      args: Further arguments; they come after the role and the address and may override them.
      env: Environment variables, beside this process's own.

    Returns:
      The running party.
    """
    folder = Path(tempfile.mkdtemp(prefix=".party-", dir=cwd))
    if isinstance(script, str):
        file = folder / f"{role or 'script'}.py"
        file.write_text(textwrap.dedent(script))
    else:
        file = script.resolve()
    argv = [str(file)]
    if role:
        address_flag = "--local_addr" if role == "leader" else "--peer_addr"
        argv += [f"--federal_role={role}", f"{address_flag}={address or free_address()}"]
    output = folder / "output.txt"
    output.touch()
    request: dict[str, object] = {
        "argv": [*argv, *map(str, args)],
        "cwd": str(cwd),
        "env": dict(env or {}),
        "output": str(output),
    }
    pid, ended, codes = _fork_server().start(request)
    return Party(role or "script", pid, output, ended, codes)


def run_parties(
    scripts: Mapping[str, str | Path],
    *,
    args: Sequence[str] | Mapping[str, Sequence[str]] = (),
    cwd: Path,
    timeout: float = 120,
    env: Mapping[str, str] | None = None,
) -> dict[str, PartyResult]:
    """Runs all parties to their end.

    Args:
      scripts: Role to script: the file to run, or (a ``str``) the text of a script, which may be indented.
      args: Further arguments of every party, or a mapping of role to arguments.
      cwd: Their working folder.
      timeout: Seconds that all of them together may take.
      env: Environment variables, beside this process's own.

    Returns:
      Role to result.

    Raises:
      PartiesTimeout: Somebody still ran after ``timeout`` seconds; all were killed.
    """
    address = free_address()
    limit = time.monotonic() + timeout
    parties: list[Party] = []
    try:
        for role, script in scripts.items():
            own_args = args.get(role, ()) if isinstance(args, Mapping) else args
            parties.append(start_party(role, script, cwd=cwd, address=address, args=own_args, env=env))
        results = {}
        for party in parties:
            if not party._ended.wait(max(0.0, limit - time.monotonic())):
                running = [p.role for p in parties if p.returncode is None]
                written = "\n".join(f"---- {p.role} wrote:\n{p.output}" for p in parties)
                raise PartiesTimeout(f"{', '.join(running)} still ran after {timeout} s; all were killed\n{written}")
            results[party.role] = party.wait(0)
        return results
    finally:
        for party in parties:
            party.kill()
