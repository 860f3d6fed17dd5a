"""What holds for every test: no setting of the developer's shell, a quiet TensorFlow, no task scope left open."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

import efl

# Before anything imports TensorFlow, and for the processes that tests start.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
for _name in [name for name in os.environ if name.startswith("EFL_") or name in ("TF_CONFIG", "TF_USE_LEGACY_KERAS")]:
    if _name != "EFL_TEST_DATA":  # a folder with real data, for the tests that can use it
        del os.environ[_name]


@pytest.fixture(autouse=True)
def _command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings read ``sys.argv``; pytest's own flags are none of theirs."""
    monkeypatch.setattr("sys.argv", ["test.py"])


@pytest.fixture(autouse=True)
def _no_scope_left_open() -> Iterator[None]:
    yield
    assert efl.current_task_scope() == efl.TaskScope()
