"""Shared by all tests: the `gpu` marker, one thread, runs as a user would start them, and a small data set."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support.launch import launch_environment
from tests.support.runs import write_photographs


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU; torch.cuda.is_available() is False here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


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
