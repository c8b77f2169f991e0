"""Shared by all tests: tiers by mechanism, one thread, runs as a user would start them, and a small data set."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.support.launch import CHECKOUT, launch_environment
from tests.support.runs import write_photographs
from tests.support.started_ranks import MARK, ORPHAN_LIMIT_S, RankServer, marked_processes

# What a test needs decides how long it takes. `make quick` leaves out what stands here or uses one of the fixtures.
TIERS = {
    "tests/faults": "ranks",
    "tests/golden": "ranks",
    "tests/systems": "ranks",
    "tests/engine/distributed/test_waiting.py": "ranks",
    "tests/engine/distributed/test_zero.py": "ranks",
    "tests/engine/training/choices/test_choice_of_ranks.py": "ranks",
    "tests/engine/transfer/detection/test_ranks.py": "ranks",
    "tests/engine/transfer/test_ranks.py": "ranks",
    "tests/dataloaders/test_memory.py": "process",
    "tests/dataloaders/test_package.py": "process",
    "tests/engine/accounting/test_memory.py": "process",
    "tests/engine/accounting/test_run_memory.py": "process",
    "tests/engine/pretraining": "process",
    "tests/engine/transfer/detection/test_run.py": "process",
    "tests/engine/test_devices.py": "process",
    "tests/engine/test_errors.py": "process",
    "tests/engine/distributed/test_deepspeed_patches.py": "process",
    "tests/engine/distributed/test_launch.py": "process",
    "tests/dataloaders/tools/test_tools.py": "process",
    "tests/kernels/test_interpreted.py": "process",
    "tests/engine/training/tracking/test_real_trackers.py": "process",
    "tests/engine/training/test_compile.py": "compile",
    "tests/kernels/test_machine_code": "compile",
    "tests/dry_run/test_fake_step.py": "slow",
    "tests/dry_run/test_budget.py": "slow",
}
# Tests of times have the machine to themselves: other workers wait.
ALONE = (
    "tests/dataloaders/test_memory.py",
    "tests/engine/checkpoints/test_checkpoint_stall.py",
    "tests/engine/commands/test_summary.py",
    "tests/engine/training/choices",
)
TIER_OF_FIXTURE = {"server": "ranks", "run": "process"}


# With several workers the files that take longest come first, so that none is left alone at the end with one of them.
LONGEST_FIRST = ("ranks", "process", "compile", "slow")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="needs a CUDA GPU; torch.cuda.is_available() is False here")
    for item in items:
        place = str(item.path.relative_to(CHECKOUT))
        tiers = {tier for prefix, tier in TIERS.items() if place.startswith(prefix)}
        tiers |= {tier for fixture, tier in TIER_OF_FIXTURE.items() if fixture in getattr(item, "fixturenames", ())}
        if place.startswith(ALONE):
            item.add_marker("alone")
        for tier in tiers:
            item.add_marker(tier)
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(skip)
    order: dict[Path, int] = {}
    for item in items:
        place = next((place for place, tier in enumerate(LONGEST_FIRST) if tier in item.keywords), len(LONGEST_FIRST))
        order[item.path] = min(place, order.get(item.path, place))
    items.sort(key=lambda item: order[item.path])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Run a test, with its fixtures, beside those of other workers, or alone if it is one of `ALONE`."""
    if not hasattr(item.config, "workerinput"):
        return (yield)
    places = Path(tempfile.gettempdir())
    with (
        (places / f"mirl-tests-{os.getuid()}.queue").open("w") as queue,
        (places / f"mirl-tests-{os.getuid()}.turn").open("w") as turn,
    ):
        # Who waits stands at the head of the queue, so that the others' next tests do not go before it.
        fcntl.flock(queue, fcntl.LOCK_EX)
        fcntl.flock(turn, fcntl.LOCK_EX if "alone" in item.keywords else fcntl.LOCK_SH)
        fcntl.flock(queue, fcntl.LOCK_UN)
        try:
            return (yield)
        finally:
            fcntl.flock(turn, fcntl.LOCK_UN)  # by hand: a process that the test has forked holds the file too


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    # Small tensors: threads cost more than they bring, and the order of sums stays the same on every machine.
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def photographs(tmp_path_factory) -> Path:
    """A folder of small photographs for whole runs."""
    return write_photographs(tmp_path_factory.mktemp("photographs"))


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``run(*command, cwd=..., timeout=..., env={...})``: a command as a user would type it, output captured, no
    traceback hidden.
    """

    def call(*command: str | Path, cwd: Path | None = None, timeout: float = 240, env: dict[str, str] | None = None):
        return subprocess.run(
            [str(part) for part in command],
            cwd=cwd or tmp_path,
            env=launch_environment() | (env or {}),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return call


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    """The environment of what a test starts by hand; fails the test if any of it still lives 30 s after the test."""
    mark = uuid.uuid4().hex
    yield launch_environment() | {MARK: mark}
    deadline = time.monotonic() + ORPHAN_LIMIT_S
    while (left := marked_processes(mark)) and time.monotonic() < deadline:
        time.sleep(0.2)
    commands = [" ".join(process.cmdline()[:4]) for process in left]
    for process in left:
        process.kill()
    assert not commands, f"still alive {ORPHAN_LIMIT_S:g} s after the run: {commands}"


@pytest.fixture(scope="session")
def _server() -> Iterator[RankServer]:
    server = RankServer()
    yield server
    server.close()


@pytest.fixture
def server(_server: RankServer) -> Iterator[RankServer]:
    """Fails the test if a rank it started still lives 30 s after the test."""
    _server.started = []
    yield _server
    codes = _server.ask({"wait": {"pids": _server.started, "seconds": ORPHAN_LIMIT_S}})
    left = [pid for pid, code in zip(_server.started, codes, strict=True) if code is None]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, f"ranks still alive {ORPHAN_LIMIT_S:g} s after the run: {left}"
