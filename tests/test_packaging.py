"""What a fresh machine meets: the search for a Python, and the lock file."""

from __future__ import annotations

import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent

SHIM = '#!/bin/sh\necho "pyenv: $(basename "$0"): command not found" >&2\nexit 127\n'
TOO_NEW = "#!/bin/sh\ncase $2 in *print*) echo 'Python 3.13' ;; *) exit 1 ;; esac\n"
NO_VENV = "#!/bin/sh\ncase $2 in *print*) echo 'Python 3.11' ;; *) exit 1 ;; esac\n"
REAL = f'#!/bin/sh\nexec "{sys.executable}" "$@"\n'


def find_python(folder: Path, named: str = "", **programs: str) -> subprocess.CompletedProcess[str]:
    """Runs the search where only the given programs are on the PATH, under names with dots for underscores."""
    bin_folder = folder / "bin"
    bin_folder.mkdir()
    for name, text in programs.items():
        file = bin_folder / name.replace("_", ".")
        file.write_text(text)
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    (bin_folder / "basename").symlink_to("/usr/bin/basename")
    return subprocess.run(
        ["/bin/sh", str(ROOT / ".ci" / "find-python")],
        env={"PATH": str(bin_folder), "HOME": str(folder), "PYTHON": named},
        capture_output=True,
        text=True,
        check=False,
    )


def test_names_that_do_not_run_or_do_not_fit_are_passed_over(tmp_path: Path) -> None:
    found = find_python(tmp_path, python3_11=SHIM, python3_10=NO_VENV, python3=TOO_NEW, python=REAL)
    assert (found.returncode, found.stdout.strip()) == (0, sys.executable), found.stderr


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (SHIM, "does not run"),
        (TOO_NEW, "Python 3.13"),
        (NO_VENV, "Python 3.11 without the venv module (Debian, Ubuntu: install the package python3-venv)"),
    ],
)
def test_where_there_is_none_it_says_what_was_tried_and_what_to_do(tmp_path: Path, program: str, words: str) -> None:
    (tmp_path / "mine").write_text(program)
    (tmp_path / "mine").chmod(0o755)
    found = find_python(tmp_path, named=str(tmp_path / "mine"), python3_11=REAL)
    assert (found.returncode, found.stdout) == (1, "")  # a Python that was named is not replaced by another
    assert "efl needs Python 3.10 or 3.11, and found none here" in found.stderr
    assert f"{tmp_path}/mine: {words}" in found.stderr
    assert "make setup PYTHON=/path/to/python3.11" in found.stderr


LOCKS = ["requirements.lock", "requirements-oldest.lock"]
EXTRAS = {
    "requirements.lock": {"privacy", "demo", "dev", "docs"},
    "requirements-oldest.lock": {"privacy", "demo", "dev"},
}


def requirements(lock: str) -> dict[str, str]:
    """Name -> its entry in the lock, hashes included."""
    entries = re.split(r"\n(?=[A-Za-z0-9])", (ROOT / lock).read_text())
    return {entry.split("==")[0]: entry for entry in entries if not entry.startswith("#")}


def wanted(extras: set[str]) -> dict[str, str]:
    """Name -> the versions that pyproject.toml allows, of the dependencies and the given extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    lines = project["dependencies"] + [line for extra in extras for line in optional[extra]]
    parts = [re.fullmatch(r"([\w.-]+)(?:\[\w,]+\])?([^;]*)(?:;.*)?", line) for line in lines]
    return {part[1].replace("_", "-").lower(): part[2] for part in parts if part}


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_pins_everything_with_hashes_and_names_no_index(lock: str) -> None:
    locked = requirements(lock)
    assert len(locked) > 50
    for name, entry in locked.items():
        assert re.match(rf"{re.escape(name)}==\d", entry), entry[:80]
        assert "--hash=sha256:" in entry, name
    text = "".join(locked.values())
    assert "://" not in text
    assert "--index" not in text


def test_the_lock_holds_every_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(project["optional-dependencies"]) == EXTRAS["requirements.lock"]


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_holds_every_dependency(lock: str) -> None:
    names = wanted(EXTRAS[lock])
    assert len(names) > 15
    assert set(names) <= set(requirements(lock))


def test_the_oldest_lock_holds_the_lower_bounds() -> None:
    locked = requirements("requirements-oldest.lock")
    for name, versions in wanted(EXTRAS["requirements-oldest.lock"]).items():
        bound = re.search(r"[>=]=([\d.]+)", versions)
        assert bound, name
        assert re.match(rf"{re.escape(name)}=={re.escape(bound[1])}[. ]", locked[name]), (locked[name][:40], versions)
