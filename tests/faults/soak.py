"""A soak: the MNIST example under random faults for many minutes; memory, open files and weights must not mind.

    python -m tests.faults.soak --minutes 30              # the digits of scikit-learn
    python -m tests.faults.soak --minutes 30 --data DIR   # MNIST's IDX files

The follower dials through a proxy with 5 ms of delay. Every few seconds something happens to the line or to a party. In
the first half only the leader is killed, in the second only the follower: each has a process that lives half of the run
and recovers again and again, and that must not grow. At the end both are killed, and the newest checkpoint that both
hold is compared, variable by variable and bit by bit, with the one that a run without faults writes there.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from tests.faults.flat import Life, Sample, verdict
from tests.faults.proxy import BadLine
from tests.parties import Party, free_address, start_party

_ROOT = Path(__file__).resolve().parents[2]
_MNIST = _ROOT / "example" / "mnist"
_ROLES = ("leader", "follower")
_SAVE = 100
_STUCK = 90.0  # longer than any fault with what follows it: a restart on a loaded machine takes some seconds
_DELAY = 0.005
_KEPT = 4 << 10  # of the end of an output, where the newest step is looked for


class Soak:
    """One run of two parties, and what is done to it.

    Args:
      folder: Of data, checkpoints and outputs.
      seconds: How long faults go on.
      seed: Of the faults.
    """

    def __init__(self, folder: Path, seconds: float, seed: int) -> None:
        self.folder = folder
        self.injected: Counter[str] = Counter()
        self.lives: list[Life] = []
        self.problems: list[str] = []
        self._seconds = seconds
        self._random = random.Random(seed)
        self._address = free_address()
        self._parties: dict[str, Party] = {}
        self._current: dict[str, Life] = {}
        self._told, self._told_at = "", 0.0
        self._began = self._shown_at = 0.0

    def run(self) -> None:
        """Injects faults until the time is over or something is wrong, then kills both parties."""
        self._began = self._told_at = self._shown_at = time.monotonic()
        with BadLine(self._address, seed=self._random.randrange(1 << 30)) as line:
            line.delay(_DELAY)
            try:
                for role in _ROLES:
                    self._start(role, line.address)
                self._rest(20)  # until both train
                while not self.problems and time.monotonic() - self._began < self._seconds:
                    self._inject(line)
                    self._rest(self._random.uniform(1, 6))
            finally:
                for party in self._parties.values():
                    party.kill(signal.SIGCONT)
                    party.kill()

    def _start(self, role: str, dial: str) -> None:
        self._parties[role] = start(role, self.folder, self._address if role == "leader" else dial, _SAVE, "soak")
        self._current[role] = Life(role)
        self.lives.append(self._current[role])

    def _rest(self, seconds: float) -> None:
        """Lets time pass, and looks at both parties meanwhile."""
        limit = time.monotonic() + seconds
        while not self.problems:
            self._look()
            left = limit - time.monotonic()
            if left <= 0:
                return
            time.sleep(min(1.0, left))

    def _look(self) -> None:
        now = time.monotonic()
        for role, party in self._parties.items():
            if party.returncode is not None:
                self.problems.append(f"the {role} ended by itself ({party.returncode})\n{self._ends()}")
                return
            self._current[role].samples.append(Sample.of(party.pid, now - self._began))
        if now - self._shown_at >= 60:
            self._shown_at = now
            held = ", ".join(f"{role} {life.samples[-1].rss_mib:.0f} MiB" for role, life in self._current.items())
            print(f"{(now - self._began) / 60:.0f} min: {sum(self.injected.values())} faults, {held}", flush=True)
        told = newest_step(self._parties["leader"])
        if told != self._told:
            self._told, self._told_at = told, now
        elif now - self._told_at > _STUCK:
            self.problems.append(f"no step for {_STUCK:.0f} s after {self._told or 'the start'}\n{self._ends()}")

    def _ends(self) -> str:
        return "\n".join(f"---- the {role} wrote\n{party.output[-3000:]}" for role, party in self._parties.items())

    # ---- faults

    def _inject(self, line: BadLine) -> None:
        pick = self._random.uniform
        first_half = time.monotonic() - self._began < self._seconds / 2
        victim = "leader" if first_half else "follower"

        def stop() -> None:
            party = self._parties[self._random.choice(_ROLES)]
            party.kill(signal.SIGSTOP)
            time.sleep(pick(1, 8))
            party.kill(signal.SIGCONT)

        def kill() -> None:
            self._parties[victim].kill()
            self._rest_without(victim, pick(0, 3))
            self._start(victim, line.address)

        def hole() -> None:
            seconds = pick(1, 7)
            line.black_hole(seconds)
            self._rest(seconds)

        def slow() -> None:
            line.throttle(pick(50e3, 500e3))
            self._rest(3)
            line.throttle(0)

        def far() -> None:
            line.delay(pick(0.02, 0.1))
            self._rest(3)
            line.delay(_DELAY)

        faults: dict[str, Callable[[], None]] = {
            "line cut": line.cut,
            "line cut in the middle of a message": lambda: line.cut_after(self._random.randrange(1, 300_000)),
            "line away": lambda: line.close_for(pick(0.2, 4)),
            "black hole": hole,
            "damaged bytes": lambda: line.damage(self._random.randint(1, 3)),
            "duplicated connection": line.duplicate,
            "throttled": slow,
            "delayed": far,
            "stopped (SIGSTOP)": stop,
            f"kill -9 of the {victim}": kill,
        }
        weights = [2 if "kill" in name else 1 for name in faults]
        (name,) = self._random.choices(list(faults), weights)
        faults[name]()
        self.injected[name] += 1

    def _rest_without(self, victim: str, seconds: float) -> None:
        """Lets time pass while one party is dead."""
        del self._parties[victim]
        time.sleep(seconds)


def start(role: str, folder: Path, address: str, save: int, name: str) -> Party:
    """Starts one party of the example, which trains and evaluates for ever."""
    flags = [f"--data_dir={folder / 'data'}", "--epochs=1000000", "--eval_every=200", "--log_step=50"]
    flags += [f"--checkpoint_dir={folder / name}", f"--save_checkpoint_steps={save}", "--peer_timeout=120"]
    return start_party(role, _MNIST / f"{role}.py", cwd=folder, address=address, args=flags)


def newest_step(party: Party) -> str:
    """What the party has logged of the newest of its steps."""
    with open(party._output_file, "rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - _KEPT))
        lines = file.read().decode(errors="replace").splitlines()
    return next((line for line in reversed(lines) if " step=" in line), "")


def differences(folder: Path, limit: float) -> tuple[str, list[str]]:
    """Compares the newest common checkpoint with that of a run without faults.

    Returns:
      Where it is, in words, and the names of variables that differ.
    """
    import tensorflow.compat.v1 as tf

    from efl._checkpoint import CheckpointStore

    soaked = {role: CheckpointStore(folder / "soak" / role / "0") for role in _ROLES}
    common = set(soaked["leader"].known()) & set(soaked["follower"].known())
    position = max(position for position, _ in common)
    clean = {role: CheckpointStore(folder / "clean" / role / "0") for role in _ROLES}
    address, until = free_address(), time.monotonic() + limit
    parties = [start(role, folder, address, max(1, position.trained), "clean") for role in _ROLES]
    try:
        while not all((store.folder / position.name).is_dir() for store in clean.values()):
            if time.monotonic() > until or any(party.returncode is not None for party in parties):
                return str(position), ["the run without faults did not come there:", parties[0].output[-2000:]]
            time.sleep(0.1)
    finally:
        for party in parties:
            party.kill()
    found = []
    for role in _ROLES:
        got, expected = (tf.train.load_checkpoint(stores[role].prefix(position)) for stores in (soaked, clean))
        names = set(got.get_variable_to_shape_map())
        if names != set(expected.get_variable_to_shape_map()) or not names:
            found.append(f"{role}: other variables")
            continue
        found += [f"{role}: {n}" for n in sorted(names) if not _same(got.get_tensor(n), expected.get_tensor(n))]
    return str(position), found


def _same(one: object, other: object) -> bool:
    first, second = np.asarray(one), np.asarray(other)
    return (first.dtype, first.shape, first.tobytes() if first.dtype != object else first.tolist()) == (
        second.dtype,
        second.shape,
        second.tobytes() if second.dtype != object else second.tolist(),
    )


def main() -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with MNIST's IDX files")
    parser.add_argument("--samples", type=Path, metavar="FILE", help="write what was seen of each process, as JSON")
    parser.add_argument("--seed", type=int, help="of the faults; default: another one each time")
    options = parser.parse_args()
    seed = random.randrange(1 << 30) if options.seed is None else options.seed
    print(f"soak of {options.minutes:g} minutes, seed {seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="efl-soak-") as name:
        folder = Path(name)
        command = [sys.executable, str(_MNIST / "generate_data.py"), "--out", str(folder / "data")]
        command += ["--data", str(options.data.resolve())] if options.data else []
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        soak = Soak(folder, 60 * options.minutes, seed)
        soak.run()
        if options.samples is not None:
            options.samples.write_text(json.dumps([asdict(life) for life in soak.lives]))
        problems, where, differing = list(soak.problems), "nowhere", []
        if not problems:
            where, differing = differences(folder, limit=max(300.0, 90 * options.minutes))
            problems += [f"not as without faults at {where}: {text}" for text in differing]
    lines, growing = verdict(soak.lives, 60 * options.minutes / 5)
    problems += growing
    print("\n| fault | times |\n|---|---:|")
    for fault, times in [*sorted(soak.injected.items()), ("all", sum(soak.injected.values()))]:
        print(f"| {fault} | {times} |")
    print("\n" + "\n".join(lines))
    print(f"\n{len(soak.lives)} processes; compared at {where}: {len(differing)} variables differ")
    print("\n".join(f"WRONG: {problem}" for problem in problems) or "all is well")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
