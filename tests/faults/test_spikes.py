"""A step that leaves the band of the steps before it: a real image of a hundredfold contrast on one of two ranks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.faults.test_bad_data import KEEP, image_of
from tests.support.runs import equal_tensors, events, losses, records

SPIKE, STEPS = 5, 6
FLAGS = ["--steps", STEPS, "--warmup-steps", "1", "--spike-window", "8", "--checkpoint-every", "1", *KEEP]


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folder of 44 arrays, and the one that rank 1 shows in step `SPIKE`, whose numbers are finite and far out."""
    data = tmp_path_factory.mktemp("poisoned")
    generator = np.random.default_rng(0)
    bad = data / f"{image_of(SPIKE, 1, 44):03d}.npy"
    for number in range(44):
        path = data / f"{number:03d}.npy"
        pixels = generator.standard_normal((40, 40, 3), dtype=np.float32)
        np.save(path, pixels * 100 if path == bad else pixels)
    return data, bad


@pytest.mark.parametrize("zero", [1, 2])
def test_a_poisoned_image_is_found_and_its_step_not_taken(zero, server, poisoned, tmp_path):
    data, bad = poisoned
    flags = ["--data", data, *FLAGS, "--deepspeed-config", f"zero{zero}"]
    skips = server.start(tmp_path, *flags, "--on-spike", "skip", "--out", "out")
    assert skips.end() == [0, 0], skips.output()[-3000:]
    (spike,) = events(tmp_path / "out", "spike")
    assert (spike["step"], spike["skipped"]) == (SPIKE, True)
    assert spike["gradient_norm"] > spike["most_gradient_norm"] or spike["loss"] > spike["most_loss"]
    assert spike["grown"]["block"] == "encoder.blocks.0" and spike["grown"]["rank"] == 1
    assert spike["grown"]["image"] == str(bad)
    files = json.loads(Path(tmp_path, spike["files"]).read_text())
    shown = [[image_of(SPIKE, rank, 44)] for rank in (0, 1)]
    assert [ranks["files"][0] for ranks in files["ranks"]] == [str(data / f"{first:03d}.npy") for (first,) in shown]
    assert [len(ranks["files"]) for ranks in files["ranks"]] == [4, 4]
    assert f"step {SPIKE} left its band, and was not taken: loss" in skips.output()
    (skipped,) = events(tmp_path / "out", "skipped_step")
    assert skipped["step"] == SPIKE
    known = {record["step"]: record for record in records(tmp_path / "out") if "loss" in record}
    assert [known[step]["skipped_steps"] for step in (SPIKE - 1, SPIKE, STEPS)] == [0, 1, 1]
    # The loss and norm of the band are those of the log.
    assert known[SPIKE]["loss"] == pytest.approx(spike["loss"], rel=1e-6)
    assert known[SPIKE]["gradient_norm"] == spike["gradient_norm"]
    before, at, after = (tmp_path / "out" / "checkpoints" / f"step-{SPIKE + more:08d}" for more in (-1, 0, 1))
    assert equal_tensors(before, at) and not equal_tensors(at, after)


@pytest.mark.parametrize("zero", [1, 2])
def test_a_rollback_goes_on_as_if_the_step_had_been_skipped(zero, server, poisoned, tmp_path):
    """Weights, moments, the average and its rate, and the order of images: all of them are those of before."""
    flags = ["--data", poisoned[0], *FLAGS, "--deepspeed-config", f"zero{zero}", "--ema", "0.9", "--checkpoint-every"]
    skips = server.start(tmp_path, *flags, "100", "--on-spike", "skip", "--out", "skips")
    assert skips.end() == [0, 0], skips.output()[-3000:]
    back = server.start(tmp_path, *flags, "3", "--on-spike", "rollback", "--out", "back")
    assert back.end() == [0, 0], back.output()[-3000:]
    out = tmp_path / "back"
    (event,) = events(out, "rollback")
    assert (event["step"], event["to_step"], event["left_out"], event["in_a_row"]) == (SPIKE, 3, [SPIKE], 1)
    assert f"from where the run goes on without step {SPIKE} (rollback 1 in a row)" in back.output()
    last = f"checkpoints/step-{STEPS:08d}"
    assert equal_tensors(tmp_path / "skips" / last, out / last)
    states = [json.loads((folder / last / "state.json").read_text()) for folder in (tmp_path / "skips", out)]
    assert [state["applied_steps"] for state in states] == [STEPS - 1] * 2
    assert losses(out)[STEPS] == losses(tmp_path / "skips")[STEPS]
