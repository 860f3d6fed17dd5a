"""Worker processes: the same results as here, whatever happens to them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Iterator
from pathlib import Path

import gmpy2
import numpy as np
import pytest
from gmpy2 import mpz

import efl
from efl.errors import ConfigError
from efl.paillier import workers
from efl.paillier.engine import Engine, _split, default_workers
from tests.paillier.keypairs import key

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine(key().public, workers=2)
    yield made
    made.close()
    assert not workers._pools


def children() -> list[int]:
    """Processes of this one that are workers."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                if parent == os.getpid() and b"efl.paillier.worker" in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except (OSError, IndexError):
                continue
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def elements(count: int, seed: int = 0) -> list[mpz]:
    rng = np.random.default_rng(seed)
    n, square = key().public.n, key().public.square
    return [mpz(int.from_bytes(rng.bytes(600), "little")) % square * n // n for _ in range(count)]


def values(rows: list[list]) -> list[list[mpz]]:  # type: ignore[type-arg]
    """What products encrypt; their masks are others each time."""
    n, square = key().public.n, key().public.square
    return [key().decrypt_residues([product.finished(n, square) for product in row]) for row in rows]


@pytest.mark.parametrize(
    ("groups", "bases", "outputs", "bits"), [(1, 1, 1, 1), (3, 11, 4, 14), (2, 7, 9, 62), (5, 3, 2, 64)]
)
def test_products_are_those_of_one_process(engine: Engine, groups: int, bases: int, outputs: int, bits: int) -> None:
    rng = np.random.default_rng(bases)
    exponents = rng.integers(0, 1 << bits, (bases, outputs), dtype=np.uint64, endpoint=False)
    held = [elements(bases, g) for g in range(groups)]
    n = int(key().public.n)
    plain = [[int(each) for each in key().decrypt_residues(row)] for row in held]
    expected = [[sum(m * int(e) for m, e in zip(row, column)) % n for column in exponents.T] for row in plain]
    assert values(engine.matmul(held, exponents, bits)) == expected
    assert values(Engine(key().public, workers=0).matmul(held, exponents, bits)) == expected


def test_powers_and_packed_powers(engine: Engine) -> None:
    rng = np.random.default_rng(1)
    held, square = elements(9), int(key().public.square)
    exponents = rng.integers(0, 1 << 63, 9, dtype=np.uint64)
    assert engine.powers(held, exponents.tolist()) == [pow(int(b), int(e), square) for b, e in zip(held, exponents)]
    digits = rng.integers(0, 1 << 14, (9, 5, 2), dtype=np.uint64)
    packed = [[sum(int(d) << 40 * s for s, d in enumerate(each[:, g])) for g in range(2)] for each in digits]
    expected = [key().decrypt_residues([mpz(pow(int(b), e, square)) for e in row]) for b, row in zip(held, packed)]
    assert values(engine.spread(held, digits, 14, 40)) == expected
    assert values(Engine(key().public, workers=0).spread(held, digits, 14, 40)) == expected


def test_masks_are_encryptions_of_nothing_and_none_comes_twice(engine: Engine) -> None:
    found: list[mpz] = []
    for _ in range(4):  # the later ones take what was made ahead
        found += engine.masks(100, 1136)
        time.sleep(0.3)
    pool = workers.acquire(key().public, 2)
    assert any(pool._ready.values())
    workers.release(pool)
    assert len(set(found)) == len(found) == 400
    assert set(key().decrypt_residues(found[::40])) == {0}


def test_masks_made_ahead_do_not_grow_without_end(engine: Engine) -> None:
    for _ in range(3):
        engine.masks(64, 1024)
        pool = next(iter(workers._pools.values()))
        deadline = time.monotonic() + 20
        while pool._ahead and time.monotonic() < deadline:
            time.sleep(0.05)
    assert len(pool._ready[1024]) <= 64 + 2 * workers._AHEAD_PIECE


def test_where_workers_never_rest_no_more_masks_are_to_be_made_ahead(engine: Engine) -> None:
    for _ in range(6):
        engine.masks(200, 1024)
    (pool,) = workers._pools.values()
    assert 200 <= pool._target[1024] <= 200 + workers._AHEAD_PIECE


def test_masks_of_several_calls_in_a_step_are_made_ahead_after_some_steps(engine: Engine) -> None:
    engine.start()
    (pool,) = workers._pools.values()
    for _ in range(3):
        for _ in range(3):
            engine.masks(64, 1024)
        deadline = time.monotonic() + 20
        while pool._missing(1024) >= workers._AHEAD_PIECE and time.monotonic() < deadline:
            time.sleep(0.05)
    # Less than the step's where some were made during the step.
    assert 64 < pool._target[1024] <= 3 * 64 and len(pool._ready[1024]) > 64


def test_work_is_cut_into_equal_parts_and_all_of_it() -> None:
    for groups, bases, outputs, bits, count in [(5, 128, 128, 62, 2), (1, 5, 3, 14, 4), (3, 1000, 4000, 62, 3)]:
        parts = _split(groups, bases, outputs, bits, count)
        done = np.zeros((groups, bases, outputs), int)
        for g, rows, columns in parts:
            done[g, rows, columns] += 1
        assert (done == 1).all()
    assert len(_split(5, 128, 128, 62, 2)) == 6


def test_pieces_of_a_longer_key_are_smaller() -> None:
    parts = [_split(1, 128, 512, 62, 1, most) for most in (2.0, 2.0 / 4)]
    assert 3 * len(parts[0]) <= len(parts[1])
    sizes: list[int] = []

    class Longer:  # of 4096 bits, which take long to find
        bits, square = 4096, mpz(1)

    engine = Engine(Longer(), lambda part: sizes.append(1), workers=0)  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("efl.paillier.engine.kernels.products", lambda public, bases, e, bits: [None] * e.shape[1])
        engine.matmul([[mpz(1)] * 128], np.zeros((128, 512), np.uint64), 62)
    assert len(sizes) == len(parts[1])


def test_a_worker_that_dies_costs_its_piece_only(engine: Engine) -> None:
    engine.masks(1, 1024)
    stop, found = threading.Event(), []

    def kill() -> None:
        while not stop.wait(0.4):
            for pid in children()[:1]:
                os.kill(pid, signal.SIGKILL)
                found.append(pid)
            if found:
                return

    thread = threading.Thread(target=kill)
    thread.start()
    rng = np.random.default_rng(2)
    exponents = rng.integers(0, 1 << 62, (40, 60), dtype=np.uint64)
    held = [elements(40, g) for g in range(8)]
    result = values(engine.matmul(held, exponents, 62))
    stop.set()
    thread.join()
    assert found
    assert result == values(Engine(key().public, workers=0).matmul(held, exponents, 62))


def test_workers_that_always_die_are_an_error(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_BEGIN", "import sys; sys.exit(7)")
    with pytest.raises(workers.WorkerError, match=r"EFL_PAILLIER_WORKERS=0") as caught:
        engine.masks(1, 1024)
    assert "exit code 7" in str(caught.value)
    while "as soon as they are started" not in str(caught.value):  # the pool gives up
        with pytest.raises(workers.WorkerError, match=r"EFL_PAILLIER_WORKERS=0.*exit code 7") as caught:
            engine.masks(1, 1024)


def test_a_call_ends_where_another_thread_closes_the_workers(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("efl.paillier.engine._PIECE_SECONDS", 1000.0)  # both workers are at work, and nothing waits
    engine.masks(1, 1024)
    raised: list[BaseException] = []

    def call() -> None:
        try:
            engine.matmul([elements(60)], np.full((60, 2000), (1 << 62) - 1, np.uint64), 62)
        except workers.WorkerError as error:
            raised.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    time.sleep(0.3)
    engine.close()
    thread.join(3)
    assert not thread.is_alive() and "closed while they were computing" in str(raised[0])


def test_signals_for_the_program_do_not_end_a_worker(engine: Engine) -> None:
    engine.masks(64, 1024)
    pids = children()
    for pid in pids:
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
    time.sleep(0.3)
    assert pids and all(map(is_alive, pids)) and os.getpgid(pids[0]) != os.getpgid(0)
    assert len(engine.masks(100, 1024)) == 100 and set(pids) <= set(children())


def test_what_progress_raises_ends_a_call_and_the_pool_goes_on(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    class Enough(Exception):
        pass

    told: list[float] = []
    asked: list[str] = []
    ask = workers._Process.ask
    monkeypatch.setattr(
        workers._Process, "ask", lambda self, request: asked.append(request.header["op"]) or ask(self, request)
    )

    def progress(part: float) -> None:
        assert threading.current_thread() is threading.main_thread()
        told.append(part)
        raise Enough

    engine.progress = progress
    with pytest.raises(Enough):
        engine.matmul([elements(60, g) for g in range(20)], np.full((60, 60), (1 << 62) - 1, np.uint64), 62)
    engine.progress = told.append
    assert len(engine.masks(3, 1024)) == 3
    assert told[-1] == 1.0
    assert asked.count("products") <= 6  # what was not begun was dropped


def test_two_threads_at_once(engine: Engine) -> None:
    results: dict[int, bool] = {}

    def work(seed: int) -> None:
        exponents = np.random.default_rng(seed).integers(0, 1 << 14, (12, 5), dtype=np.uint64)
        held = [elements(12, seed)]
        results[seed] = values(engine.matmul(held, exponents, 14)) == values(
            Engine(key().public, workers=0).matmul(held, exponents, 14)
        )

    threads = [threading.Thread(target=work, args=[seed]) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == dict.fromkeys(range(6), True)


def test_engines_of_one_key_share_workers_and_the_last_ends_them() -> None:
    one, two = (Engine(key().public, workers=2) for _ in range(2))
    one.masks(1, 1024), two.masks(1, 1024)
    pids = children()
    assert len(pids) <= 2 and len(workers._pools) == 1
    one.close()
    assert two.masks(1, 1024)
    two.close()
    deadline = time.monotonic() + 10
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_alive, pids))


def test_a_forked_process_starts_its_own(engine: Engine) -> None:
    first = engine.masks(64, 1024)
    time.sleep(0.5)  # masks are ready now
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            mine = engine.masks(64, 1024)
            os.write(writing, b"\n".join(b"%x" % int(each) for each in mine))
            engine.close()
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        theirs = {mpz(int(line, 16)) for line in pipe.read().splitlines()}
    os.waitpid(pid, 0)
    mine = set(engine.masks(64, 1024))
    assert len(theirs) == 64 and not theirs & mine and not theirs & set(first)


SCRIPT = """
import numpy, os, sys, time
from efl.paillier import PublicKey
from efl.paillier.engine import Engine
print("the script runs")
engine = Engine(PublicKey({n}, "djn"), workers=2)
assert len(engine.masks(70, 1024)) == 70
{rest}
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    # Modules of the user's with the names of the standard library's, and no guard.
    for name in ("json", "struct", "numpy", "gmpy2", "logging"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the user module was imported')")
    sub = tmp_path / "elsewhere"
    sub.mkdir()
    (sub / "main.py").write_text(SCRIPT.format(n=int(key().public.n), rest="engine.close()"))
    return sub / "main.py"


def test_the_users_script_and_modules_are_not_imported(script: Path) -> None:
    result = subprocess.run(
        [sys.executable, str(script)], cwd=script.parents[1], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "the script runs\n" and not result.stderr


def test_workers_have_the_programs_own_efl_and_nothing_else_of_what_is_installed(script: Path, tmp_path: Path) -> None:
    # Installed: another efl, and something that prints whenever Python starts.
    venv.create(tmp_path / "venv", with_pip=False)
    (installed,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (installed / "efl" / "paillier").mkdir(parents=True)
    (installed / "efl" / "paillier" / "worker.py").write_text("raise SystemExit('the installed efl was imported')")
    (installed / "efl" / "__init__.py").touch()
    (installed / "sitecustomize.py").write_text("print('started', flush=True)")
    path = os.pathsep.join(str(Path(module.__file__ or "").parents[1]) for module in (efl, np, gmpy2))
    result = subprocess.run(
        [str(tmp_path / "venv" / "bin" / "python"), str(script)],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout == "started\nthe script runs\n" and not result.stderr


def test_a_program_ends_at_once_though_it_closes_nothing(script: Path) -> None:
    rest = """
import threading
from efl.paillier import engine as module
from gmpy2 import mpz
module._PIECE_SECONDS = 1000.0
many = numpy.full((60, 2000), (1 << 62) - 1, numpy.uint64)
threading.Thread(target=engine.matmul, args=[[[mpz(3)**600 + i for i in range(60)]], many, 62], daemon=True).start()
time.sleep(0.5)
begun = time.monotonic()
import atexit
atexit._run_exitfuncs()
print(f"{time.monotonic() - begun:.2f}", os.getpid())
"""
    script.write_text(SCRIPT.format(n=int(key().public.n), rest=rest))
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    taken, pid = result.stdout.splitlines()[-1].split()
    assert float(taken) < 1.0 and result.returncode == 0
    time.sleep(0.2)
    assert not [each for each in Path("/proc").iterdir() if each.name.isdigit() and _is_worker_of(each, pid)]


def _is_worker_of(entry: Path, pid: str) -> bool:
    try:
        command = (entry / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return pid.encode() in command and any(b"efl.paillier.worker" in each for each in command)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_no_worker_outlives_its_program(script: Path, how: signal.Signals) -> None:
    text = SCRIPT.format(
        n=int(key().public.n), rest="os.fork() or time.sleep(100)\nprint('up', flush=True)\ntime.sleep(100)"
    )
    script.write_text(text)
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line == "up\n":
            break
    mine = [
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and _is_worker_of(entry, str(process.pid))
    ]
    assert len(mine) == 2
    process.send_signal(how)  # the forked child goes on, and holds the pipes
    process.wait(10)
    deadline = time.monotonic() + 10
    while any(map(is_alive, mine)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(is_alive, mine))
    os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("text", ["two", "-1", "5000"])
def test_the_number_of_workers_from_the_environment(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("EFL_PAILLIER_WORKERS", "3")
    assert default_workers() == 3
    monkeypatch.setenv("EFL_PAILLIER_WORKERS", text)
    with pytest.raises(ConfigError, match="EFL_PAILLIER_WORKERS"):
        default_workers()
