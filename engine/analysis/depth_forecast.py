"""Predict how long the measurements of a depth report will take, from a few of their steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from mirl.engine.analysis import depth
from mirl.engine.analysis.features import LabelledFeatures
from mirl.engine.analysis.forecast import Forecast, Part, timed
from mirl.engine.analysis.in_memory import ShortFinetune, accuracy_percent, finetune_in_memory
from mirl.engine.models import MIRL, ModelConfig
from mirl.engine.transfer.classification.classifier import Classifier
from mirl.engine.transfer.classification.linear_probe import train_linear_probe

GRADIENTS, FEATURES, PROBES, FINETUNINGS = "gradient norms", "features", "linear probes", "fine-tunings"
TRIAL_BATCHES = 3
TRIAL_EPOCHS = 5


def forecast(
    *,
    say: Callable[[str], None],
    model: MIRL | None,
    gradient_images: Tensor | None,
    encoder: Classifier | None = None,
    train: depth.LabelledImages | None = None,
    val: depth.LabelledImages | None = None,
    probe_epochs: int = 0,
    source: ModelConfig | None = None,
    weights: dict[str, Tensor] | None = None,
    cuts: int = 0,
    recipe: ShortFinetune | None = None,
    seed: int = 0,
) -> Forecast:
    """Time a few steps of each measurement that is to be made, without changing what the measurements start from.

    Each first step is made and not timed. The arguments are those of the functions in `mirl.engine.analysis.depth`; a
    measurement whose arguments are None is not made.
    """
    parts = []
    if model is not None and gradient_images is not None:
        parts.append(_gradients(model, gradient_images, seed))
    if encoder is not None and train is not None and val is not None:
        parts += [_features(encoder, train, val), _probes(encoder, train, probe_epochs, seed)]
        if cuts and recipe is not None and source is not None and weights is not None:
            parts.append(_finetunings(source, weights, train, val, cuts, recipe, seed))
    return Forecast(parts, say=say)


def _gradients(model: MIRL, images: Tensor, seed: int) -> Part:
    def run(batches: int) -> Callable[[], object]:
        return lambda: depth.gradient_norms(model, images[: batches * depth.GRADIENT_BATCH], seed=seed)

    run(1)()
    some = images[: TRIAL_BATCHES * depth.GRADIENT_BATCH]
    seconds = timed(run(TRIAL_BATCHES)) / len(some)
    return Part(name=GRADIENTS, unit="gradient of image", units=len(images), seconds=seconds)


def _features(encoder: Classifier, train: depth.LabelledImages, val: depth.LabelledImages) -> Part:
    few = dataclasses.replace(train, images=train.images[: TRIAL_BATCHES * depth.FEATURE_BATCH])
    depth.features_by_block(encoder, few)
    seconds = timed(lambda: [block.features.sum().item() for block in depth.features_by_block(encoder, few)])
    images = len(train.images) + len(val.images)
    return Part(name=FEATURES, unit="features of image", units=images, seconds=seconds / len(few.images))


def _probes(encoder: Classifier, train: depth.LabelledImages, epochs: int, seed: int) -> Part:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(len(train.images), encoder.config.width, generator=generator).to(train.images.device)
    made_up = LabelledFeatures(features=features, labels=train.labels, classes=train.classes)
    classes = int(train.labels.max()) + 1
    some = min(epochs, TRIAL_EPOCHS)

    def run(number: int) -> float:
        return train_linear_probe(made_up, num_classes=classes, epochs=number, seed=seed).weight.sum().item()

    run(1)
    seconds = timed(lambda: run(some)) / some * epochs
    return Part(name=PROBES, unit="probe of block", units=encoder.config.built_depth, seconds=seconds)


def _finetunings(
    source: ModelConfig,
    weights: dict[str, Tensor],
    train: depth.LabelledImages,
    val: depth.LabelledImages,
    cuts: int,
    recipe: ShortFinetune,
    seed: int,
) -> Part:
    model = depth.fresh_from(source, weights, train, first=source.built_depth, seed=seed)

    def run(steps: int) -> float:
        finetune_in_memory(model, train.images, train.labels, dataclasses.replace(recipe, steps=steps), seed=seed)
        return next(model.parameters()).sum().item()

    run(1)
    step = timed(lambda: run(TRIAL_BATCHES)) / TRIAL_BATCHES
    few = val.images[: recipe.batch_size]
    evaluation = timed(lambda: accuracy_percent(model, few, val.labels[: len(few)])) / len(few) * len(val.images)
    count = len(depth.cut_depths(source.built_depth, cuts))
    seconds = step + evaluation / recipe.steps
    return Part(name=FINETUNINGS, unit="step of fine-tuning", units=count * recipe.steps, seconds=seconds)
