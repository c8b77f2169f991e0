"""kill -9 of a rank: in the middle of a step, and in every phase of a save."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time

from mirl.engine.checkpoints.reader import find_newest_good, verify
from mirl.engine.errors import EXIT_LOST_RANK
from tests.faults.inject import BALLAST_BYTES, PHASES, written_bytes
from tests.support.files import wait_for
from tests.support.runs import ENTRY, TINY, equal_tensors, losses

STEPS = ["--steps", "7", "--checkpoint-every", "1", "--out", "out"]  # an epoch and two steps


def test_a_rank_killed_in_a_step_ends_the_others(server, photographs, tmp_path):
    run = server.start(tmp_path, "--data", photographs, "--steps", "400", "--checkpoint-every", "4", "--out", "out")
    run.wait_for("step   6/400")
    os.kill(run.pids[1], signal.SIGKILL)
    killed = time.monotonic()
    assert run.end(30) == [EXIT_LOST_RANK, -signal.SIGKILL], run.output()[-3000:]
    assert time.monotonic() - killed < 15
    text = run.output()
    assert "error: rank 0: another rank is gone" in text and "--resume auto goes on" in text
    assert "Traceback" not in text
    found, remarks = find_newest_good(tmp_path / "out" / "checkpoints")
    assert (int(found.name.split("-")[1]) % 4, remarks) == (0, [])


def test_a_rank_killed_under_the_launcher_ends_the_run(environment, photographs, tmp_path):
    command = ["deepspeed", "--num_accelerators", "2", ENTRY, *TINY, "--data", str(photographs), "--steps", "400"]
    with (tmp_path / "output.txt").open("w+") as output:
        launcher = subprocess.Popen(
            [*command, "--out", "out"], cwd=tmp_path, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        text = wait_for(tmp_path / "output.txt", "step   6/400")
        ranks = {int(rank): int(pid) for pid, rank in re.findall(r"process (\d+) spawned.*?--local_rank=(\d)", text)}
        os.kill(ranks[1], signal.SIGKILL)
        code = launcher.wait(timeout=60)
    text = (tmp_path / "output.txt").read_text()
    assert code == 256 - signal.SIGKILL, text[-3000:]  # DeepSpeed's launcher gives the first rank's code on, modulo 256
    assert "error: rank 0: another rank is gone" in text


def test_a_rank_killed_in_each_phase_of_a_save_loses_nothing_that_was_saved(server, photographs, tmp_path):
    """One run that dies in its first new save again and again, and is resumed each time; at last it finishes, and is
    the run that was never killed, to the bit.
    """
    arguments = ["--data", photographs, *STEPS, "--resume", "auto"]
    saved = 0
    checkpoints = tmp_path / "out" / "checkpoints"
    for phase, (rank, _, _) in PHASES.items():
        target = saved + (1 if saved else 2)  # the first one leaves a checkpoint to fall back to
        keep = ["--keep-checkpoints", "1" if "removed" in phase else "0"]
        kill = {rank: ["kill_in_save", phase, f"step-{target:08d}"], 1 - rank: ["give_up_after", "0.5"]}
        run = server.start(tmp_path, *arguments, *keep, inject=kill)
        codes = run.end(60)
        assert codes[rank] == -signal.SIGKILL, f"{phase}: {codes}\n{run.output()[-3000:]}"
        assert codes[1 - rank] == EXIT_LOST_RANK, f"{phase}: {codes}\n{run.output(1 - rank)[-3000:]}"
        told = f"resumed from out/checkpoints/step-{saved:08d}" if saved else "FRESH START"
        assert told in run.output(), f"{phase}:\n{run.output()[-3000:]}"
        published = [name in phase for name in ("renamed, the", "pointer is aside", "published")]
        saved = target if any(published) else target - 1
        found, remarks = find_newest_good(checkpoints)
        assert found == checkpoints / f"step-{saved:08d}", f"{phase}: {remarks}"
        assert bool(remarks) == any(published[:2]), f"{phase}: {remarks}"  # the pointer is behind, and that is told
        assert all(verify(path) is None for path in checkpoints.glob("step-*")), phase
        if "being written" in phase:
            (partial,) = checkpoints.glob(".step-*")
            assert 0 < written_bytes(partial) < BALLAST_BYTES
    last = server.start(tmp_path, *arguments)
    assert last.end() == [0, 0], last.output()[-3000:]
    assert not list(checkpoints.glob(".step-*"))  # what the dead left is cleared away
    whole = server.start(tmp_path, "--data", photographs, *STEPS[:-1], "whole")
    assert whole.end() == [0, 0]
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")
    assert equal_tensors(checkpoints / "step-00000007", tmp_path / "whole" / "checkpoints" / "step-00000007")
