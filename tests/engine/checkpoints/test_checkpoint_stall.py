"""How long training stands still for a checkpoint."""

from __future__ import annotations

import sys

import pytest

from mirl.engine.pretraining.recipes import recipe
from tests.support.runs import ENTRY, events, records


@pytest.mark.slow
def test_the_demo_stands_still_for_at_most_one_percent(run, photographs, tmp_path):
    """Model, batch and interval of the demo recipe; the run is cut to six steps, so the share is worked out here."""
    flags = ["--data", photographs, "--steps", "6", "--batch-size", "32", "--checkpoint-every", "3", "--log-every", "1"]
    result = run(sys.executable, ENTRY, *flags, "--pictures", "0", "--no-tensorboard", "--out", "out")
    assert result.returncode == 0, result.stderr[-3000:]
    saved = events(tmp_path / "out", "checkpoint")
    assert [event["path"].rsplit("/")[-1] for event in saved] == ["step-00000003", "step-00000006"]
    step_ms = sorted(record["step_ms"] for record in records(tmp_path / "out") if "step_ms" in record)[3]
    share = max(event["stall_ms"] for event in saved) / (recipe("tiny").run.checkpoint_every * step_ms)
    # Half the demo's batch makes the steps shorter than its own, so its own share is smaller still.
    assert 0 < share < 0.01
    assert all(0 < event["stall_percent"] < 100 for event in saved)
