"""The programs under example/ run as a user runs them, and learn."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.example.conftest import EXAMPLE, load
from tests.parties import run_parties

MNIST, CRITEO = EXAMPLE / "mnist", EXAMPLE / "criteo"


def _log(output: str, mode: str) -> list[dict[str, str]]:
    """The name=value pairs of the log lines of a mode."""
    lines = re.findall(rf"^.*\bmode={mode}\b.*$", output, re.MULTILINE)
    return [dict(re.findall(r"(\S+)=(\S+)", line)) for line in lines]


def _alone(script: Path, cwd: Path, *args: str) -> str:
    result = run_parties({"": script}, args=args, cwd=cwd)["script"]
    assert result.returncode == 0, result.output
    return result.output


def _together(leader: Path, follower: Path, cwd: Path, *args: str) -> dict[str, str]:
    results = run_parties({"leader": leader, "follower": follower}, args=args, cwd=cwd)
    for result in results.values():
        assert result.returncode == 0, f"{results['leader'].output}\n{results['follower'].output}"
    return {role: result.output for role, result in results.items()}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    load(MNIST / "generate_data.py").main(["--out", str(folder)])
    return folder


def test_train(tmp_path):
    log = _log(_alone(EXAMPLE / "train.py", tmp_path), "train")
    assert [entry["step"] for entry in log] == ["100", "200", "300", "400", "500"]
    assert float(log[-1]["loss"]) < 0.2
    assert float(log[-1]["auc"]) > 0.98


def test_train_and_eval(tmp_path):
    output = _alone(EXAMPLE / "train_and_eval.py", tmp_path)
    train, evaluations = _log(output, "train"), _log(output, "eval")
    assert len(train) == 50 and len(evaluations) == 5
    assert float(train[-1]["loss"]) < 0.1 * float(train[0]["loss"])
    assert [entry["step"] for entry in evaluations] == ["100", "200", "300", "400", "500"]
    assert float(evaluations[-1]["auc"]) == 1


@pytest.fixture(scope="module")
def mnist_results(digits, tmp_path_factory):
    """What leader.py, follower.py and single.py write after ten epochs."""
    folder = tmp_path_factory.mktemp("results")
    flags = ["--data_dir", str(digits), "--epochs", "10", "--save", "saved", "--snapshot", "10"]
    outputs = _together(MNIST / "leader.py", MNIST / "follower.py", folder, *flags)
    outputs["single"] = _alone(MNIST / "single.py", folder, *flags)
    return folder / "saved", outputs


def _accuracy(folder: Path, name: str) -> float:
    log = json.loads((folder / f"{name}.json").read_text())
    return [entry for entry in log if entry["mode"] == "eval"][-1]["accuracy"]


def test_mnist_parties_learn_more_together_than_alone(mnist_results):
    folder, outputs = mnist_results
    together = _accuracy(folder, "leader")
    assert together > 0.88
    assert together == pytest.approx(_accuracy(folder, "whole"), abs=0.01)
    assert together > max(_accuracy(folder, "left"), _accuracy(folder, "right")) + 0.05
    assert f"leader: accuracy {together:.4f} on the test images after 56 training steps" in outputs["leader"]


def test_mnist_started_again_after_its_end_says_that_nothing_is_left(digits, tmp_path):
    flags = ["--data_dir", str(digits), "--checkpoint_dir", "kept", "--save", "saved"]
    parties = MNIST / "leader.py", MNIST / "follower.py"
    _together(*parties, tmp_path, *flags)
    weights, log = dict(np.load(tmp_path / "saved" / "leader.npz")), (tmp_path / "saved" / "leader.json").read_text()
    outputs = _together(*parties, tmp_path, *flags)
    for role, output in outputs.items():
        assert f"{role}: no step was" in output
    again = np.load(tmp_path / "saved" / "leader.npz")
    assert all((again[name] == weights[name]).all() for name in weights)
    assert (tmp_path / "saved" / "leader.json").read_text() == log


def test_the_losses_of_one_process_are_those_of_the_parties_logs(mnist_results):
    _, outputs = mnist_results
    whole = outputs["single"][: outputs["single"].index("whole: accuracy")]
    for line in _log(whole, "train"):
        assert float(line["loss"]) == pytest.approx(float(line["loss_leader"]) + float(line["loss_follower"]), rel=1e-3)
    for role in ("leader", "follower"):
        own = [float(line["loss"]) for line in _log(outputs[role], "train")]
        assert [float(line[f"loss_{role}"]) for line in _log(whole, "train")] == pytest.approx(own, rel=1e-3)


def test_mnist_in_two_processes_equals_one_process(mnist_results):
    folder, _ = mnist_results
    demo = load(MNIST / "demo.py")
    assert demo.largest_difference(folder) < 1e-5
    # The check itself sees a difference: the weights are not those of the end of the run.
    moved = dict(np.load(folder / "leader.npz"))
    start = dict(np.load(folder / "leader-10.npz"))
    assert all(np.abs(moved[name] - start[name]).max() > 0 for name in start)


def test_the_demos_check_sees_a_difference_in_one_weight(tmp_path):
    demo = load(MNIST / "demo.py")
    weights = {"net/dense/kernel": np.ones((3, 2)), "net/dense/bias": np.full(2, 0.5)}
    for role in ("leader", "follower"):
        np.savez(tmp_path / f"{role}-10.npz", **weights)
    roles = ("leader", "follower")
    whole = {f"single/{role}/{name}": value.copy() for role in roles for name, value in weights.items()}
    np.savez(tmp_path / "whole-10.npz", **whole)
    assert demo.largest_difference(tmp_path) == 0
    whole["single/follower/net/dense/bias"][1] += 5e-4
    np.savez(tmp_path / "whole-10.npz", **whole)
    assert demo.largest_difference(tmp_path) == pytest.approx(5e-4 / 0.5005)


def test_criteo_parties_learn(tmp_path):
    load(CRITEO / "generate_data.py").main(["--out", str(tmp_path)])
    leader, follower = CRITEO / "criteo_dp_leader_dense.py", CRITEO / "criteo_dp_follower_dense.py"
    outputs = _together(leader, follower, tmp_path, "--batch_size", "100", "--train_step", "20")
    evaluations = _log(outputs["leader"], "eval")
    assert len(evaluations) == 3  # 52 batches, 20 in an iteration
    assert float(evaluations[-1]["auc"]) > 0.95
    assert float(_log(outputs["leader"], "train")[-1]["loss"]) < 0.3
    assert {entry["loss"] for entry in _log(outputs["follower"], "train")} == {"-"}


def test_criteo_evaluates_several_times_unless_told_otherwise(tmp_path):
    generate_data = load(CRITEO / "generate_data.py")
    line = "{}\t" + "\t".join(["{}"] * 13 + ["a"] * 26) + "\n"
    (tmp_path / "train.txt").write_text("".join(line.format(i % 2, *[i % 2] * 13) for i in range(2000)))
    generate_data.main(["--data", str(tmp_path / "train.txt"), "--out", str(tmp_path)])
    outputs = _together(CRITEO / "criteo_dp_leader_dense.py", CRITEO / "criteo_dp_follower_dense.py", tmp_path)
    assert [entry["step"] for entry in _log(outputs["leader"], "eval")] == ["20", "40", "60", "72"]


@pytest.mark.parametrize("role", ["leader", "follower"])
def test_criteo_says_what_to_do_without_data(tmp_path, role):
    result = run_parties({role: CRITEO / f"criteo_dp_{role}_dense.py"}, cwd=tmp_path)[role]
    assert result.returncode != 0
    assert f"{role}_train is missing: run generate_data.py first" in result.output


@pytest.mark.parametrize(
    "script",
    [
        "mnist/generate_data.py", "mnist/leader.py", "mnist/follower.py", "mnist/single.py", "mnist/demo.py",
        "criteo/generate_data.py", "criteo/criteo_dp_leader_dense.py", "criteo/criteo_dp_follower_dense.py",
    ],
)  # fmt: skip
def test_help(script, tmp_path):
    assert "usage: " in _alone(EXAMPLE / script, tmp_path, "--help")


@pytest.mark.full  # and what CI runs after the tests
def test_the_demo_from_a_fresh_interpreter(tmp_path):
    """Everything at once, as ``make demo`` does it: data, ``efl run``, one process, table, picture."""
    command = [sys.executable, str(MNIST / "demo.py"), "--quick", "--out", "out"]
    environ = {**os.environ, "COLUMNS": "80"}
    result = subprocess.run(
        command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=280, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    shown = result.stdout + result.stderr
    assert not re.search(r"^[IWE]0000 |^WARNING|deprecated", shown, re.MULTILINE), "TensorFlow's notes are shown"
    assert "\nscikit-learn digits, 10 epochs\n" in result.stdout
    rows = {
        name: float(re.search(rf"{name}\S*\s.*?([\d.]+)%", result.stdout).group(1))
        for name in ("federated", "one process, whole", "leader alone", "follower alone")
    }
    assert rows["federated"] > 85 and rows["federated"] > max(rows["leader alone"], rows["follower alone"])
    assert rows["federated"] == pytest.approx(rows["one process, whole"], abs=1)
    assert re.search(r"^largest relative difference of a weight after 10 steps: \S+( \(bit .* same\))?$", shown, re.M)
    assert (tmp_path / "out" / "learning_curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_demo_of_one_epoch_which_is_shorter_than_ten_steps(tmp_path):
    command = [sys.executable, str(MNIST / "demo.py"), "--epochs", "1", "--out", "out"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "\nscikit-learn digits, 1 epoch\n" in result.stdout
    assert "largest relative difference of a weight after 5 steps" in result.stdout
