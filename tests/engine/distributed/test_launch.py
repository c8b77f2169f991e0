"""What a rank makes of the launcher's environment."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from mirl.engine.distributed.launch import cores_per_rank
from tests.support.launch import launch_environment


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, 6),
        # srun has given each of its tasks 12 cores of its own, or has not bound them at all.
        ({"SLURM_NTASKS": "2", "WORLD_SIZE": "2", "SLURM_CPUS_PER_TASK": "12"}, 12),
        ({"SLURM_NTASKS": "2", "WORLD_SIZE": "2", "SLURM_CPUS_PER_TASK": "4"}, 6),
        # torchrun with two ranks inside of one task.
        ({"SLURM_NTASKS": "1", "WORLD_SIZE": "2", "SLURM_CPUS_PER_TASK": "12"}, 6),
    ],
    ids=["no Slurm", "bound tasks", "unbound tasks", "torchrun in a task"],
)
def test_cores_are_shared_once(monkeypatch, environment, expected) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    for name in ("SLURM_NTASKS", "WORLD_SIZE", "SLURM_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cores_per_rank(2) == expected


@pytest.mark.parametrize(("task", "lines"), [("0", 1), ("1", 0)])
def test_one_rank_of_srun_tells_what_is_wrong(task, lines) -> None:
    """Also before the ranks have met: they read srun's variables, as there is no RANK yet. All have what is wrong."""
    command = "from mirl import UserError\nfrom mirl.engine.errors import run_entry_point\n"
    command += "def main(): raise UserError('so it is')\n"
    result = subprocess.run(
        [sys.executable, "-c", command + "run_entry_point(main)"],
        env=launch_environment() | {"SLURM_PROCID": task, "SLURM_NTASKS": "2"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.splitlines() == ["error: so it is"] * lines
