"""The process from which ``tests/parties.py`` forks parties: imports TensorFlow and efl once, then waits for requests.

Requests are lines of JSON on stdin (``argv``, ``cwd``, ``env``, ``output``), answers lines of JSON on stdout:
``{"started": pid}`` and later ``{"ended": pid, "returncode": code}``. The end of stdin ends everything.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import random
import select
import signal
import sys
import traceback
import types

# What a party would import anyway. Each is optional: a missing module is the party's own error to report.
_PRELOAD = (
    "efl",
    "tensorflow",
    "tensorflow.compat.v1",
    "tf_keras",
    "grpc",
    "xxhash",
    "rich.progress",
    "efl.communicator",
    "efl.model",
    "efl.federal_model",
    "efl.sample",
    "efl.federal_sample",
    "efl.data",
    "efl.stage",
    "efl.hooks",
    "efl.metrics",
    "efl.procedure_fn",
    "efl.optimizer_fn",
)


def _serve() -> dict | None:
    """Forks a child per request; returns the request in the child, None in the server when stdin ends."""
    requests, answers = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(2, 1)
    wake_read, wake_write = os.pipe()
    for fd in (wake_read, wake_write):
        os.set_blocking(fd, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_write)
    running: set[int] = set()
    buffer = b""

    def answer(report: dict) -> None:
        os.write(answers, json.dumps(report).encode() + b"\n")

    while True:
        ready, _, _ = select.select([requests, wake_read], [], [])
        if wake_read in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(wake_read, 4096)
            for pid in list(running):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    running.discard(pid)
                    answer({"ended": pid, "returncode": os.waitstatus_to_exitcode(status)})
        if requests not in ready:
            continue
        chunk = os.read(requests, 65536)
        if not chunk:
            for pid in running:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
            return None
        *lines, buffer = (buffer + chunk).split(b"\n")
        for line in lines:
            pid = os.fork()
            if pid == 0:
                os.setpgid(0, 0)
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for fd in (requests, answers, wake_read, wake_write, null):
                    os.close(fd)
                return json.loads(line)
            with contextlib.suppress(OSError):  # in both processes, so that it holds whoever comes first
                os.setpgid(pid, pid)
            running.add(pid)
            answer({"started": pid})


def _become(request: dict) -> types.ModuleType:
    """Makes this forked process look like one that was started with the request's command line."""
    output = os.open(request["output"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a killed party's lines are not lost
    os.chdir(request["cwd"])
    os.environ.update(request["env"])
    sys.argv = request["argv"]
    sys.path[0] = os.path.dirname(sys.argv[0])
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()  # otherwise all parties would draw the same numbers
    main = types.ModuleType("__main__")
    main.__file__ = sys.argv[0]
    main.__builtins__ = __builtins__  # type: ignore[attr-defined]  # as in a script
    sys.modules["__main__"] = main
    return main


def _run(request: dict) -> None:
    """Runs the script; leaves as the interpreter itself would, atexit functions and threads included."""
    main = _become(request)
    try:
        with open(sys.argv[0], "rb") as file:
            code = compile(file.read(), sys.argv[0], "exec")
        exec(code, main.__dict__)
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:
        # Without this function's own frame, as the user would see it.
        error = error.with_traceback(error.__traceback__ and error.__traceback__.tb_next)
        sys.last_type, sys.last_value, sys.last_traceback = type(error), error, error.__traceback__
        sys.excepthook(type(error), error, error.__traceback__)
        sys.exit(1)


if __name__ == "__main__":
    for _name in _PRELOAD:
        try:
            importlib.import_module(_name)
        except ModuleNotFoundError:
            pass
        except Exception:
            traceback.print_exc()
    # The collector need not look at TensorFlow's objects again, nor copy their pages, in every party.
    gc.collect()
    gc.freeze()
    _request = _serve()
    if _request is not None:
        _run(_request)
