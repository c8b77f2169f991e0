"""Processes of one group: every rank runs the same module, and rank 0's output is what a failure shows."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from typing import Any

from tests.support.launch import CHECKOUT, launch_environment

# The file is named for the parent of the ranks and for their port, which nobody listens on: a new one for each group.
_ports = itertools.count(30000)


def run_ranks(module: str, world_size: int, settings: Any, *arguments: str, timeout: float = 300) -> None:
    """Run ``python -m module`` in ``world_size`` processes, with ``settings`` as JSON on their standard input.

    The ranks meet through a file, as under the deepspeed launcher on one host, so that no port can be taken meanwhile.

    Raises:
        AssertionError: a rank ended with another exit code than 0; the message ends with what it printed.
    """
    common = launch_environment() | {
        "WORLD_SIZE": str(world_size),
        "LOCAL_SIZE": str(world_size),
        "CROSS_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(next(_ports)),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=CHECKOUT,
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    for process in processes:
        process.stdin.write(json.dumps(settings))
        process.stdin.close()
        process.stdin = None
    outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs[0][-3000:] + outputs[-1][-3000:]
