"""Shared by all tests: the `gpu` marker, one thread, and the environment in which runs are started."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

CHECKOUT = Path(__file__).resolve().parents[1]


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


def launch_environment() -> dict[str, str]:
    """The environment of a user's shell with this interpreter's commands on PATH and no rank of an outer launcher."""
    dropped = {
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_SIZE",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "TRITON_INTERPRET",
    }
    kept = {name: value for name, value in os.environ.items() if name not in dropped and not name.startswith("PYTEST_")}
    return kept | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}", "OMP_NUM_THREADS": "1"}
