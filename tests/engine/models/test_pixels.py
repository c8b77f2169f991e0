"""Images as patches and back, positions, initial values."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from mirl.engine.models import MIRL
from mirl.engine.models.heads import WeightNormHead
from mirl.engine.models.layers import Block
from mirl.engine.models.pixels import (
    denormalise_patches,
    normalise_images,
    normalise_patches,
    patchify,
    to_uint8,
    unpatchify,
)
from mirl.engine.models.positions import sincos_positions
from tests.engine.models.helpers import tiny_config


def test_patch_order_is_row_major_and_pqc() -> None:
    # value = 100 * row + 10 * column + channel
    rows, columns, channels = torch.meshgrid(torch.arange(4), torch.arange(6), torch.arange(2), indexing="ij")
    image = (100 * rows + 10 * columns + channels).permute(2, 0, 1)[None].float()
    patches = patchify(image, 2)
    assert patches.shape == (1, 6, 8)
    assert patches[0, 1].tolist() == [20, 21, 30, 31, 120, 121, 130, 131]
    assert patches[0, 3, 0] == 200


@pytest.mark.parametrize(("height", "width", "channels", "patch"), [(8, 12, 3, 4), (6, 6, 1, 2), (10, 5, 4, 5)])
def test_unpatchify_is_the_inverse(height: int, width: int, channels: int, patch: int) -> None:
    images = torch.rand(2, channels, height, width)
    assert torch.equal(unpatchify(patchify(images, patch), (height // patch, width // patch), patch), images)


def test_pixels_survive_normalisation_and_its_inverse() -> None:
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).repeat(2, 1, 1, 3)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    assert torch.equal(to_uint8(normalise_images(images, mean, std, torch.float32), mean, std), images)


def test_normalised_patches() -> None:
    patches = torch.rand(2, 5, 48, dtype=torch.float64)
    target = normalise_patches(patches)
    # the 1e-6 beside a variance of 1/12 leaves the mean untouched and the variance short by about 1e-5
    torch.testing.assert_close(target.mean(-1), torch.zeros(2, 5, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(target.var(-1), torch.ones(2, 5, dtype=torch.float64), rtol=0, atol=1e-4)
    # one division and one multiplication
    torch.testing.assert_close(denormalise_patches(target, patches), patches, rtol=0, atol=1e-14)


def test_positions_of_a_grid_that_is_not_square() -> None:
    """Against the loops of the definition."""
    rows, columns, width = 3, 5, 12
    table = sincos_positions((rows, columns), width)
    assert table.shape == (16, width) and table.dtype == torch.float32
    expected = np.zeros((16, width))
    for row in range(rows):
        for column in range(columns):
            for half, position in enumerate((column, row)):
                for i in range(3):
                    angle = position / 10000 ** (i / 3)
                    expected[1 + row * columns + column, 6 * half + i] = np.sin(angle)
                    expected[1 + row * columns + column, 6 * half + 3 + i] = np.cos(angle)
    # rounded to float32 once
    np.testing.assert_allclose(table.numpy(), expected, rtol=0, atol=6e-8)


def test_weight_norm_head_has_columns_of_length_one() -> None:
    torch.manual_seed(0)
    head = WeightNormHead(8, 20)
    with torch.no_grad():
        head.weight_v.normal_()
        head.bias.zero_()
    # float32 rounding of a sum of 20 squares
    torch.testing.assert_close(head.weight().norm(dim=0), torch.ones(8), rtol=1e-6, atol=0)
    assert "weight_g" in head.state_dict() and "weight_g" not in dict(head.named_parameters())


@pytest.mark.parametrize(("variant", "head_init"), [("paper", "zero"), ("paper", "xavier"), ("release", "xavier")])
def test_initial_values(variant: str, head_init: str) -> None:
    torch.manual_seed(0)
    assert tiny_config(variant=variant).head_init == ("zero" if variant == "paper" else "xavier")
    config = tiny_config(variant=variant, width=48, decoder_width=32, head_init=head_init)
    model = MIRL(config)
    if head_init == "zero":
        heads = {name: value for name, value in model.named_parameters() if ".head." in name}
        assert len(heads) == 2 * config.segments and not any(value.any() for value in heads.values())
        # They are drawn all the same: every other parameter begins as with drawn ones.
        torch.manual_seed(0)
        model = MIRL(dataclasses.replace(config, head_init="xavier"))
        torch.manual_seed(0)
        others = dict(MIRL(config).named_parameters())
        assert all(torch.equal(value, others[name]) for name, value in model.named_parameters() if name not in heads)
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all() and (module.bias == 0).all(), name
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            assert (module.bias == 0).all(), name
            matrix = module.weight.flatten(1)
            bound = (6 / sum(matrix.shape)) ** 0.5
            # uniform over (-bound, bound): the largest of over 1000 values is close to the bound and none is beyond
            assert 0.97 * bound < matrix.abs().max() <= bound, name
    tokens = [parameter for name, parameter in model.named_parameters() if name.endswith(("cls_token", "mask_token"))]
    assert len(tokens) == (2 if variant == "paper" else 3)
    for token in tokens:
        # standard deviation of 32 or 48 draws: within a third of 0.02 in all but one of 1000 cases; the seed is fixed
        assert 0.013 < token.std() < 0.027


def test_drop_path_drops_whole_images_in_training_only() -> None:
    torch.manual_seed(0)
    block = Block(8, 2, 16, drop_path=0.4)
    scale = block.drop_scale(torch.ones(2000, 3, 8))
    assert scale.shape == (2000, 1, 1)
    values = scale[:, 0, 0]
    assert set(values.tolist()) == {0.0, values.max().item()}
    # 1 / 0.6, rounded to float32
    assert values.max().item() == pytest.approx(1 / 0.6, rel=1e-6)
    # 2000 draws at 0.6: a standard deviation of 0.011
    assert (values > 0).float().mean().item() == pytest.approx(0.6, abs=0.05)
    block.eval()
    assert block.drop_scale(torch.ones(2000, 3, 8)) is None


def test_drop_path_rises_over_the_blocks() -> None:
    rates = [block.drop_path for block in MIRL(tiny_config(drop_path=0.3)).encoder.blocks]
    # float32 steps
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3], abs=1e-6)
