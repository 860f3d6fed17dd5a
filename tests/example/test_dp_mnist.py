"""The private examples learn, and say what they have spent."""

from __future__ import annotations

import re

from tests.example.conftest import EXAMPLE
from tests.parties import run_parties

FOLDER = EXAMPLE / "dp_mnist"
FLAGS = ["--batch_size=64", "--epochs=8", "--learning_rate=1.0", "--noise_multiplier=0.7", "--delta=1e-4"]


def _accuracies(output: str) -> list[float]:
    return [float(value) for value in re.findall(r" mode=eval .*accuracy=(\S+)", output)]


def test_one_process(tmp_path):
    result = run_parties({"": FOLDER / "single.py"}, args=FLAGS, cwd=tmp_path, timeout=200)["script"]
    assert result.returncode == 0, result.output
    accuracies = _accuracies(result.output)
    assert len(accuracies) == 8 and accuracies[-1] > 0.5, result.output
    assert (
        len(re.findall(r"epsilon=\S+ delta=0.0001 \(as commonly reported, by RDP: \S+\): outsider", result.output)) == 8
    )
    assert re.search(r"outsider who sees the model +add/remove a row +no +\d", result.output)


def test_two_parties(tmp_path):
    scripts = {"leader": FOLDER / "leader.py", "follower": FOLDER / "follower.py"}
    results = run_parties(scripts, args=FLAGS, cwd=tmp_path, timeout=200)
    told = f"{results['leader'].output}\n{results['follower'].output}"
    assert all(result.returncode == 0 for result in results.values()), told
    assert _accuracies(results["leader"].output)[-1] > 0.5, told
    for result in results.values():
        table = result.output[result.output.index("What each adversary learns") :]
        assert re.search(r"outsider who sees both models +add/remove a row +no +\d", table), table
        assert "about the follower's rows" in table
        assert re.search(r"none: (?=.*labels_train)(?=.*y_test).* were sent raw", table), table


LABELS_ALONE = ["--batch_size=64", "--epochs=10", "--label_epsilon=6"]


def test_randomised_labels_in_one_process(tmp_path):
    result = run_parties({"": FOLDER / "single.py"}, args=LABELS_ALONE, cwd=tmp_path, timeout=200)["script"]
    assert result.returncode == 0, result.output
    assert max(_accuracies(result.output)[-3:]) > 0.7, result.output
    assert re.search(r"anyone, about the model's labels alone +replace one label +no +6 \*", result.output)


def test_randomised_labels_of_one_of_two_parties(tmp_path):
    scripts = {"leader": FOLDER / "leader.py", "follower": FOLDER / "follower.py"}
    results = run_parties(scripts, args=LABELS_ALONE, cwd=tmp_path, timeout=200)
    told = f"{results['leader'].output}\n{results['follower'].output}"
    assert all(result.returncode == 0 for result in results.values()), told
    assert max(_accuracies(results["leader"].output)[-3:]) > 0.7, told
    table = results["follower"].output
    assert re.search(r"anyone, about the follower's labels alone +replace one label +no +6 \*", table), table
