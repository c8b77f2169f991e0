"""Activation checkpointing changes what is kept, never what comes out."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from mirl.engine.models import ExactSkips
from tests.engine.models.helpers import NO_SKIPS, gradients, make_inputs, make_model, tiny_config

CONFIGS: dict[str, dict[str, Any]] = {
    "paper": {"depth": 8, "segments": 2, "decoder_depth": 3},
    "release": {"variant": "release", "depth": 8, "segments": 4},
    "MAE": {"objective": "mae", "segments": 1, "did": False, "decoder_depth": 3},
}


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("mode", ["every", "segments", 3, "2"])
@pytest.mark.parametrize("overrides", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("skips", [ExactSkips(), NO_SKIPS], ids=["all skips", "no skips"])
def test_same_bits(skips: ExactSkips, overrides: dict[str, Any], mode: str | int, reentrant: bool) -> None:
    config = tiny_config(**overrides)
    images, noise = make_inputs(config)
    model = make_model(config, skips, torch.float32)
    expected_loss = model(images, noise=noise).loss
    expected = gradients(model, expected_loss)
    calls = []

    def counted(function: Any, *tensors: Any) -> Any:
        calls.append(function)
        return partial(checkpoint, use_reentrant=reentrant)(function, *tensors)

    model.set_activation_checkpointing(mode, counted)
    loss = model(images, noise=noise).loss
    assert torch.equal(loss, expected_loss)
    actual = gradients(model, loss)
    # The same operations on the same values, in the same order; a reentrant backward may add gradients of a tensor with
    # several readers in another order: float32 rounding.
    for name, gradient in expected.items():
        if reentrant:
            torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())
        else:
            assert torch.equal(actual[name], gradient), name
    assert len(calls) == expected_calls(config, mode)


def expected_calls(config: Any, mode: str | int) -> int:
    run = {"every": 1, "segments": 1000}.get(str(mode)) or int(mode)
    return config.segments * (-(-config.segment_depth // run) + -(-config.decoder_depth // run))


def test_none_turns_it_off_again() -> None:
    config = tiny_config()
    images, noise = make_inputs(config)
    model = make_model(config, dtype=torch.float32)
    model.set_activation_checkpointing("every", lambda function, *tensors: pytest.fail("was called"))
    model.set_activation_checkpointing("none")
    model(images, noise=noise).loss.backward()
