"""A model's configuration: the sizes of the paper, and one clear message for each mistake."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest
import torch

from mirl.engine.models import MIRL, MODEL_NAMES, ModelConfig, model_config
from tests.engine.models.helpers import make_inputs, tiny_config
from tests.support.launch import CHECKOUT


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"segments": 3, "depth": 12}, r"segments is 3: decoders work in pairs, give 1 or an even number"),
        ({"segments": 8, "depth": 12}, r"segments is 8 and depth is 12: .*choose one of 1, 2, 4, 6, 12"),
        ({"depth": 0}, r"depth is 0: give a whole number of 1 or more"),
        ({"width": 24.0}, r"width is 24\.0: give a whole number"),
        ({"decoder_depth": True}, r"decoder_depth is True: give a whole number"),
        ({"width": 24, "heads": 5}, r"width is 24 and heads is 5: heads must divide width"),
        ({"decoder_width": 16, "decoder_heads": 3}, r"decoder_heads must divide decoder_width"),
        ({"width": 6, "heads": 3}, r"width is 6: 2-D sin-cos positions need a multiple of 4"),
        ({"mlp_ratio": 0}, r"mlp_ratio is 0: give a positive number"),
        ({"image_height": 18}, r"image_height is 18 and patch_size is 4: .*e\.g\. 16 or 20"),
        ({"image_width": 3}, r"image_width is 3 and patch_size is 4: .*e\.g\. 4$"),
        ({"mask_ratio": 1.0}, r"mask_ratio is 1\.0: give a share between 0 and 1"),
        ({"mask_ratio": 0.99}, r"mask_ratio is 0\.99: it keeps 0 of 24 patches"),
        ({"channels": 1, "mean": (1, 2), "std": (1,)}, r"mean has 2 values and channels is 1: give one per channel$"),
        ({"std": (1.0, 0.0, 1.0)}, r"std is .*: give positive values"),
        ({"variant": "papers"}, r"variant is 'papers': choose one of paper, release"),
        ({"objective": "gan"}, r"objective is 'gan': choose one of mirl, mae, truncated, multi_decoder"),
        ({"attention": "flash"}, r"attention is 'flash': choose one of auto, xformers, sdpa, math"),
        ({"objective": "mae"}, r"it has one decoder and no DID, set segments to 1 and did to False"),
        ({"objective": "coarse_to_fine", "segments": 1}, r"'coarse_to_fine' and segments is 1"),
        ({"objective": "truncated", "segments": 1, "did": False}, r"'truncated' needs the number of blocks to build"),
        ({"truncated_depth": 2}, r"objective is 'mirl' and truncated_depth is 2"),
        (
            {"objective": "truncated", "segments": 1, "did": False, "truncated_depth": 99},
            r"truncated_depth is 99: give a number from 1 to depth",
        ),
        ({"log_sigma": 0.1}, r"log_sigma is 0.1: give a width from 0.34 to patch_size"),
        ({"feature_loss": -1.0}, r"feature_loss is -1.0: give a weight of zero or more"),
        ({"objective": "fine_to_coarse", "vgg_loss": 1.0}, r"vgg_loss is 1.0 and objective is 'fine_to_coarse'"),
        ({"vgg_loss": 1.0, "channels": 1}, r"VGG-16 sees three channels"),
        ({"objective": "multi_decoder", "segments": 1}, r"'multi_decoder' and segments is 1"),
        ({"drop_path": 1.0}, r"drop_path is 1\.0"),
        ({"patch_size": 1, "channels": 1}, r"norm_pix is True and a patch has 1 pixel"),
    ],
)  # fmt: skip
def test_a_mistake_gets_its_message(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(**overrides)


def test_unknown_name_and_field_suggest_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"model is 'vit_b48': did you mean 'vit_b_48'\? choose one of vit_s, vit_b"):
        model_config("vit_b48")
    with pytest.raises(ValueError, match=r"no field 'segment': did you mean 'segments'\?"):
        model_config("vit_b_48", segment=4)


@pytest.mark.parametrize("name", MODEL_NAMES)
@pytest.mark.parametrize("variant", ["paper", "release"])
def test_every_size_can_be_configured(name: str, variant: str) -> None:
    config = model_config(name, variant=variant)
    assert (config.num_patches, config.num_kept, config.num_masked, config.patch_pixels) == (196, 49, 147, 768)
    assert config.did_blocks == (1 if variant == "paper" else config.decoder_depth)


def test_decoder_depth_follows_the_variant() -> None:
    assert model_config("vit_s_54").decoder_depth == 2
    assert model_config("vit_s_54", variant="release").decoder_depth == 1
    assert model_config("vit_b_48", variant="release").decoder_depth == 2
    assert model_config("vit_b", objective="mae").decoder_depth == 8
    assert model_config("vit_b", objective="mae", decoder_depth=2).decoder_depth == 2


def test_a_saved_configuration_comes_back() -> None:
    config = model_config("vit_b_24", channels=1, variant="release")
    assert config.mean == (0.5,)
    saved = dataclasses.asdict(config)
    assert ModelConfig(**saved) == config
    # JSON has lists for tuples
    assert ModelConfig(**{**saved, "mean": list(config.mean), "std": list(config.std)}) == config


def test_every_field_has_help() -> None:
    assert all(field.metadata["help"] for field in dataclasses.fields(ModelConfig))


class TestInputsOfTheModel:
    config = tiny_config()
    model = MIRL(config)
    images, noise = make_inputs(config)

    def test_images_of_another_size(self) -> None:
        with pytest.raises(
            ValueError, match=r"images have shape \[3, 24, 16, 3\].*this model takes uint8 \[B, 16, 24, 3\]"
        ):
            self.model(self.images.transpose(1, 2), noise=self.noise)

    def test_images_in_the_other_layout(self) -> None:
        with pytest.raises(ValueError, match=r"float \[B, 3, 16, 24\]"):
            self.model(self.images.float(), noise=self.noise)

    def test_images_of_another_dtype(self) -> None:
        with pytest.raises(ValueError, match="images have dtype torch.int64: give uint8"):
            self.model(self.images.long(), noise=self.noise)

    def test_images_without_a_batch(self) -> None:
        with pytest.raises(ValueError, match=r"images have shape \[16, 24, 3\]"):
            self.model(self.images[0], noise=self.noise)

    def test_neither_noise_nor_mask(self) -> None:
        with pytest.raises(ValueError, match="give noise .* or a mask: exactly one"):
            self.model(self.images)

    def test_noise_of_another_shape(self) -> None:
        with pytest.raises(ValueError, match=r"noise has shape \[2, 24\]: give \[batch, patches\] = \[3, 24\]"):
            self.model(self.images, noise=self.noise[:2])

    def test_mask_of_another_shape(self) -> None:
        mask = self.model(self.images, noise=self.noise).mask
        with pytest.raises(ValueError, match=r"mask is of shape \[3, 24\]: give \[batch, patches\] = \[2, 24\]"):
            self.model(self.images[:2], mask=mask)


def test_unknown_checkpointing_mode() -> None:
    with pytest.raises(ValueError, match="activation checkpointing is 'all': give none, every, segments"):
        MIRL(tiny_config()).set_activation_checkpointing("all")


def test_config_is_read_without_torch() -> None:
    code = "import sys, mirl.engine.models.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, check=False).returncode == 0


def test_positions_are_not_saved() -> None:
    assert not any("pos_embed" in key for key in MIRL(tiny_config()).state_dict())
    assert torch.count_nonzero(MIRL(tiny_config()).encoder.pos_embed[0]) == 0
