"""Whole runs whose images grow: the sizes come at their steps, and a resumed run is the uninterrupted one."""

from __future__ import annotations

import pytest

from mirl.engine.checkpoints.reader import CheckpointReader
from mirl.engine.pretraining.replay import replay
from tests.support.runs import equal_tensors, events, losses

# Steps 1 to 3 are of 16 pixels, 4 and 5 of 24, step 6 is of 32.
FLAGS = ["--steps", "6", "--warmup-steps", "1", "--image-sizes", "16", "24@0.5", "32@0.8", "--checkpoint-every", "1",
         "--keep-checkpoints", "0"]  # fmt: skip
LAST = "checkpoints/step-00000006"


def test_a_resumed_run_is_the_uninterrupted_one_whatever_the_sizes_around(server, photographs, tmp_path):
    flags = ["--data", photographs, *FLAGS]
    run = server.start(tmp_path, *flags, "--picture-every", "1", "--out", "whole", ranks=1)
    assert run.end() == [0], run.output()[-3000:]
    whole = tmp_path / "whole"
    assert "image sizes 16x16 in steps 1 to 3, 24x24 in steps 4 to 5, 32x32 in steps 6 to 6" in run.output()
    assert "step 4: images of 24x24 from here on, 9 patches, 2 visible" in run.output()
    assert [(event["step"], event["height"], event["width"]) for event in events(whole, "image_size")] == [
        (4, 24, 24), (6, 32, 32),
    ]  # fmt: skip
    assert len(list((whole / "pictures").glob("*.png"))) == 6
    # The bands of losses and norms begin anew with each size, whose losses stand at a level of their own.
    states = [CheckpointReader(whole / f"checkpoints/step-{step:08d}").state for step in range(1, 7)]
    assert [len(state["recent_losses"]) for state in states] == [1, 2, 3, 1, 2, 1]
    # From before a change, and from one on other ranks and in another stage; without the pictures, for which the model
    # took the whole size after every step.
    for step, ranks, stage in ((2, 1, "zero2"), (3, 2, "zero3")):
        name = f"from-{step}"
        resumed = [*flags, "--pictures", "0", "--resume", whole / f"checkpoints/step-{step:08d}"]
        run = server.start(tmp_path, *resumed, "--out", name, "--deepspeed-config", stage, ranks=ranks)
        assert run.end() == [0] * ranks, run.output()[-3000:]
        found = losses(tmp_path / name)
        wanted = {step: losses(whole)[step] for step in found}
        if ranks == 1:
            assert found == wanted and equal_tensors(tmp_path / name / LAST, whole / LAST)
        else:  # the batch is summed in two halves: fp32 in another order
            assert found == pytest.approx(wanted, rel=1e-5)
    assert "step 4: images of 24x24" in (tmp_path / "from-3" / "log.txt").read_text()
    found = replay(whole, 5, device="cpu")  # computed again, from the step before
    assert (found["difference"], found["loss"]) == (0, losses(whole)[5])
