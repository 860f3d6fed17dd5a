"""The programs in the documentation run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.parties import run_parties

ROOT = Path(__file__).resolve().parent.parent


def programs(page: str) -> list[str]:
    """The Python blocks of a page."""
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


def logged(output: str, name: str) -> list[float]:
    return [float(value) for value in re.findall(rf"\b{name}=([-\d.e]+)", output)]


def test_the_quick_starts_two_parties_learn(tmp_path: Path) -> None:
    by_name = {text.split("\n")[0]: text for text in programs("docs/quick_start.md")}
    scripts = {role: by_name[f"# {role}.py"] for role in ("leader", "follower")}
    result = run_parties(scripts, cwd=tmp_path, args=["--seed=1"])
    for party in result.values():
        assert party.returncode == 0, party.output
    losses, aucs = logged(result["leader"].output, "loss"), logged(result["leader"].output, "auc")
    assert len(losses) == 4  # 80 steps, a line for every 20
    assert losses[-1] < losses[0]
    assert aucs[-1] > 0.9
    assert result["follower"].output.count("loss=-") == 4


def test_the_quick_starts_fed_arrays_are_learnt_from(tmp_path: Path) -> None:
    fed = next(text for text in programs("docs/quick_start.md") if text.startswith("# fed.py"))
    result = run_parties({"": fed}, cwd=tmp_path, args=["--seed=1"])["script"]
    assert result.returncode == 0, result.output
    losses = logged(result.output, "loss")
    assert len(losses) == 4 and losses[-1] < 0.25  # before the first step: about 0.7
    assert "MiB of constants" not in result.output


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_to_files_of_the_project_hold(page: str) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text())
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_docstrings_are_markdown_without_sphinxs_roles() -> None:
    """The API reference would show ``:meth:`` as it stands."""
    role = re.compile(r":[a-z]+(?::[a-z]+)?:`")
    assert role.search("see :py:meth:`run` and :class:`~efl.Model`")
    sources = sorted((ROOT / "efl").rglob("*.py"))
    assert len(sources) > 40
    assert [str(path) for path in sources if role.search(path.read_text())] == []


def test_the_documentation_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    pages = "".join(page.read_text() for page in (tmp_path / "site").rglob("*.html"))
    for name in (
        "efl.model.Model.fit",
        "efl.data.federal_dataio.FederalDataIO",
        "efl.errors.PeerLost",
        "efl.procedure_fn.train_and_eval",
    ):
        assert f'id="{name}"' in pages
    fetched = re.findall(r'<(?:script|img|link)[^>]*(?:src|href)="?https?://[^" >]+', pages)
    assert fetched == [], "a page fetches something from elsewhere"
