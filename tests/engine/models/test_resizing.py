"""A model at another image size is the model that was made for it, with the same weights, and comes back unchanged."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mirl.engine.models.config import ModelConfig
from mirl.engine.models.positions import sincos_positions
from mirl.engine.models.resizing import at_image_size, set_image_size
from mirl.engine.models.teacher import EmaTeacher
from mirl.errors import UserError
from tests.engine.models.helpers import gradients, make_inputs, make_model, tiny_config

OTHER = (8, 12)


def resized(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(config, image_height=OTHER[0], image_width=OTHER[1])


@pytest.mark.parametrize(
    "overrides",
    [
        {"segments": 4},
        {"variant": "release", "decoder_depth": 3},
        {"objective": "mae", "segments": 1, "did": False},
        {"objective": "coarse_to_fine"},
    ],
)
def test_loss_and_gradients_are_those_of_a_model_of_that_size_to_the_bit(overrides):
    config = tiny_config(**overrides)
    model, made = make_model(config), make_model(resized(config))
    made.load_state_dict(model.state_dict())
    images, noise = make_inputs(config)
    whole = model(images, noise=noise).loss
    set_image_size(model, *OTHER)
    assert (model.config, model.encoder.config) == (resized(config), resized(config))
    assert torch.equal(model.encoder.pos_embed, sincos_positions((2, 3), config.width).double())
    assert torch.equal(model.decoder_pos_embed, sincos_positions((2, 3), config.decoder_width).double())
    smaller = make_inputs(resized(config))
    ours, theirs = (each(smaller[0], noise=smaller[1]) for each in (model, made))
    assert torch.equal(ours.loss, theirs.loss) and not torch.equal(ours.loss, whole)
    found, wanted = gradients(model, ours.loss), gradients(made, theirs.loss)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    with pytest.raises(UserError, match=r"takes uint8 \[B, 8, 12, 3\]"):
        model(images, noise=noise)
    set_image_size(model, config.image_height, config.image_width)
    assert model.config == config and torch.equal(model(images, noise=noise).loss, whole)


def test_a_block_ends_with_the_size_before_it_and_a_size_that_cannot_be_changes_nothing():
    model = make_model(tiny_config())
    with pytest.raises(ZeroDivisionError), at_image_size(model, *OTHER):
        assert model.config.grid == (2, 3)
        raise ZeroDivisionError
    with pytest.raises(UserError, match="must be a multiple of patch_size"):
        set_image_size(model, 9, 12)
    assert model.config == tiny_config() and model.decoder_pos_embed.shape == (25, 16)


def test_tables_follow_the_precision_that_an_engine_gave_the_model():
    model = make_model(tiny_config(), dtype=torch.bfloat16)
    set_image_size(model, *OTHER)
    assert torch.equal(model.encoder.pos_embed, sincos_positions((2, 3), 24).bfloat16())
    model.float()
    set_image_size(model, 16, 24)
    assert model.encoder.pos_embed.dtype == torch.float32


def test_the_teacher_of_the_feature_loss_takes_the_same_size():
    config = tiny_config(feature_loss=1.0)
    model = make_model(config, dtype=torch.float32)
    teacher = EmaTeacher(model, config, 0.9)
    for each in (model, teacher):
        set_image_size(each, *OTHER)
    images, noise = make_inputs(resized(config))
    features = teacher(images)
    assert features.shape == (3, 6, 24)
    assert model(images, noise=noise, teacher_features=features).terms.isfinite().all()
