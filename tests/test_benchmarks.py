"""The parts of the benchmarks that need no quiet machine: they must not rot between two measurements."""

import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def test_serialising_a_step_of_the_split_model_is_measured(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import mnist_split

    assert 0 < mnist_split.serialise_ms() < 1000
    for name in ("mnist_split", "_mnist_programs"):
        sys.modules.pop(name, None)
