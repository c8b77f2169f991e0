"""A rank that hangs: stopped in its tracks by SIGSTOP, as one whose disk, driver or network never answers."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest

from mirl.engine.checkpoints.reader import find_newest_good
from mirl.engine.distributed.watchdog import stacks
from mirl.engine.errors import EXIT_HUNG
from tests.support.launch import CHECKOUT


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


SLOW = """
import sys, time
from mirl.engine.distributed.watchdog import Watchdog
minutes, beats, pause = map(float, sys.argv[1:])
with Watchdog(minutes=minutes, rank=0) as watchdog:
    for step in range(int(beats)):
        time.sleep(pause)
        watchdog.beat(f"step {step}")
print("done")
"""


@pytest.mark.parametrize(
    ("minutes", "beats", "pause", "ends"),
    [(1 / 60, 8, 0.2, 0), (0, 1, 1.5, 0), (0.5 / 60, 1, 4, EXIT_HUNG)],
    ids=["a slow run is left alone", "zero turns it off", "a hung run is ended"],
)
def test_only_a_run_that_stands_still_is_ended(minutes, beats, pause, ends, run):
    ended = run(sys.executable, "-c", SLOW, str(minutes), str(beats), str(pause), cwd=CHECKOUT)
    assert (ended.returncode, ended.stdout) == (ends, "" if ends else "done\n"), ended.stderr[-2000:]


def test_stacks_name_every_thread():
    text = stacks()
    assert "test_stacks_name_every_thread" in text and "Current thread" in text


def test_a_negative_limit_is_refused():
    from mirl.engine.configuration.config import RunConfig

    with pytest.raises(ValueError, match="watchdog_minutes is -1"):
        RunConfig(watchdog_minutes=-1)
