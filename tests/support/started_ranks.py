"""Ranks that are started quickly, killed and waited for, and the processes that a test left behind."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.support.launch import CHECKOUT, launch_environment
from tests.support.runs import TINY

MARK = "MIRL_FAULT_TEST"
ORPHAN_LIMIT_S = 30.0


def marked_processes(mark: str) -> list[psutil.Process]:
    """Every process that was started, at whatever depth, by the test of this mark."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


@dataclass
class Run:
    """Ranks that were started; `end` waits for them."""

    server: RankServer
    pids: list[int]
    ranks: list[int]
    folder: Path

    def output(self, rank: int = 0) -> str:
        path = self.folder / f"rank-{rank}.txt"
        return path.read_text() if path.exists() else ""

    def wait_for(self, text: str, rank: int = 0, seconds: float = 180) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.output(rank):
            assert time.monotonic() < deadline, f"{text!r} did not come:\n{self.output(rank)[-3000:]}"
            assert self.end(0)[self.ranks.index(rank)] is None, f"ended before {text!r}:\n{self.output(rank)[-3000:]}"
            time.sleep(0.01)

    def end(self, seconds: float = 180) -> list[int | None]:
        """Exit code of each rank, minus the signal that ended it, None if it lives on."""
        return self.server.ask({"wait": {"pids": self.pids, "seconds": seconds}})


class RankServer:
    """tests/support/rank_server.py behind a function."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.rank_server"],
            cwd=CHECKOUT,
            env=launch_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.started: list[int] = []

    def ask(self, request: dict) -> list:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(
        self,
        folder: Path,
        *arguments: str | Path,
        ranks: int | list[int] = 2,
        world_size: int = 0,
        tiny: bool = True,
        **start: object,
    ) -> Run:
        """``engine/pretrain.py`` of the tiny model with ``arguments`` on each rank, in ``folder``.

        entry="finetune": ``engine/finetune.py`` instead, with ``arguments`` alone; so too for tiny=False.
        """
        numbers = list(range(ranks)) if isinstance(ranks, int) else ranks
        request = {
            "ranks": numbers,
            "world_size": world_size or len(numbers),
            "arguments": [
                *(TINY if tiny and start.get("entry", "pretrain") == "pretrain" else ()),
                *map(str, arguments),
            ],
            "folder": str(folder),
            **start,
        }
        pids = self.ask({"start": request})
        self.started += pids
        return Run(server=self, pids=pids, ranks=numbers, folder=folder)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=30)
