"""The parts of the benchmarks that need no quiet machine: they must not rot between two measurements."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def benchmark_modules(monkeypatch):
    """Makes the benchmarks' modules importable for one test."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if (BENCHMARKS / f"{name}.py").exists():
            del sys.modules[name]


@pytest.fixture
def data(benchmark_modules, tmp_path):
    """Both parties' columns."""
    import _running

    _running.make_data(None, tmp_path, memory_rows=1000)
    return tmp_path


def test_serialising_a_step_of_the_split_model_is_measured(benchmark_modules):
    import mnist_split

    assert 0 < mnist_split.serialise_ms() < 1000


@pytest.mark.full
def test_the_split_model_is_measured_over_efls_link_and_over_a_bare_stream_and_with_privacy(data):
    import dp_split
    import mnist_split

    programs = {name: mnist_split.PROGRAMS[name] for name in ("bare", "stream", "unlinked", "federated")}
    programs["noise"] = dp_split.PROGRAMS["noise"]
    memory = mnist_split.measure(programs, data, "memory", 2, 4)
    small = {**memory, "model": memory["bare"]}
    numbers, text = mnist_split.report({"small": small, "memory": memory, "large": memory}, 0.01)
    assert numbers["ratio"] > 0
    for goal in ("exactly once", "all of efl"):
        assert f"| {goal}: " in text
    private = {"none": memory["federated"], "noise": memory["noise"], "unnoise": memory["noise"]}
    numbers, text = dp_split.report({"small": private, "memory": private}, "digits", 2)
    assert numbers["ratio"] > 0 and "| records: noise / none | " in text


def test_private_steps_are_measured(benchmark_modules):
    import dp_step

    found = dp_step.measure("dense", 16, rounds=2, steps=2, slow=False)
    assert found["none"][1] == 1.0 and found["efl"][0] > 0


def test_private_steps_with_large_tables_are_measured(benchmark_modules):
    import dp_embedding

    found = dp_embedding.measure(5000, 16, rounds=2, steps=2, whole=True)
    assert found["none"][1] == 1.0 and found["waiting"][0] > 0 and found["whole"][0] > 0


@pytest.mark.full
def test_a_line_that_delays_is_measured(data):
    import round_trip

    measured = {"memory": round_trip.measure_lines(data, "memory", 2, 4, 20.0)}
    numbers, text = round_trip.report(measured, "digits", 2)
    assert 20 <= numbers["ms"]["memory"]["far"] < 2000
    assert "| small, memory: far beyond local, a step | " in text


@pytest.mark.full
def test_a_checkpoint_and_a_resume_are_measured(data, tmp_path):
    import checkpoint

    costs = {"initializable": checkpoint.measure_cost(data, tmp_path / "cost", "initializable", 2, 3, 2)}
    resumes = {"follower": checkpoint.measure_resume(data, tmp_path / "resume", "follower", "records", 50)}
    assert costs["initializable"]["bytes"] > 1000
    assert 0 < resumes["follower"]["resume_s"] < 200
    numbers, text = checkpoint.report(costs, resumes, "digits")
    assert "| a resume, follower | " in text
    assert json.dumps(numbers)


def test_the_transport_is_measured_in_clear_text_and_over_tls(benchmark_modules, monkeypatch, tmp_path):
    import transport

    from efl.cli.certs import write

    write(tmp_path / "certs")
    monkeypatch.setattr(transport, "SIZES", {"1 KiB": 1 << 10, "1 MiB": 1 << 20})
    trips, rates, ratios = transport.measure(True, tmp_path / "certs")
    assert set(trips["1 MiB"]) == set(transport.KINDS)
    assert rates["1 MiB"]["efl recv tls"] > 0
    text = transport.report(trips, rates, ratios)
    assert "| efl recv tls, 1 MiB | " in text
    assert "| efl recv / grpc, 1 MiB | " in text


def test_a_goal_is_met_or_not_and_a_record_keeps_its_notes(benchmark_modules, tmp_path, monkeypatch):
    from _report import Goal, goals_table, record

    goals = [Goal("fast", 0.95, 0.9), Goal("slow", 31.0, 30.0, least=False, unit="ms", digits=1)]
    assert goals_table(goals).splitlines()[2:] == [
        "| fast | 0.95 | ≥ 0.9 | met |",
        "| slow | 31.0 ms | ≤ 30 ms | not met |",
    ]
    monkeypatch.setattr(sys, "argv", ["x.py", "--quick", "--data", "somewhere"])
    path = tmp_path / "x.md"
    record(path, "x", "first")
    path.write_text(path.read_text() + "\n## Notes\n\nWhy.\n")
    record(path, "x", "second")
    told = path.read_text()
    assert told.startswith("# x\n\n`python benchmarks/x.py --quick --data DIR` on ")
    assert told.endswith("\n\nsecond\n\n## Notes\n\nWhy.\n")


@pytest.mark.parametrize("script", sorted(path.name for path in BENCHMARKS.glob("[!_]*.py")))
def test_every_benchmark_says_how_it_is_run(script):
    told = subprocess.run([sys.executable, BENCHMARKS / script, "--help"], capture_output=True, text=True, timeout=100)
    assert told.returncode == 0
    assert f"python benchmarks/{script} [" in told.stdout
    assert "--quick" in told.stdout
    assert "--record" in told.stdout


def test_encrypted_steps_and_kernels_are_measured(benchmark_modules):
    import _encrypted_steps
    import paillier

    from efl.protocol import Kind
    from tests.paillier.keypairs import key

    for kind in Kind:
        pair = _encrypted_steps.Pair(key(), kind, 3, 3, 8, workers=0)
        step = pair.step()
        assert step.cpu > 0 and step.sent > 0 and step.error < 0.01
        pair.close()
    spent = paillier.least(paillier.of_phe(key()), rounds=1)
    assert 0 < paillier.phe_step(spent, 2, 2) < paillier.phe_step(spent, 4, 4)
