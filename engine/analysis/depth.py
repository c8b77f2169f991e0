"""Measure the blocks of a pre-trained encoder one by one, to tell whether its depth is of use.

There are three measurements. Gradient norms (the paper's appendix C): a block that pre-training hardly moves has little
to learn from it. Linear probes on every block: accuracy that falls towards the end says that late features serve the
reconstruction and nothing else. Fine-tuning with the blocks from some depth on initialised afresh (the paper's Fig. 2):
if the fresh blocks do no harm, or even help, then their pre-trained weights were worth nothing.

Letters: n images, L blocks, B of a batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from mirl.dataloaders import SubsetSource, build_eval_loader, open_source
from mirl.engine.analysis.features import count_classes
from mirl.engine.analysis.forecast import Advance, ignore
from mirl.engine.analysis.in_memory import ShortFinetune, accuracy_percent, finetune_in_memory
from mirl.engine.models import MIRL, ModelConfig
from mirl.engine.models.teacher import EmaTeacher
from mirl.engine.training.noise import mask_noise
from mirl.engine.transfer.classification.classifier import Classifier, encoder_config
from mirl.engine.transfer.classification.linear_probe import LabelledFeatures, train_linear_probe
from mirl.engine.transfer.initialise_from import initialise_from, reinit_last
from mirl.errors import UserError

GRADIENT_BATCH = 32
FEATURE_BATCH = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelledImages:
    """The images of a data set are in memory with their labels.

    images: uint8 [n, H, W, C] or normalised float32 [n, C, H, W]. labels: int64 [n]. classes: names, None without
    folders.
    account: how many files there are, as text (see `Ledger`).
    """

    images: Tensor
    labels: Tensor
    classes: list[str] | None
    account: str = ""


def load_labelled(
    data: Path,
    config: ModelConfig,
    *,
    limit: int,
    device: torch.device,
    labels: bool = True,
    split: str = "train",
    index_dir: Path | None = None,
    batch_size: int = 64,
) -> LabelledImages:
    """Load at most ``limit`` images of ``data``, spread evenly over it, centre-cropped to the size of ``config``.

    split: "train" or "val", the part to take of a folder with both. index_dir: the indexes of tar shards, if they are
    not beside the shards.

    Raises:
        UserError: no images or, if they are wanted, no labels.
    """
    source = open_source(data, labels=labels, split=split, index_dir=index_dir)
    count = min(limit, source.num_images)
    chosen = SubsetSource(source, [number * source.num_images // count for number in range(count)])
    images, found = [], []
    with build_eval_loader(
        chosen, image_size=(config.image_height, config.image_width), batch_size=batch_size,
        device_id=device.index or 0 if device.type == "cuda" else None, channels=config.channels, mean=config.mean,
        std=config.std, labels=labels,
    ) as loader:  # fmt: skip
        for batch in loader:
            rows = torch.from_numpy(batch.valid.nonzero()[0]).to(device)
            images.append(batch.images[rows])
            found.append(batch.labels[rows] if labels else rows)
    if not sum(map(len, images)):
        raise UserError(f"every image of {data} is broken: run mirl validate-data on it")
    return LabelledImages(
        images=torch.cat(images), labels=torch.cat(found), classes=source.classes, account=str(chosen.ledger)
    )


@dataclasses.dataclass(frozen=True)
class GradientNorms:
    """Each block has the ``norm`` of its gradient over all images, and ``noise``, the norm of its sampling error.

    The error is half the difference between the mean gradients of two halves of the images, which has the variance of
    their mean. So norm^2 is about (norm of the true gradient)^2 + noise^2. ``noise`` is None if the images are one
    batch.
    """

    norm: list[float]
    noise: list[float] | None


def gradient_norms(
    model: MIRL, images: Tensor, *, seed: int, batch_size: int = GRADIENT_BATCH, advance: Advance = ignore
) -> GradientNorms:
    """Measure the norm of the gradient in each block's parameters, for the pre-training loss averaged over ``images``.

    Masks are those of ``seed``. The teacher of a feature loss is a copy of the encoder itself; a VGG loss is left out.
    advance: is told how many images were done.
    """
    config = model.config
    teacher = EmaTeacher(model, config, decay=0.0) if config.feature_loss else None
    model.eval()  # without stochastic depth, the norms are a function of the images and the seed
    model.zero_grad()
    parameters = [list(block.parameters()) for block in model.encoder.blocks]
    starts = list(range(0, len(images), batch_size))
    middle = starts[len(starts) // 2]  # 0 if there is one batch
    first_half: list[list[Tensor]] = []
    for first in starts:
        if first == middle and middle:
            first_half = [[_gradient(parameter).clone() for parameter in block] for block in parameters]
        batch = images[first : first + batch_size]
        noise = mask_noise(seed, 0, first, len(batch), config.num_patches).to(batch.device)
        features = {} if teacher is None else {"teacher_features": teacher(batch)}
        # A full pass has the same loss and needs no VGG-16, which a checkpoint does not hold.
        output = model(batch, noise=noise, full=bool(config.vgg_loss), **features)
        (output.loss * (len(batch) / len(images))).backward()
        advance(len(batch))
    norms = [_norm(_gradient(parameter) for parameter in block) for block in parameters]
    noises = None
    if middle:
        # The sum of both halves is g. The noise is half the difference of their means, a / share and (g - a) / (1 -
        # share).
        share = middle / len(images)
        noises = [
            _norm((half / share - (_gradient(parameter) - half) / (1 - share)) / 2 for parameter, half in pairs)
            for pairs in (zip(block, halves, strict=True) for block, halves in zip(parameters, first_half, strict=True))
        ]
    model.zero_grad()
    return GradientNorms(norms, noises)


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None, "a block's parameter has no gradient"
    return parameter.grad


def _norm(tensors: Iterable[Tensor]) -> float:
    return torch.stack([tensor.norm() for tensor in tensors]).norm().item()


def features_by_block(
    encoder: Classifier, data: LabelledImages, *, batch_size: int = FEATURE_BATCH, advance: Advance = ignore
) -> list[LabelledFeatures]:
    """Return the mean patch token of each image after each block. advance: is told how many images were done."""
    encoder.eval()
    batches = []
    for part in data.images.split(batch_size):
        batches.append(encoder.block_features(part))
        advance(len(part))
    return [
        LabelledFeatures(features=torch.cat(block).float(), labels=data.labels, classes=data.classes)
        for block in zip(*batches, strict=True)
    ]


def probe_accuracies(
    train: list[LabelledFeatures],
    val: list[LabelledFeatures],
    *,
    epochs: int,
    seed: int,
    advance: Advance = ignore,
) -> list[float]:
    """Return the top-1 in per cent on ``val`` of a linear probe after each block.

    train, val: as `features_by_block` returns them. advance: is told of each block.
    """
    accuracies = []
    for seen, unseen in zip(train, val, strict=True):
        classes = count_classes(seen, unseen, names=("data", "val"))
        probe = train_linear_probe(seen, num_classes=classes, epochs=epochs, seed=seed)
        hit = probe(unseen.features).argmax(dim=1) == unseen.labels
        accuracies.append(100 * hit.float().mean().item())
        advance(1)
    return accuracies


def cut_depths(depth: int, cuts: int) -> list[int]:
    """Return the first fresh blocks to try: ``cuts`` depths, spread evenly over 0 .. depth - 1, and depth (none)."""
    return sorted({round(depth * number / cuts) for number in range(cuts)} | {depth})


def fresh_from(
    source: ModelConfig, encoder_weights: dict[str, Tensor], data: LabelledImages, *, first: int, seed: int
) -> Classifier:
    """Make a classifier of the classes of ``data``, on its device: pre-trained, but fresh from block ``first`` on."""
    classes = int(data.labels.max()) + 1 if data.classes is None else len(data.classes)
    config = dataclasses.replace(encoder_config(source), depth=source.built_depth)
    torch.manual_seed(seed)
    model = Classifier(config, num_classes=classes)
    initialise_from(model, config, encoder_weights)
    reinit_last(model, config.depth - first, seed)
    return model.to(data.images.device)


def reinit_accuracies(
    source: ModelConfig,
    encoder_weights: dict[str, Tensor],
    train: LabelledImages,
    val: LabelledImages,
    *,
    cuts: int,
    recipe: ShortFinetune,
    seed: int,
    advance: Advance = ignore,
) -> dict[int, float]:
    """Return {first fresh block: top-1 in per cent on ``val`` after a short fine-tuning}; the depth means none.

    advance: is told of each step.
    """
    accuracies = {}
    for first in cut_depths(source.built_depth, cuts):
        model = fresh_from(source, encoder_weights, train, first=first, seed=seed)
        finetune_in_memory(model, train.images, train.labels, recipe, seed=seed, advance=advance)
        accuracies[first] = accuracy_percent(model, val.images, val.labels)
    return accuracies
