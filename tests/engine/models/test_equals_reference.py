"""The engine's model is the plain eager reference: loss, terms, predictions and every gradient, in float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from mirl.engine.models import ExactSkips, mask_from_noise
from tests.engine.models.helpers import (
    NO_SKIPS,
    assert_same,
    gradients,
    make_inputs,
    make_model,
    make_reference,
    run_reference,
    tiny_config,
)

# Sums in another order: the largest error seen is 5e-15 of the largest value of a tensor.
FLOAT64 = 1e-12

MODELS: dict[str, dict[str, Any]] = {
    "paper": {},
    "paper, G = 4": {"segments": 4},
    "paper, G = 1 with DID": {"segments": 1},
    "paper, G = 6, narrow images": {"depth": 6, "segments": 6, "image_height": 24, "image_width": 8},
    "paper, decoders of 1 block": {"decoder_depth": 1},
    "paper, decoders of 3 blocks": {"decoder_depth": 3},
    "paper without DID": {"did": False, "segments": 4},
    "release": {"variant": "release", "segments": 4},
    "release, decoders of 1 block": {"variant": "release", "decoder_depth": 1},
    "release without DID": {"variant": "release", "did": False},
    "MAE": {"objective": "mae", "segments": 1, "did": False, "decoder_depth": 3},
    "every decoder alone": {"objective": "multi_decoder", "segments": 4},
    "one channel, raw pixels": {"channels": 1, "norm_pix": False},
    "five channels": {"channels": 5},
    "other statistics of the pixels": {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)},
    "other sizes": {"width": 32, "heads": 2, "mlp_ratio": 2.5, "patch_size": 8, "decoder_width": 24, "decoder_heads":
    3}, "few masked": {"mask_ratio": 0.3},
    "one patch kept": {"mask_ratio": 0.95},
}  # fmt: skip
SKIPS = {"all skips": ExactSkips(), "no skips": NO_SKIPS} | {
    f"without {field.name}": ExactSkips(**{field.name: False}) for field in dataclasses.fields(ExactSkips)
}


@pytest.mark.parametrize("images_dtype", [torch.uint8, torch.float64], ids=["uint8", "float"])
@pytest.mark.parametrize("overrides", MODELS.values(), ids=MODELS.keys())
def test_every_model(overrides: dict[str, Any], images_dtype: torch.dtype) -> None:
    check(tiny_config(**overrides), ExactSkips(), images_dtype)


@pytest.mark.parametrize("skips", SKIPS.values(), ids=SKIPS.keys())
@pytest.mark.parametrize("name", ["paper, G = 4", "release", "release, decoders of 1 block", "MAE"])
def test_every_skip_alone(name: str, skips: ExactSkips) -> None:
    check(tiny_config(**MODELS[name]), skips, torch.uint8)


def check(config: Any, skips: ExactSkips, images_dtype: torch.dtype) -> None:
    images, noise = make_inputs(config, dtype=images_dtype)
    model = make_model(config, skips)
    expected, expected_gradients = run_reference(model, images, noise)
    output = model(images, noise=noise)
    assert output.predictions is None
    assert torch.equal(output.mask.mask_BN, expected.mask_BN)
    assert_same({"loss": output.loss, "terms": output.terms}, expected_values(expected), FLOAT64)
    assert_same(gradients(model, output.loss), expected_gradients, FLOAT64)

    full = model(images, noise=noise, full=True)
    assert len(full.predictions) == config.segments
    for actual, wanted in zip(full.predictions, expected.predictions, strict=True):
        assert_same({"prediction": actual}, {"prediction": wanted}, FLOAT64)
    assert_same({"loss": full.loss, "terms": full.terms}, expected_values(expected), FLOAT64)
    assert_same(gradients(model, full.loss), expected_gradients, FLOAT64)


def expected_values(expected: Any) -> dict[str, torch.Tensor]:
    return {"loss": expected.loss, "terms": expected.terms}


def test_noise_and_its_mask_are_the_same_input() -> None:
    config = tiny_config()
    images, noise = make_inputs(config)
    model = make_model(config)
    from_noise = model(images, noise=noise)
    from_mask = model(images, mask=mask_from_noise(noise, config.mask_ratio))
    assert torch.equal(from_noise.loss, from_mask.loss)


def test_same_inputs_give_the_same_bits() -> None:
    config = tiny_config(variant="release", segments=4)
    images, noise = make_inputs(config)
    model = make_model(config, dtype=torch.float32)
    first = gradients(model, model(images, noise=noise).loss)
    torch.manual_seed(99)
    second = gradients(model, model(images, noise=noise).loss)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_reference_with_sdpa_is_the_reference() -> None:
    config = tiny_config(segments=4)
    images, noise = make_inputs(config)
    model = make_model(config)
    expected, _ = run_reference(model, images, noise)
    output = make_reference(model, "sdpa")(images, noise)
    assert_same({"loss": output.loss, "terms": output.terms}, expected_values(expected), FLOAT64)


@pytest.mark.parametrize("attention", ["math", "sdpa"])
def test_attention_backends_agree(attention: str) -> None:
    config = tiny_config(segments=4, attention=attention)
    images, noise = make_inputs(config)
    model = make_model(config)
    expected, expected_gradients = run_reference(model, images, noise)
    output = model(images, noise=noise)
    assert_same({"loss": output.loss}, {"loss": expected.loss}, FLOAT64)
    assert_same(gradients(model, output.loss), expected_gradients, FLOAT64)
    assert {backend.name for backend in model.attention_backends.values()} == {attention}


def test_order_of_terms_and_their_weights() -> None:
    model = make_model(tiny_config(segments=4))
    assert model.term_names == ("pair_1_4", "pair_2_3")
    images, noise = make_inputs(model.config)
    output = model(images, noise=noise)
    # A mean of two numbers: one rounding.
    torch.testing.assert_close(output.loss, output.terms.mean(), rtol=1e-15, atol=0)
    assert make_model(tiny_config(segments=4, objective="multi_decoder")).term_names[3] == "decoder_4"
