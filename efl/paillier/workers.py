"""A pool of worker processes under one public key.

Each worker has a thread here that hands it one request at a time, and reads the answer. Requests wait in two queues:
what somebody waits for goes before masks that are made ahead.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import gmpy2
import numpy as np
from gmpy2 import mpz

from efl.errors import EflError
from efl.paillier import frames, residues
from efl.paillier.public_key import PublicKey
from efl.paillier.worker import key_frame

_log = logging.getLogger("efl")
_ATTEMPTS = 2  # of a request: the worker that had it died, once
_LOSSES = 3  # workers that a place in the pool may lose before it answers anything
_AHEAD_PIECE = 32  # masks that are made ahead at a time: what somebody waits for waits no longer than for these
_AHEAD_BYTES = 64 << 20
# Before anything else: what an import prints must not come between frames.
_BEGIN = (
    "import os,sys;i,o=os.dup(0),os.dup(1);os.dup2(2,1);os.dup2(os.open(os.devnull,os.O_RDONLY),0);"
    "sys.path+=sys.argv[2:];from efl.paillier.worker import main;main(i,o,int(sys.argv[1]))"
)

Arrays = list[np.ndarray]


class WorkerError(EflError):
    """Worker processes die, or cannot be started."""


class _Request:
    def __init__(self, header: Mapping[str, Any], arrays: Sequence[np.ndarray]) -> None:
        self.header, self.arrays, self.attempts = header, arrays, 0
        self.future: Future[Arrays] = Future()


class _Process:
    """One running worker."""

    def __init__(self, public: PublicKey) -> None:
        import efl

        # -I -S: neither the working folder, nor the environment, nor what is installed decides what it imports, but the
        # standard library and, after it, the folders from which this program has these.
        where = [str(Path(module.__file__ or "").resolve().parents[1]) for module in (efl, np, gmpy2)]
        self._popen = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _BEGIN, str(os.getpid()), *dict.fromkeys(where)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd="/",
            start_new_session=True,  # Ctrl-C is for the program
        )
        assert self._popen.stdin is not None and self._popen.stdout is not None
        self._requests, self._answers = self._popen.stdin.fileno(), self._popen.stdout.fileno()
        try:
            frames.write(self._requests, *key_frame(public))
        except OSError:
            raise OSError(self.end()) from None

    def ask(self, request: _Request) -> tuple[dict[str, Any], Arrays]:
        frames.write(self._requests, request.header, request.arrays)
        return frames.read(self._answers)

    def kill(self) -> None:
        """Ends it while another thread waits for its answer, which then gets none."""
        self._popen.kill()

    def end(self) -> str:
        """Ends it; says how it ended."""
        for stream in (self._popen.stdin, self._popen.stdout):
            with contextlib.suppress(OSError):
                assert stream is not None
                stream.close()
        self._popen.kill()
        code = self._popen.wait()
        return f"signal {-code}" if code < 0 else f"exit code {code}"

    @property
    def is_gone(self) -> bool:
        return self._popen.poll() is not None


class Pool:
    """Worker processes under one public key. Thread-safe.

    Args:
      public: The key.
      count: How many workers, at least 1.
    """

    def __init__(self, public: PublicKey, count: int) -> None:
        self.public, self.count, self.users = public, count, 0
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._waiting: deque[_Request] = deque()
        self._ahead: deque[int] = deque()  # bits of masks to be made, a piece each
        self._ready: dict[int, list[mpz]] = {}
        self._target: dict[int, int] = {}
        self._reached: set[int] = set()  # targets that were, since they were set
        self._closed = False
        self._serving, self._dead = count, ""
        self._processes: set[_Process] = set()
        self._threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    @property
    def is_here(self) -> bool:
        """False in a process that was forked from the one that made the pool: threads and ready masks are not its."""
        return os.getpid() == self._pid

    def submit(self, header: Mapping[str, Any], arrays: Sequence[np.ndarray]) -> Future[Arrays]:
        """Asks for something, see ``worker.compute``. A future that is cancelled before its turn is not computed."""
        request = _Request(header, arrays)
        with self._changed:
            if self._closed:
                raise WorkerError(_CLOSED)
            if not self._serving:
                raise WorkerError(self._dead)
            self._waiting.append(request)
            self._changed.notify()
        return request.future

    def take_masks(self, count: int, bits: int) -> list[mpz]:
        """Up to ``count`` masks that are ready. Each is given out once: two ciphertexts under one mask tell their
        difference. What was missing is made ahead next time, if there was time for all that was to be made so far."""
        with self._changed:
            ready = self._ready.setdefault(bits, [])
            if self._missing(bits) < _AHEAD_PIECE:
                self._reached.add(bits)
            taken = [ready.pop() for _ in range(min(count, len(ready)))]
            if len(taken) < count and bits in self._reached:
                # Where workers never rest, more to be made ahead would only heap up.
                most = _AHEAD_BYTES // residues.width_of(int(self.public.square)) // len(self._ready)
                self._target[bits] = min(most, self._target.get(bits, 0) + count - len(taken))
                self._reached.discard(bits)
            self._plan()
        return taken

    def close(self) -> None:
        """Ends the workers, and what they are computing."""
        with self._changed:
            self._closed = True
            waiting, processes = list(self._waiting), list(self._processes)
            self._waiting.clear()
            self._ready.clear()
            self._changed.notify_all()
        for process in processes:
            process.kill()
        for request in waiting:
            _fail(request, _CLOSED)

    def _missing(self, bits: int) -> int:
        return self._target.get(bits, 0) - len(self._ready[bits])

    def _plan(self) -> None:
        """Orders what is missing to have as many masks ready as a step takes."""
        self._ahead.clear()
        for bits in self._target:
            self._ahead.extend([bits] * (self._missing(bits) // _AHEAD_PIECE))
        self._changed.notify_all()

    # ---- the threads

    def _serve(self) -> None:
        process: _Process | None = None
        losses = 0
        while True:
            request, bits = self._next()
            if request is None and bits is None:
                break
            asked = request or _Request({"op": "masks", "count": _AHEAD_PIECE, "bits": bits}, [])
            try:
                if process is None or process.is_gone:
                    self._end(process)
                    process = self._start()
                header, arrays = process.ask(asked)
                losses = 0
            except Exception as error:  # whatever it is, somebody waits for the request
                how = f"{type(error).__name__}: {error}" if process is None else self._end(process)
                process, losses = None, losses + 1
                if self._lost(request, how, losses):
                    return
                continue
            if "error" in header:
                asked.future.set_exception(WorkerError(f"a worker process failed: {header['error']:.500}"))
            elif request is not None:
                request.future.set_result(arrays)
            elif bits is not None:
                with self._changed:
                    if not self._closed:
                        self._ready.setdefault(bits, []).extend(residues.from_rows(arrays[0]))
        self._end(process)

    def _start(self) -> _Process:
        process = _Process(self.public)
        with self._changed:
            self._processes.add(process)
            if self._closed:  # meanwhile, by somebody who did not see it
                process.kill()
        return process

    def _end(self, process: _Process | None) -> str:
        if process is None:
            return ""
        with self._changed:
            self._processes.discard(process)
        return process.end()

    def _next(self) -> tuple[_Request | None, int | None]:
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._closed or self._waiting or self._ahead)
                if self._closed:
                    return None, None
                if self._waiting:
                    request = self._waiting.popleft()
                    if request.future.running() or request.future.set_running_or_notify_cancel():
                        return request, None
                else:
                    return None, self._ahead.popleft()

    def _lost(self, request: _Request | None, how: str, losses: int) -> bool:
        """A worker has died. Returns whether its place in the pool is given up."""
        with self._changed:
            if self._closed:
                if request is not None:
                    _fail(request, _CLOSED)
                return True
            given_up = losses >= _LOSSES
            what_now = "it was the last of several" if given_up else "another takes its place"
            _log.warning("a worker process of encryption has died (%s); %s", how, what_now)
            again = request is not None and request.attempts + 1 < _ATTEMPTS
            if again:
                assert request is not None
                request.attempts += 1
                self._waiting.appendleft(request)
            failed = []
            if given_up:
                self._serving -= 1
                if not self._serving:
                    self._dead = f"{_DEAD} (the last one: {how})"
                    failed = list(self._waiting)
                    self._waiting.clear()
            self._changed.notify_all()
        if request is not None and not again:
            request.future.set_exception(WorkerError(f"{_TWICE} ({how})"))
        for each in failed:
            _fail(each, self._dead)
        return given_up


def _fail(request: _Request, why: str) -> None:
    """Ends a request that no worker has, or has any more."""
    if request.future.running() or request.future.set_running_or_notify_cancel():
        request.future.set_exception(WorkerError(why))


_CLOSED = (
    "the worker processes of encryption were closed while they were computing: the program ends, or an engine that "
    "was in use was closed"
)
_TWICE = (
    "the worker process that computed a part of an encrypted step died, and so did the one that was given it next: "
    "is the memory enough? EFL_PAILLIER_WORKERS=0 computes in the program itself"
)
_DEAD = (
    "the worker processes of encryption die as soon as they are started: see what they wrote to stderr. "
    "EFL_PAILLIER_WORKERS=0 computes in the program itself"
)

_pools: dict[tuple[PublicKey, int], Pool] = {}
_guard = threading.Lock()


def acquire(public: PublicKey, count: int) -> Pool:
    """The pool of a key, made on first use and shared by all who ask; ``release`` it."""
    with _guard:
        pool = _pools.get((public, count))
        if pool is None or not pool.is_here:
            pool = _pools[public, count] = Pool(public, count)
        pool.users += 1
        return pool


def release(pool: Pool) -> None:
    """Gives a pool back; the last one ends its workers."""
    with _guard:
        pool.users -= 1
        if pool.users <= 0 and pool.is_here:
            pool.close()
            _pools.pop((pool.public, pool.count), None)


def _close_all() -> None:
    with _guard:
        pools = [pool for pool in _pools.values() if pool.is_here]
        _pools.clear()
    for pool in pools:
        pool.close()
        for thread in pool._threads:
            thread.join(2.0)


def _after_fork() -> None:
    global _guard
    _guard = threading.Lock()  # whoever held it is not here
    _pools.clear()


atexit.register(_close_all)
os.register_at_fork(after_in_child=_after_fork)
