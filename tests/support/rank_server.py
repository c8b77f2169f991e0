"""Starts ranks quickly: imports the engine once, then forks a process for each rank of each run.

A rank is a process of its own like any other, killed, stopped and waited for by its id; only the seconds of importing
are shared, and those of unloading it are spared. No launcher watches these ranks, as on a host whose launcher does not
know of a death on another host.

Requests are JSON lines on stdin, answers on stdout:

    {"start": {"ranks": [0, 1], "world_size": 2, "arguments": [...], "environment": {...}, "folder": DIR,
               "entry": "pretrain", "inject": {"1": [NAME, ARGUMENT ...]}}}                       -> [pid, pid]
    {"wait": {"pids": [...], "seconds": 30}}      -> [exit code, or minus the signal, or null while it lives]

Each rank writes to DIR/rank-N.txt and runs in DIR.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from tests.support.launch import CHECKOUT

IMPORTED = (
    "mirl.engine.pretrain", "mirl.engine.configuration.flags", "mirl.engine.pretraining.run", "nvidia.dali.fn",
    "nvidia.dali.plugin.pytorch", "deepspeed.runtime.zero.stage_1_and_2", "torch._dynamo",
)  # fmt: skip


def fork_ranks(start: dict[str, Any], number: int) -> list[int] | None:
    """The ranks' process ids; None in a forked rank."""
    pids = []
    for rank in start["ranks"]:
        pid = os.fork()
        if pid == 0:
            become_rank(start, rank, number)
            return None
        pids.append(pid)
    return pids


def become_rank(start: dict[str, Any], rank: int, number: int) -> None:
    folder = Path(start["folder"])
    os.chdir(folder)
    output = os.open(f"rank-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    for name, value in (("RANK", rank), ("WORLD_SIZE", start["world_size"]), ("LOCAL_RANK", rank)):
        os.environ[name] = str(value)
    # What DeepSpeed's launcher gives on one host: the ranks then meet without a port.
    os.environ |= {"CROSS_SIZE": "1", "LOCAL_SIZE": str(start["world_size"]), "MASTER_PORT": str(40000 + number)}
    os.environ |= start.get("environment", {})
    sys.argv = [str(CHECKOUT / "engine" / f"{start.get('entry', 'pretrain')}.py"), *start["arguments"]]

    from mirl.engine.distributed import stop_request

    stop_request.LAUNCHERS = stop_request.Launchers()
    if str(rank) in start.get("inject", {}):
        from tests.faults import inject

        name, *arguments = start["inject"][str(rank)]
        getattr(inject, name)(*arguments)


def wait(pids: list[int], seconds: float, codes: dict[int, int]) -> list[int | None]:
    deadline = time.monotonic() + seconds
    while True:
        for pid in pids:
            if pid not in codes:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    codes[pid] = os.waitstatus_to_exitcode(status)
        if all(pid in codes for pid in pids) or time.monotonic() > deadline:
            return [codes.get(pid) for pid in pids]
        time.sleep(0.05)


def serve() -> bool:
    """Answer until stdin ends; False in a forked rank."""
    for name in IMPORTED:
        importlib.import_module(name)
    importlib.import_module("deepspeed.ops").__compatible_ops__  # noqa: B018  (asks compilers; every rank would again)
    gc.freeze()  # a collection in a rank would write to, and so copy, the pages that are shared
    codes: dict[int, int] = {}
    stdin, stdout = os.fdopen(0, "r", closefd=False), os.fdopen(os.dup(1), "w")
    for number, line in enumerate(stdin):
        request = json.loads(line)
        if "start" in request:
            answer = fork_ranks(request["start"], number)
            if answer is None:
                return False
        else:
            answer = wait(**request["wait"], codes=codes)
        stdout.write(json.dumps(answer) + "\n")
        stdout.flush()
    return True


def leave(code: int) -> None:
    """Exit as Python does, threads waited for and exit handlers called, but for what comes last: freeing every imported
    module, half a second a rank.
    """
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if not serve():
        from mirl.engine.errors import run_entry_point

        try:
            run_entry_point(importlib.import_module(f"mirl.engine.{Path(sys.argv[0]).stem}").main)
        except SystemExit as end:
            leave(end.code)
