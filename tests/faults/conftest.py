"""``--full``, the runs that others are compared with, and the table at the end."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.faults.runs import Federation, program, weights, write_data
from tests.faults.tally import KEY, Row, Tally, table


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="all runs with faults; otherwise a sample of each kind")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Without a path to this folder on the command line its option does not exist.
    if not config.getoption("--full", default=False):
        full = [item for item in items if item.get_closest_marker("full")]
        items[:] = [item for item in items if not item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=full)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    ended = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    called = [report for report in ended if getattr(report, "when", "") == "call"]
    rows = [Row(*value) for report in called for name, value in report.user_properties if name == KEY]
    if rows:
        terminalreporter.section("faults")
        for line in table(rows):
            terminalreporter.line(line)


@pytest.fixture
def tally(record_property: Callable[[str, object], None]) -> Tally:
    return Tally(record_property)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """(procedure, optimizer, arguments of ``program``) -> weights and the leader's log of a run without faults."""

    @functools.cache
    def run(procedure: str, optimizer: str, **more: Any) -> Any:
        folder = tmp_path_factory.mktemp("undisturbed")
        write_data(folder)
        Federation(folder, program(procedure, optimizer, **more)).run({})
        return weights(folder), json.loads((folder / "leader.json").read_text())

    return run
