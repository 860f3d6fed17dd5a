"""Runs targets, each in a process of its own for so many seconds; fails on the first crash.

    python -m fuzz.run --seconds 60             # all of them
    python -m fuzz.run --seconds 600 link hello # some
    python -m fuzz.run --one link FILE          # an input that crashed, once, with its traceback

What is found is kept in ``build/fuzz``: the corpora grow from run to run, and crashes stay for a look.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "build" / "fuzz"
_MOST_MEMORY = 2048  # MiB, TensorFlow's own included


def _fuzz(target: str, arguments: list[str]) -> None:
    import atheris

    with atheris.instrument_imports(include=["efl.transport", "efl._steps", "efl._agreement", "json"]):
        from fuzz.targets import TARGETS
    logging.disable(logging.CRITICAL)
    atheris.Setup([target, *arguments], TARGETS[target])
    atheris.Fuzz()


def main() -> int:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description="Fuzzes what reads a peer's bytes.")
    parser.add_argument("targets", nargs="*")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--one", nargs=2, metavar=("TARGET", "FILE"))
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        _fuzz(arguments.child[0], arguments.child[1:])
        return 0
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from fuzz import seeds
    from fuzz.targets import TARGETS

    if arguments.one:
        TARGETS[arguments.one[0]](Path(arguments.one[1]).read_bytes())
        return 0
    unknown = set(arguments.targets) - TARGETS.keys()
    if unknown:
        parser.error(f"no target {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
    seeds.write(FOLDER / "seeds")
    crashed = []
    for target in arguments.targets or TARGETS:
        corpus, crashes = FOLDER / "corpus" / target, FOLDER / "crashes" / target
        for folder in (corpus, crashes):
            folder.mkdir(parents=True, exist_ok=True)
        print(f"== {target}: {arguments.seconds} s", flush=True)
        began = time.monotonic()
        log = FOLDER / f"{target}.log"
        options = [
            f"-max_total_time={arguments.seconds}",
            "-timeout=20",
            f"-rss_limit_mb={_MOST_MEMORY}",
            "-max_len=4096",
        ]
        places = [f"-artifact_prefix={crashes}/", str(corpus), str(FOLDER / "seeds" / target)]
        with log.open("wb") as out:
            code = subprocess.run(
                [sys.executable, "-m", "fuzz.run", "--child", target, *options, *places],
                stdout=out,
                stderr=out,
                check=False,
            ).returncode
        text = log.read_text(errors="replace").splitlines()
        done = [line for line in text if "cov:" in line]
        print(f"   {done[-1] if done else 'nothing ran'}; {time.monotonic() - began:.0f} s", flush=True)
        if code:
            crashed.append(target)
            print("\n".join(text[-40:]), flush=True)
    if crashed:
        print(f"crashed: {', '.join(crashed)}; the inputs are in {FOLDER / 'crashes'}", file=sys.stderr)
    return 1 if crashed else 0


if __name__ == "__main__":
    sys.exit(main())
