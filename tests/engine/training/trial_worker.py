"""Pre-training runs whose estimate believes in much memory, under a real limit of the address space, or a made failure.

usage: python -m tests.engine.training.trial_worker limited|injected FOLDER FLAG ...

limited: three runs in one process. "auto" finds its micro-batch while the limit holds, "given" has the one that it must
find, and "later" meets the limit in its first step. injected: one run, in whose first trial step rank 1 fails.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from mirl.engine.accounting.free_memory import FreeMemory
from mirl.engine.errors import run_entry_point
from mirl.engine.pretrain import main
from mirl.engine.training import fitting, run, trial

TRIAL_MIB, STEP_MIB = 500, 300  # above what the process has when they are set


@contextmanager
def limited(mib: int) -> Iterator[None]:
    status = Path("/proc/self/status").read_text()
    size = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmSize:"))
    resource.setrlimit(resource.RLIMIT_AS, (size * 1024 + mib * 2**20, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def under_limits(folder: str, flags: list[str]) -> None:
    try_micro_batch, train = run.try_micro_batch, run.Trainer.run

    def tried(*arguments):
        with limited(TRIAL_MIB):
            return try_micro_batch(*arguments)

    def trained(trainer):
        with limited(STEP_MIB):
            train(trainer)

    run.try_micro_batch = tried
    main([*flags, "--micro-batch", "auto", "--out", f"{folder}/auto"])
    main([*flags, "--micro-batch", "22", "--out", f"{folder}/given"])
    run.Trainer.run = trained
    main([*flags, "--micro-batch", "44", "--out", f"{folder}/later"])


def injected(folder: str, flags: list[str]) -> None:
    trial_step, failures = trial.trial_step, [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")]

    def tried(*arguments):
        if os.environ["RANK"] == "1" and failures:
            raise failures.pop()
        return trial_step(*arguments)

    trial.trial_step = tried
    main([*flags, "--micro-batch", "auto", "--out", f"{folder}/auto"])


if __name__ == "__main__":
    fitting.free_memory = lambda *_: FreeMemory(2.0**40, "believed")
    what = under_limits if sys.argv[1] == "limited" else injected
    run_entry_point(lambda: what(sys.argv[2], sys.argv[3:]))
