"""Collects what the benchmarks measure; the JSON is on disk after each case, table and picture when the run ends."""

from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

from benchmarks.measure import device
from benchmarks.report import Results

RESULTS = Path(__file__).resolve().parent / "results"
_KEY = pytest.StashKey[Results]()
_STARTED = datetime.now(UTC)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--results-dir", type=Path, default=RESULTS, help="where DEVICE_DATE.json, .md and .png are written"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_KEY] = Results()
    config.stash[_KEY].keep(config.getoption("--results-dir"), _STARTED)


def pytest_report_header(config: pytest.Config) -> str:
    if device().type == "cpu":
        return "benchmarks: no GPU here, measuring the plain-torch CPU path at small sizes"
    return f"benchmarks: {torch.cuda.get_device_name(0)}"


@pytest.fixture
def results(request: pytest.FixtureRequest) -> Results:
    return request.config.stash[_KEY]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)  # a CPU figure is of one core, whatever the machine


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    results = config.stash[_KEY]
    if results.empty:
        return
    written = results.write(config.getoption("--results-dir"), _STARTED)
    terminalreporter.section("kernel results")
    terminalreporter.write_line(results.table())
    for path in written:
        terminalreporter.write_line(f"wrote {path}")
