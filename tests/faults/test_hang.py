"""A rank that hangs: stopped in its tracks by SIGSTOP, as one whose disk, driver or network never answers."""

from __future__ import annotations

import os
import signal
import time

import pytest

from mirl.engine.checkpoints.reader import find_newest_good
from mirl.engine.distributed.watchdog import Watchdog, stacks
from mirl.engine.errors import EXIT_HUNG


def test_ranks_that_wait_for_a_hung_one_show_their_stacks_and_end(server, photographs, tmp_path):
    run = server.start(
        tmp_path, "--data", photographs, "--steps", "4000", "--checkpoint-every", "4", "--out", "out",
        "--watchdog-minutes", "0.05",
    )  # fmt: skip
    run.wait_for("step    6/4000")
    os.kill(run.pids[1], signal.SIGSTOP)
    stopped = time.monotonic()
    while run.end(0)[0] is None:
        assert time.monotonic() - stopped < 20, "the watchdog of rank 0 did not act"
        time.sleep(0.2)
    os.kill(run.pids[1], signal.SIGCONT)  # the hang is over: nobody is left to go on with
    assert run.end(20)[0] == EXIT_HUNG and run.end(20)[1] not in (0, None)
    text = run.output()
    assert "[rank 0] hung: nothing was finished for" in text and "--watchdog-minutes 0.05" in text
    assert "[rank 0] Thread 0x" in text and "trainer.py" in text  # where the loop stands, too
    found, remarks = find_newest_good(tmp_path / "out" / "checkpoints")
    assert found is not None and not remarks


def test_a_slow_run_is_left_alone_and_zero_turns_it_off():
    with Watchdog(minutes=0.5 / 60, rank=0) as watchdog:
        for step in range(8):
            time.sleep(0.1)
            watchdog.beat(f"step {step}")
    with Watchdog(minutes=0, rank=0):
        time.sleep(0.05)


def test_stacks_name_every_thread():
    text = stacks()
    assert "test_stacks_name_every_thread" in text and "Current thread" in text


def test_a_negative_limit_is_refused():
    from mirl.engine.configuration.config import RunConfig

    with pytest.raises(ValueError, match="watchdog_minutes is -1"):
        RunConfig(watchdog_minutes=-1)
