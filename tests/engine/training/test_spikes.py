"""The band of a step's loss and gradient norm, the gate, and how large blocks' activations are."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch

import mirl
from mirl.dataloaders import TrainLoader
from mirl.engine.distributed.ds_engine import TrainEngine
from mirl.engine.distributed.launch import Ranks
from mirl.engine.distributed.spike_gate import SeenStep, SpikeGate
from mirl.engine.errors import Diverged
from mirl.engine.models import MIRL, ModelConfig
from mirl.engine.training.block_scales import BlockScale, block_scales, first_grown
from mirl.engine.training.run_folder import Progress
from mirl.engine.training.run_log import RunLog
from mirl.engine.training.spikes import LOSS_FLOOR, NORM_FLOOR, Spike, SpikeWatch, band_limit
from mirl.engine.training.task import Task
from tests.support.runs import events


def test_the_band_is_median_and_deviation_of_logarithms():
    values = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0]
    # Logarithms to base 2 are 0 ... 7: their median is 3.5, the distances from it 0.5, 0.5, 1.5, 1.5, 2.5 ...:
    # median 2.
    expected = 2 ** (3.5 + 6 * 1.4826 * 2)
    assert band_limit(values, 8, NORM_FLOOR) == pytest.approx(expected, rel=1e-6)
    assert band_limit(values[::-1], 8, NORM_FLOOR) == band_limit(values, 8, NORM_FLOOR)


def test_the_band_begins_after_half_of_its_window_and_has_a_least_width():
    assert band_limit([3.0] * 7, 16, LOSS_FLOOR) == math.inf
    assert band_limit([3.0] * 8, 16, LOSS_FLOOR) == pytest.approx(3 * math.exp(6 * LOSS_FLOOR))
    assert band_limit([3.0] * 8, 16, NORM_FLOOR) == pytest.approx(3 * math.exp(6 * NORM_FLOOR))


def test_spikes_in_the_window_do_not_hide_the_next_and_a_new_level_is_taken_up():
    noise = np.random.default_rng(0).normal(0, 0.05, 128)
    usual = [math.exp(value) for value in noise]
    with_spikes = usual[:108] + [1000.0] * 20
    assert band_limit(with_spikes, 128, NORM_FLOOR) < 3
    # Mean and deviation of the same values are drawn along, and would let any of the next spikes pass.
    logs = np.log(with_spikes)
    assert math.exp(logs.mean() + 6 * logs.std()) > 1000
    assert not any(value > band_limit(usual, 128, NORM_FLOOR) for value in usual)
    moved = usual[:40] + [5 * value for value in usual[40:]]
    assert band_limit(moved, 128, NORM_FLOOR) > max(moved)


def test_limits_are_numbers_that_the_device_holds():
    limit = band_limit([0.1234567891] * 8, 8, LOSS_FLOOR)
    assert float(torch.tensor(limit)) == limit
    assert band_limit([0.0] * 8, 8, LOSS_FLOOR) > 0 and math.isfinite(band_limit([3e38] * 8, 8, NORM_FLOOR))


@pytest.mark.parametrize(("closes", "loss", "norm", "passes"), [
    (True, 1.0, 2.0, True), (True, 1.5, 2.0, False), (True, 1.0, 2.5, False), (False, 1.5, 2.5, True),
])  # fmt: skip
def test_the_gate_turns_a_norm_outside_into_infinity_and_tells_the_true_one(closes, loss, norm, passes):
    gate = SpikeGate(micro_batches=2, closes=closes, most_loss=1.0, most_norm=2.0)
    gate.add(torch.tensor(loss))
    gate.add(torch.tensor(loss))
    sums = gate.join(torch.tensor(norm**2))
    found = gate.pass_on(sums[0].sqrt(), sums[1])
    assert float(found) == (pytest.approx(norm) if passes else math.inf)
    seen = gate.take()
    assert (seen.loss, seen.gradient_norm) == pytest.approx((loss, norm))


def test_progress_of_a_checkpoint_without_recent_values_is_read():
    state = Progress(step=3, applied_steps=3, images=24).to_dict()
    assert Progress.from_state(state | {"other": 1}) == Progress(step=3, applied_steps=3, images=24)
    for name in ("recent_losses", "recent_norms"):
        del state[name]
    assert Progress.from_state(state).recent_losses == []
    del state["images"]
    with pytest.raises(KeyError):
        Progress.from_state(state)


def test_scales_of_blocks_find_the_image_and_leave_nothing_behind():
    config = ModelConfig(
        image_height=32, image_width=32, patch_size=8, depth=4, width=32, heads=2, decoder_width=32, decoder_heads=2
    )
    torch.manual_seed(0)
    model = MIRL(config).train()
    usual = torch.randn(4, 3, 32, 32)
    bad = usual.clone()
    bad[2] *= 100
    noise = torch.rand(4, 16)
    state = torch.get_rng_state()
    # What a forward pass draws besides, and writes into a buffer, is drawn again by the next step.
    beside = block_scales(model, lambda: (torch.rand(3), model(usual, noise=noise)), 4)
    found = block_scales(model, lambda: (torch.rand(3), model(bad, noise=noise)), 4)
    assert torch.equal(torch.get_rng_state(), state)
    names = [block.name for block in beside]
    assert [name for name in names if name.startswith("encoder")] == [f"encoder.blocks.{n}" for n in range(4)]
    assert set(names) == {name for name, module in model.named_modules() if type(module).__name__.endswith("Block")}
    grown = first_grown(found, beside)
    assert grown is not None and grown[0].name == "encoder.blocks.0" and grown[0].image == 2 and grown[1] > 5
    assert first_grown(beside, beside) is None
    with torch.no_grad():
        tokens = model.encoder.blocks[0](x := torch.randn(4, 5, 32))
        (alone,) = block_scales(model.encoder.blocks, lambda: model.encoder.blocks[0].branches(x), 4)
    assert alone.scale == pytest.approx(float(tokens.square().mean(dim=(1, 2)).sqrt().max()), rel=1e-5)
    assert not any("branches" in vars(module) for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_block_that_is_not_finite_has_grown():
    beside = [BlockScale("a", 1.0, 0), BlockScale("b", 1.0, 0)]
    grown = first_grown([BlockScale("a", 1.9, 0), BlockScale("b", math.nan, 1)], beside)
    assert grown is not None and grown[0].name == "b"


def test_a_learning_rate_too_large_is_a_spike_that_no_block_stands_out_in(photographs: Path, tmp_path: Path) -> None:
    """A step of a rate a thousand times too large changes the weights; the next step's loss says so, of any image."""
    common = dict(
        data=str(photographs), out=str(tmp_path / "run"), batch_size=4, warmup_steps=1, precision="fp32", image_size=32,
        depth=4, width=32, heads=2, decoder_width=32, decoder_heads=2, log_every=1, pictures=0, tensorboard=False,
        loader_threads=1, watchdog_minutes=0.0, spike_window=8,
    )  # fmt: skip
    mirl.pretrain(mirl.recipe("tiny", **common, steps=5, lr=1e-4))
    assert events(tmp_path / "run", "spike") == []
    change = dict(lr=1.0, change=("lr", "steps"))
    mirl.pretrain(mirl.recipe("tiny", **common | change, steps=8, resume="auto"))
    # The band went on over the start: it has begun at once.
    spike = events(tmp_path / "run", "spike")[0]
    assert spike["step"] == 7 and not spike["skipped"] and spike["grown"] is None
    assert "so look at weights and learning rate" in spike["detail"]

    # No leaving out helps here. Checkpoint 8 is of the run above, and no part of this one.
    start = tmp_path / "run" / "checkpoints" / "step-00000005"
    with pytest.raises(Diverged, match=f"3 rollbacks to {start} or a checkpoint with no further step did not help"):
        mirl.pretrain(mirl.recipe("tiny", **common | change, steps=14, resume=str(start), on_spike="rollback"))
    back = events(tmp_path / "run", "rollback")
    assert [(event["step"], event["to_step"]) for event in back] == [(7, 5), (8, 5), (10, 5)]
    assert [event["left_out"] for event in back] == [[7], [6, 7, 8], [6, 7, 8, 9, 10]]


def test_what_is_not_watched_and_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    watch = SpikeWatch(
        mirl.recipe("tiny").run,
        cast(Ranks, SimpleNamespace(gather=lambda value: [value], is_main=False)),
        cast(TrainEngine, SimpleNamespace(can_watch_steps=False)),
        cast(Task, None),
        cast(TrainLoader, SimpleNamespace(paths=lambda ids: [f"{number}.jpg" for number in ids])),
        cast(RunLog, SimpleNamespace(say=said.append, event=lambda *_, **__: None, out=tmp_path)),
        Progress(step=9),
    )
    assert said == [
        "no step is watched for a spike of its loss or gradient norm: that needs ZeRO stage 1 or 2 with flat gradients"
    ]
    assert watch.end_step() is None
    first = watch.tell(Spike(seen=SeenStep(3, 1), most=SeenStep(2, 2)), [np.arange(2)], skipped=False)
    assert "there is no step before it since the start, beside which a block could have grown (rank 0: files" in first
    assert "look at weights" not in first


def test_what_cannot_be_watched_is_refused(tmp_path: Path, photographs: Path) -> None:
    config = mirl.recipe(
        "tiny", data=str(photographs), out=str(tmp_path / "run"), steps=2, batch_size=4, image_size=32, depth=4,
        width=32, heads=2, decoder_width=32, decoder_heads=2, precision="fp32", loader_threads=1, on_spike="skip",
        flat_gradients=False, warmup_steps=1,
    )  # fmt: skip
    with pytest.raises(mirl.UserError, match="on_spike is 'skip', which needs ZeRO stage 1 or 2 with flat gradients"):
        mirl.pretrain(config)
    assert not (tmp_path / "run" / "config.json").exists()
