"""Fused norms and GELUs, and recomputing them, change speed and memory and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mirl.engine.models import ExactSkips, Execution
from tests.engine.accounting.test_memory import config_of, kept_bytes
from tests.engine.models.helpers import NO_SKIPS, assert_same, gradients, make_inputs, make_model, tiny_config

CONFIGS: dict[str, dict[str, Any]] = {
    "paper": {"depth": 8, "segments": 4, "decoder_depth": 3},
    "release": {"variant": "release", "segments": 4},
    "MAE": {"objective": "mae", "segments": 1, "did": False, "decoder_depth": 3},
}
PLAIN = Execution()


@pytest.mark.parametrize("skips", [ExactSkips(), NO_SKIPS], ids=["all skips", "no skips"])
@pytest.mark.parametrize("overrides", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize(
    "execution",
    [
        Execution(fused_norm=True),
        Execution(fused_gelu=True),
        Execution(recompute=True),
        Execution(fused_norm=True, bias_in_norm=True),
        Execution(fused_norm=True, fused_gelu=True, bias_in_norm=True, recompute=True),
    ],
    ids=["fused norm", "fused gelu", "recompute", "bias in norm", "all"],
)
def test_same_loss_and_gradients(execution: Execution, overrides: dict[str, Any], skips: ExactSkips) -> None:
    config = tiny_config(**overrides)
    images, noise = make_inputs(config)
    model = make_model(config, skips)
    model.set_execution(PLAIN)
    expected = model(images, noise=noise)
    expected_gradients = gradients(model, expected.loss)
    model.set_execution(execution)
    actual = model(images, noise=noise)
    # float64: a bias added outside of its matrix product rounds once more; the largest error seen is 3e-15.
    assert_same({"loss": actual.loss}, {"loss": expected.loss}, 1e-12)
    assert_same(gradients(model, actual.loss), expected_gradients, 1e-12)


@pytest.mark.parametrize("overrides", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("form", ["float32", "bfloat16", "autocast"])
def test_recomputing_gives_the_same_bits(form: str, overrides: dict[str, Any]) -> None:
    config = tiny_config(**overrides)
    images, noise = make_inputs(config)
    model = make_model(config, dtype=torch.bfloat16 if form == "bfloat16" else torch.float32)
    found = []
    for recompute in (False, True):
        model.set_execution(Execution(recompute=recompute))
        with torch.autocast("cpu", torch.bfloat16, enabled=form == "autocast"):
            loss = model(images, noise=noise).loss
        found.append((loss, gradients(model, loss)))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(gradient, found[1][1][name]) for name, gradient in found[0][1].items())


def test_recomputing_keeps_the_inputs_of_norms_and_gelus_alone() -> None:
    """Of an encoder block's 16 values per token and width, the outputs of two norms and of a GELU four times as wide
    are no longer kept: 6 of them, unless something else (the tensor given to fc2, a view) still held on to them.
    """
    config = config_of(depth=48, segments=2)
    blocks = []
    for recompute in (False, True):
        kept = kept_bytes(config, "none", 8, Execution(recompute=recompute))
        blocks.append(kept - kept_bytes(config_of(depth=24, segments=2), "none", 8, Execution(recompute=recompute)))
    tokens = 8 * (1 + config.num_kept) * 24
    saved = (blocks[0] - blocks[1]) / (2 * tokens * config.width)
    assert saved == pytest.approx(6, abs=0.01)


def test_recompute_and_activation_checkpointing_exclude_each_other() -> None:
    model = make_model(tiny_config())
    model.set_activation_checkpointing("every")
    with pytest.raises(ValueError, match="recompute is True and activation checkpointing is on"):
        model.set_execution(Execution(recompute=True))


def test_biases_go_to_the_norms_where_these_can_take_them() -> None:
    x = torch.zeros(2, 3, 24, dtype=torch.float64)
    for drop_path, left in ((0.0, True), (0.2, False)):
        model = make_model(tiny_config(drop_path=drop_path))
        model.set_execution(Execution(fused_norm=True, bias_in_norm=True))
        for block in model.encoder.blocks:
            assert block.branches(x)[2] is (block.mlp.fc2.bias if left else None)
    norm = model.encoder.blocks[0].norm2
    assert norm.adds_bias(False) and not norm.adds_bias(True), "in a region the compiler writes the norm"
    norm.weight.ds_id = 0  # as ZeRO-3 marks what it shards
    assert not norm.adds_bias(False)


@pytest.mark.parametrize(("device", "fused"), [("cpu", False), ("cuda", True)])
def test_defaults_follow_the_device(device: str, fused: bool) -> None:
    execution = Execution.for_device(torch.device(device))
    assert (execution.fused_norm, execution.fused_gelu, execution.recompute) == (fused, fused, False)


def test_the_first_forward_pass_chooses_for_its_device() -> None:
    config = tiny_config()
    images, noise = make_inputs(config)
    model = make_model(config)
    assert model.execution is None
    model(images, noise=noise)
    assert model.execution == Execution.for_device(torch.device("cpu"))
