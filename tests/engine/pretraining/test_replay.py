"""A step that is computed again is the step that was logged, and a poisoned image is found in it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

import mirl
from mirl.engine.cli import dispatch
from mirl.engine.pretraining.replay import replay, steps_not_taken
from mirl.errors import UserError
from tests.support.runs import records

SMALL = {
    "warmup_steps": 1, "batch_size": 4, "precision": "fp32", "image_size": 32, "depth": 4, "width": 32, "heads": 2,
    "decoder_width": 32, "decoder_heads": 2, "pictures": 0, "tensorboard": False, "loader_threads": 1,
    "watchdog_minutes": 0.0, "log_every": 1, "checkpoint_every": 2, "cpu_threads": 1, "steps": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path]:
    """A run of four steps on eight float32 arrays, with checkpoints after the second and the fourth; and its data."""
    root = tmp_path_factory.mktemp("replayed")
    data, rng = root / "data", np.random.default_rng(0)
    data.mkdir()
    for number in range(8):
        np.save(data / f"{number}.npy", rng.random((40, 40, 3), dtype=np.float32))
    return mirl.pretrain(mirl.recipe("tiny", data=str(data), out=str(root / "run"), **SMALL)), data


def contents(run: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_step_is_the_logged_one_to_the_bit_then_a_poisoned_image_is_named(trained, tmp_path, capsys):
    run, data = trained
    before, written = contents(run), tmp_path / "step.json"
    assert dispatch(["replay", str(run), "4", "--device", "cpu", "--json", str(written)]) == 0
    found = json.loads(written.read_text())
    logged = next(record for record in records(run) if record.get("step") == 4 and "loss" in record)
    # One rank, one thread, the same micro-batch: no sum is in another order. Step 3 was taken again, too.
    assert found["checkpoint"].endswith("step-00000002") and found["difference"] == 0
    assert (found["loss"], found["gradient_norm"], found["lr"]) == (
        logged["loss"], logged["gradient_norm"], logged["lr"]
    )  # fmt: skip
    assert found["first_nonfinite_activation"] is None and found["first_nonfinite_gradient"] is None
    blocks = {row["block"]: row for row in found["blocks"]}
    assert {"encoder.blocks.3", "decoders.1.blocks.0", "rest"} < set(blocks)
    assert all(row["largest_activation"] > 0 for name, row in blocks.items() if name != "rest")
    # The log's norm adds squares up in float32 over all weights, that of the blocks in float64.
    whole = math.hypot(*(row["gradient_norm"] for row in found["blocks"]))
    assert whole == pytest.approx(logged["gradient_norm"], rel=1e-4)
    assert "first gradient that is not finite: none" in capsys.readouterr().out

    poisoned = Path(found["files"][1])
    assert poisoned.parent == data
    np.save(poisoned, np.full((40, 40, 3), 1e30, np.float32))
    again = replay(run, 4, device="cpu")
    assert again["first_nonfinite_activation"] == "encoder.blocks.0" and str(poisoned) in again["files"]
    assert not again["applied"] and again["first_nonfinite_gradient"] is not None
    assert contents(run) == before


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("0", "step is 0: give 1"),
        ("five", "step is 'five': give a whole"),
        ("2", "step is 2 and no whole checkpoint"),
        ("5", "step is 5 and .* has 4 steps: give one"),
    ],
)  # fmt: skip
def test_a_step_that_cannot_be_replayed_is_one_line(trained, step, message, tmp_path):
    before = contents(trained[0])
    with pytest.raises(UserError, match=f"^{message}[^\n]*$"):
        dispatch(["replay", str(trained[0]), step, "--device", "cpu", "--json", str(tmp_path / "none.json")])
    assert contents(trained[0]) == before and not list(tmp_path.iterdir())


def test_a_folder_without_a_run_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"^run is [^\n]*, which holds no run: give"):
        dispatch(["replay", str(tmp_path), "3", "--device", "cpu"])


def test_steps_that_the_run_did_not_take_are_those_of_its_events(tmp_path):
    events = [
        {"step": 4, "loss": 1.0}, {"event": "spike", "step": 5, "skipped": True, "loss": 9.0},
        {"event": "spike", "step": 7, "skipped": False, "loss": 9.0},
        {"event": "rollback", "step": 9, "to_step": 6, "left_out": [8, 9]},
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + '{"step": 1')
    assert steps_not_taken(tmp_path) == {5, 8, 9}
