"""A finished run goes on to a larger number of epochs, on the learning-rate curve of the longer run."""

from __future__ import annotations

import pytest

from mirl.engine.configuration.config import OptimConfig
from mirl.engine.training.schedule import Durations
from tests.support.runs import records

STEPS_PER_EPOCH = 5  # 44 photographs in batches of 8


@pytest.mark.parametrize("schedule", ["cosine", "step"])
def test_a_finished_run_goes_on_for_more_epochs(schedule, server, photographs, tmp_path):
    common = ["--data", photographs, "--schedule", schedule, "--lr", "1e-3", "--warmup-steps", 1, "--pictures", 0]
    first = server.start(tmp_path, *common, "--epochs", 2, "--out", "short", ranks=1)
    assert first.end(60) == [0], first.output()[-3000:]
    same = server.start(tmp_path, *common, "--epochs", 2, "--out", "short", "--resume", "auto", ranks=1)
    assert same.end(60) == [2] and "is finished: 10 of 10 steps; give more --steps or --epochs" in same.output()
    longer = server.start(tmp_path, *common, "--epochs", 4, "--out", "long", "--resume", "short", ranks=1)
    assert longer.end(60) == [0], longer.output()[-3000:]
    found = {record["step"]: record for record in records(tmp_path / "long") if "loss" in record}
    assert sorted(found) == list(range(2 * STEPS_PER_EPOCH + 1, 4 * STEPS_PER_EPOCH + 1))
    optim = OptimConfig(batch_size=8, epochs=4, lr=1e-3, warmup_steps=1, schedule=schedule)
    curve = Durations(
        total_steps=20, warmup_steps=1, checkpoint_every=1, log_every=1, picture_every=1
    ).schedule(optim)  # fmt: skip
    assert {step: record["lr"] for step, record in found.items()} == {step: curve.lr(step - 1) for step in found}
    if schedule == "step":  # x0.1 from 90 % on, x0.01 from 95 % on, of the 20 steps
        assert found[18]["lr"] == 1e-3 and found[19]["lr"] == pytest.approx(1e-4)
        assert found[20]["lr"] == pytest.approx(1e-5)
    assert found[20]["epoch"] == pytest.approx(20 * 8 / 44)


def test_a_run_whose_lines_are_far_apart_is_recorded_by_time(server, photographs, tmp_path):
    """Between two lines all ranks write a record together, whichever clock runs out first."""
    flags = ["--data", photographs, "--steps", 9, "--log-every", 8, "--lr", "1e-3", "--pictures", 1, "--out", "run"]
    run = server.start(tmp_path, *flags, inject={0: ["record_every_step"]}, ranks=2)
    assert run.end(90) == [0, 0], run.output()[-3000:]
    found = [record for record in records(tmp_path / "run") if "loss" in record]
    assert [record["step"] for record in found] == list(range(1, 10))
    lines = [line for line in (tmp_path / "run" / "log.txt").read_text().splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines if "loss" in line] == ["8/9", "9/9"]
    left = [record["seconds_left"] for record in found]
    assert left[:2] == [None, None] and all(seconds > 0 for seconds in left[2:8])
    assert "left ?" not in "".join(lines)
