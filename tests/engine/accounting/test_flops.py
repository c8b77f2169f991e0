"""Counts against the paper's tables, the models themselves, and torch's own counter."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mirl.engine.accounting.flops import (
    PLAIN,
    classifier_flops,
    classifier_macs,
    classifier_parameters,
    decoder_parameters,
    encoder_parameters,
    forward_flops,
    pretraining_parameters,
    training_flops_per_image,
)
from mirl.engine.models import MIRL, MODEL_NAMES, ExactSkips, ModelConfig, model_config
from mirl.engine.transfer.classification.classifier import Classifier
from mirl.engine.transfer.classification.task import FinetuneTask
from tests.engine.models.helpers import make_inputs, tiny_config
from tests.support.oracle import ReferenceMIRL

PAPER_PARAMETERS_M = {"vit_s": 22, "vit_b": 86, "vit_l": 304, "vit_s_54": 96, "vit_b_24": 171, "vit_b_48": 341}
PAPER_GFLOPS = {"vit_s": 4.2, "vit_b": 16.8, "vit_s_54": 18.8, "vit_b_24": 33.5, "vit_b_48": 67.0}


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_parameters_of_table_1(name: str) -> None:
    """The paper cuts millions off after the point. It prints 307 M for ViT-L, as many do; it has 304."""
    assert math.floor(classifier_parameters(model_config(name)) / 1e6) == PAPER_PARAMETERS_M[name]


@pytest.mark.parametrize("name", PAPER_GFLOPS)
def test_flops_of_table_1_and_3(name: str) -> None:
    """The paper cuts its figures off after one decimal."""
    assert math.floor(classifier_macs(model_config(name)) / 1e8) / 10 == PAPER_GFLOPS[name]


def test_flops_of_vit_l() -> None:
    """59.7 G in the paper: the one figure that is rounded up. With the additions of biases it is 59.69 G."""
    config = model_config("vit_l")
    biases = 197 * config.depth * 9 * config.width
    assert classifier_macs(config) / 1e9 == pytest.approx(59.65, abs=0.005)
    assert round((classifier_macs(config) + biases) / 1e9, 1) == 59.7


@pytest.mark.parametrize(
    ("name", "overrides", "gflop"),
    [
        ("vit_b_48", {}, 162.9),
        ("vit_b_48", {"variant": "release"}, 171.2),
        ("vit_s_54", {}, 64.1),
        ("vit_s_54", {"variant": "release"}, 50.4),
        ("vit_b_24", {}, 90.7),
        ("vit_b", {}, 45.2),
        ("vit_b", {"objective": "mae"}, 58.5),
    ],
)
def test_training_flops_of_the_design(name: str, overrides: dict[str, str], gflop: float) -> None:
    assert round(training_flops_per_image(model_config(name, **overrides)) / 1e9, 1) == gflop


def counted_flops(config: ModelConfig) -> int:
    """What torch counts for forward and backward of the plain eager reference on one image; on meta tensors."""
    with torch.device("meta"):
        model = ReferenceMIRL(config)
    model = model.to("meta")  # positions are made by numpy
    images = torch.empty(1, config.channels, config.image_height, config.image_width, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(images, torch.empty(1, config.num_patches, device="meta")).loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "config",
    [
        model_config("vit_b_24"),
        model_config("vit_s_54", variant="release"),
        model_config("vit_b", objective="mae"),
        tiny_config(variant="release", segments=4, decoder_depth=3, mlp_ratio=2.5, channels=5),
        tiny_config(did=False, mask_ratio=0.4),
    ],
    ids=lambda config: config.name,
)
def test_formula_equals_the_counter(config: ModelConfig) -> None:
    assert training_flops_per_image(config) == counted_flops(config)


@pytest.mark.parametrize(
    "overrides",
    [
        {"segments": 4},
        {"variant": "release", "decoder_depth": 3},
        {"decoder_depth": 1},
        {"objective": "mae", "segments": 1, "did": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("skip", ["all", "none", *(field.name for field in dataclasses.fields(ExactSkips))])
def test_formula_of_each_skip_equals_the_counter(overrides: dict, skip: str) -> None:
    """Counted for two batch sizes: what does not grow with the batch (folded matrices, tables) is not of an image."""
    chosen = {"all": ExactSkips(), "none": PLAIN}.get(skip) or dataclasses.replace(PLAIN, **{skip: True})
    config = tiny_config(**overrides)
    model = MIRL(config, chosen)
    counts = []
    for batch in (2, 3):
        images, noise = make_inputs(config, batch)
        model(images, noise=noise)  # resolves attention, which runs some
        with FlopCounterMode(display=False) as counter:
            model(images, noise=noise).loss.backward()
        counts.append(counter.get_total_flops())
    # Without the skip the engine still drops the class token before the head, and the reference behind it.
    class_token = 0 if chosen.masked_only_tail else 3 * 2 * config.segments * config.decoder_width * config.patch_pixels
    assert counts[1] - counts[0] == training_flops_per_image(config, chosen) - class_token


@pytest.mark.parametrize("classes", [3, 1000])
@pytest.mark.parametrize("pool", ["avg", "token"])
@pytest.mark.parametrize(
    "config",
    [
        tiny_config(segments=4, decoder_depth=3, mlp_ratio=2.5, channels=5),
        tiny_config(objective="truncated", segments=1, did=False, truncated_depth=2),
        model_config("vit_s", attention="math"),
    ],
    ids=["channels", "truncated", "vit_s"],
)
def test_fine_tuning_equals_the_counter(config: ModelConfig, pool: str, classes: int) -> None:
    """All blocks and patches, attention's products, and the head that there is: forward and backward."""
    model = Classifier(dataclasses.replace(config, attention="math"), num_classes=classes, pool=pool)
    images = make_inputs(config, 1)[0]
    model(images)  # resolves attention, which runs some
    with FlopCounterMode(display=False) as counter:
        model(images).square().sum().backward()
    assert counter.get_total_flops() == classifier_flops(config, classes).training


def test_the_task_counts_the_classes_that_it_has() -> None:
    config = tiny_config()
    nothing: Any = None
    augmentation: Any = SimpleNamespace(num_classes=7)
    task = FinetuneTask(
        config, ranks=nothing, engine=nothing, log=nothing, augmentation=augmentation, ema=None, val=None,
        eval_every=None,
    )  # fmt: skip
    assert task.gflops_per_image * 1e9 == pytest.approx(classifier_flops(config, 7).training, rel=1e-12)


def test_fine_tuning_of_the_papers_model() -> None:
    """Twice its multiply-adds, and attention's products."""
    config = model_config("vit_b_48")
    attention = config.depth * 4 * 197**2 * config.width
    assert classifier_flops(config, 1000).total == 2 * classifier_macs(config) + attention


def test_skips_leave_about_160_of_171() -> None:
    config = model_config("vit_b_48", variant="release")
    assert training_flops_per_image(config, ExactSkips()) / 1e9 == pytest.approx(160, abs=1)


@pytest.mark.parametrize("variant", ["paper", "release"])
@pytest.mark.parametrize("did", [True, False])
def test_parameters_of_the_model_that_is_built(variant: str, did: bool) -> None:
    config = tiny_config(variant=variant, did=did, segments=4, decoder_depth=3, channels=2, mlp_ratio=3.0)
    model = MIRL(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == pretraining_parameters(config)
    assert sum(parameter.numel() for parameter in model.encoder.parameters()) == encoder_parameters(config)
    assert pretraining_parameters(config) == encoder_parameters(config) + decoder_parameters(config)


def test_parts_add_up() -> None:
    parts = forward_flops(model_config("vit_b_48", variant="release"))
    assert parts.encoder / 1e9 == pytest.approx(34.34, abs=0.01)
    assert parts.decoders / 1e9 == pytest.approx(21.35, abs=0.01)
    assert parts.total == parts.patch_projection + parts.encoder + parts.embeds + parts.decoders + parts.heads
