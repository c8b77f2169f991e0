"""bfloat16 weights, bfloat16 weights with float32 buffers, and bfloat16 autocast stay close to float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mirl.engine.models import MIRL
from tests.engine.models.helpers import gradients, make_inputs, make_model, tiny_config

CONFIGS: dict[str, dict[str, Any]] = {"paper": {"segments": 4}, "release": {"variant": "release", "segments": 4}}


def low_precision(model: MIRL, form: str) -> None:
    if form == "weights":
        model.bfloat16()
    elif form == "weights, buffers float32":
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()


@pytest.mark.parametrize("form", ["weights", "weights, buffers float32", "autocast"])
@pytest.mark.parametrize("overrides", CONFIGS.values(), ids=CONFIGS.keys())
def test_bfloat16_is_close_to_float32(overrides: dict[str, Any], form: str) -> None:
    # Zero heads would pass no gradient on.
    config = tiny_config(depth=8, width=96, decoder_width=64, head_init="xavier", **overrides)
    images, noise = make_inputs(config, batch=4)
    torch.manual_seed(0)
    model = MIRL(config)
    exact = model(images, noise=noise)
    exact_gradients = gradients(model, exact.loss)

    low_precision(model, form)
    with torch.autocast("cpu", torch.bfloat16, enabled=form == "autocast"):
        output = model(images, noise=noise)
        full = model(images, noise=noise, full=True)
    assert output.loss.dtype == output.terms.dtype == torch.float32
    # bfloat16 has 8 bits: 0.4 % a rounding; over thousands of pixels the loss of about 1 averages them out.
    assert abs(output.loss.item() - exact.loss.item()) < 2e-2
    # The same numbers by another path through roundings.
    assert abs(full.loss.item() - output.loss.item()) < 1e-2
    for name, gradient in gradients(model, output.loss).items():
        expected = exact_gradients[name]
        assert torch.isfinite(gradient).all(), name
        # A few per cent of noise through eight blocks; a wrong gradient is off by its own size.
        cosine = torch.cosine_similarity(gradient.float().flatten(), expected.flatten(), dim=0)
        assert cosine > 0.98, f"{name}: {cosine:.4f}"


def test_loss_of_large_predictions_is_finite_in_bfloat16() -> None:
    """Squares of 1e3 summed over 10^4 pixels in bfloat16 would lose all but two digits; float32 sums do not."""
    config = tiny_config()
    images, noise = make_inputs(config)
    model = make_model(config, dtype=torch.float32)
    with torch.no_grad():
        for decoder in model.decoders.values():
            decoder.head.weight.zero_()
            decoder.head.bias.fill_(500)
    model.bfloat16()
    # (500 + 500 - t)^2 with t of mean 0 and variance 1: 1e6 + 1
    assert model(images, noise=noise).loss.item() == pytest.approx(1e6 + 1, rel=1e-4)
