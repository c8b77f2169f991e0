"""How often the ranks of a run agree: each agreement waits for the slowest rank, between a step and the next."""

from __future__ import annotations

from pathlib import Path

import pytest

import mirl
from mirl.engine.distributed.launch import Ranks

STEPS = 6


@pytest.mark.parametrize("accumulation", [1, 2])
def test_ranks_agree_once_for_each_micro_batch_and_once_at_the_end(
    accumulation: int, monkeypatch: pytest.MonkeyPatch, photographs: Path, tmp_path: Path
) -> None:
    agreements: list[list[float]] = []
    agree = Ranks.agree_max
    monkeypatch.setattr(Ranks, "agree_max", lambda self, values: agreements.append(values) or agree(self, values))
    config = mirl.recipe(
        "tiny", data=str(photographs), out=str(tmp_path / "run"), steps=STEPS, warmup_steps=1, batch_size=4,
        micro_batch=4 // accumulation, precision="fp32", image_size=32, depth=4, width=32, heads=2, decoder_width=32,
        decoder_heads=2, log_every=1, pictures=0, tensorboard=False, loader_threads=1, watchdog_minutes=0.0,
        checkpoint_every=STEPS,
    )  # fmt: skip
    mirl.pretrain(config)
    of_steps = [values for values in agreements if len(values) > 1]
    assert len(of_steps) == STEPS + 1
    assert len(agreements) - len(of_steps) <= STEPS * (accumulation - 1) + 2  # and about the one checkpoint
