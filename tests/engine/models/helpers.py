"""Small models and inputs, and the comparison of an engine model with the plain eager reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mirl.engine.models import MIRL, ExactSkips, ModelConfig
from tests.support.oracle import ReferenceMIRL, ReferenceOutput

NO_SKIPS = ExactSkips(
    visible_only_projection=False,
    masked_only_tail=False,
    kv_prefix=False,
    shared_loss_gradient=False,
    mask_token_table=False,
)


def tiny_config(**overrides: Any) -> ModelConfig:
    """4 blocks, 24 and 16 wide, images of 16 x 24 pixels in 4 x 6 patches."""
    small = dict(
        depth=4, width=24, heads=3, patch_size=4, image_height=16, image_width=24,
        segments=2, decoder_width=16, decoder_heads=2, attention="math",
    )  # fmt: skip
    return ModelConfig(**(small | overrides))


def make_inputs(config: ModelConfig, batch: int = 3, dtype: torch.dtype = torch.uint8) -> tuple[Tensor, Tensor]:
    """Images (uint8 BHWC, or normalised float BCHW) and noise."""
    generator = torch.Generator().manual_seed(11)
    height, width, channels = config.image_height, config.image_width, config.channels
    noise = torch.rand(batch, config.num_patches, generator=generator)
    if dtype == torch.uint8:
        shape = (batch, height, width, channels)
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8), noise
    return torch.randn(batch, channels, height, width, generator=generator, dtype=dtype), noise


def make_model(config: ModelConfig, skips: ExactSkips | None = None, dtype: torch.dtype = torch.float64) -> MIRL:
    """With every parameter moved away from its initial value, so that no bias is 0 and no norm is an identity."""
    torch.manual_seed(5)
    model = MIRL(config, skips).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def make_reference(model: MIRL, attention: str = "math") -> ReferenceMIRL:
    """With the weights, and in the dtype, of ``model``."""
    reference = ReferenceMIRL(model.config, attention).to(model.encoder.cls_token.dtype)
    reference.load_state_dict(model.state_dict())
    return reference


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters()), "a parameter has no part in the loss"
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def run_reference(model: MIRL, images: Tensor, noise: Tensor) -> tuple[ReferenceOutput, dict[str, Tensor]]:
    reference = make_reference(model)
    output = reference(images, noise)
    return output, gradients(reference, output.loss)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], relative: float) -> None:
    """Every tensor within ``relative`` of the largest value of its counterpart."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = (actual[name] - value).abs().max().item()
        bound = relative * value.abs().max().item()
        assert error <= bound, f"{name}: off by {error:.3g}, allowed {bound:.3g}"
