"""SIGTERM to the `deepspeed` runner, to its launch.py and to the whole process group: each ends the run in order.

That an interrupted and resumed run equals the uninterrupted one to the bit, and that SIGTERM to every rank gives exit
code 75, is held by tests/engine/pretraining/test_pretrain.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from mirl.engine.checkpoints.reader import find_newest_good
from mirl.engine.errors import EXIT_PREEMPTED
from tests.support.runs import ENTRY, TINY, events
from tests.support.started_ranks import MARK, marked_processes

LIMIT_S = 30.0


def start(folder: Path, environment: dict[str, str], ranks: int, *arguments: str) -> subprocess.Popen:
    """`deepspeed` as the leader of a process group of its own, output in folder/output.txt."""
    command = ["deepspeed", "--num_accelerators", str(ranks), ENTRY, *TINY, "--steps", "1000000", "--warmup-steps", "1"]
    with (folder / "output.txt").open("w") as output:
        return subprocess.Popen(
            [*command, "--checkpoint-every", "100000", "--out", "out", *arguments],
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


@pytest.mark.slow
@pytest.mark.parametrize("receiver", ["runner", "launch.py", "group"])
def test_sigterm_saves_and_leaves_within_30_s(receiver, environment, photographs, tmp_path):
    ranks = 2 if receiver == "launch.py" else 1  # launch.py ends its ranks itself
    runner = start(tmp_path, environment, ranks, "--data", str(photographs))
    output = tmp_path / "output.txt"
    deadline = time.monotonic() + 300  # four processes import DeepSpeed, on whatever machine
    while "step       5/" not in output.read_text():
        assert time.monotonic() < deadline and runner.poll() is None, output.read_text()[-3000:]
        time.sleep(0.05)
    (launcher,) = psutil.Process(runner.pid).children()
    assert "deepspeed.launcher.launch" in launcher.cmdline()
    sent = time.monotonic()
    if receiver == "group":
        os.killpg(runner.pid, signal.SIGTERM)
    else:
        os.kill({"runner": runner.pid, "launch.py": launcher.pid}[receiver], signal.SIGTERM)
    code = runner.wait(timeout=60)
    while marked_processes(environment[MARK]):
        assert time.monotonic() - sent < LIMIT_S, output.read_text()[-3000:]
        time.sleep(0.1)
    text = output.read_text()
    # The runner has no handler, and launch.py ends its own SIGTERM with 1, whatever its workers leave with.
    assert code == (1 if receiver == "launch.py" else -signal.SIGTERM)
    reason = "the launcher is gone" if receiver == "runner" else "SIGTERM came"
    assert f"stopped: {reason} after step" in text and "--resume auto goes on" in text, text[-3000:]
    (stopped,) = events(tmp_path / "out", "stopped")
    assert stopped["exit_code"] == EXIT_PREEMPTED
    found, remarks = find_newest_good(tmp_path / "out" / "checkpoints")
    assert (found.name, remarks) == (f"step-{stopped['step']:08d}", [])
    assert "Traceback" not in text
