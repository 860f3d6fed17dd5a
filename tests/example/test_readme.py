"""The two programs of README.md run as they stand, on the data that it says, and learn."""

from __future__ import annotations

import re

from tests.example.conftest import EXAMPLE, load
from tests.parties import run_parties

README = (EXAMPLE.parent / "README.md").read_text()
LINE = re.compile(r"role=(\w+) mode=train step=(\d+) (.*)$", re.MULTILINE)


def _lines(text: str) -> list[tuple[str, str, dict[str, str]]]:
    """Role, step and the other name=value pairs of each line about training."""
    return [(role, step, dict(re.findall(r"(\S+)=(\S+)", rest))) for role, step, rest in LINE.findall(text)]


def test_the_readmes_two_parties_learn(tmp_path):
    blocks = re.findall(r"^```python\n# (\w+)\.py\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    scripts = {}
    for role, text in blocks:
        scripts[role] = tmp_path / f"{role}.py"
        scripts[role].write_text(text)
    assert set(scripts) == {"leader", "follower"}
    load(EXAMPLE / "mnist" / "generate_data.py").main(["--out", str(tmp_path)])
    results = run_parties(scripts, cwd=tmp_path)
    for result in results.values():
        assert result.returncode == 0, result.output

    shown = {role: [line for line in _lines(README) if line[0] == role] for role in scripts}
    for role, result in results.items():
        logged = _lines(result.output)
        # The README shows the lines that come: the same steps, and the same names in them.
        assert [(step, list(values)) for _, step, values in logged] == [
            (step, list(values)) for _, step, values in shown[role]
        ]
    last, expected = _lines(results["leader"].output)[-1][2], shown["leader"][-1][2]
    assert abs(float(last["accuracy"]) - float(expected["accuracy"])) < 0.03
    assert float(last["accuracy"]) > 0.85 and float(last["loss"]) < 0.4
    assert {values["loss"] for _, _, values in _lines(results["follower"].output)} == {"-"}
