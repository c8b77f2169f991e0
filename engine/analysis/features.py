"""Extract the features of a labelled set under a frozen encoder once.

Letters: n images, D width.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from mirl.dataloaders import build_eval_loader
from mirl.engine.checkpoints.finding import locate, read_state
from mirl.engine.checkpoints.kinds import ENCODER, PRETRAINED, require_kind
from mirl.engine.checkpoints.pretrained import load_encoder
from mirl.engine.transfer.classification.classifier import Classifier, encoder_config, pool_tokens
from mirl.engine.transfer.classification.evaluation import require_same_classes
from mirl.engine.transfer.classification.linear_probe import LabelledFeatures
from mirl.engine.transfer.initialise_from import initialise_from
from mirl.errors import UserError

HEAD = "head"


def load_frozen_encoder(checkpoint: Path | str, device: torch.device | str = "cpu") -> Classifier:
    """Load the encoder of a checkpoint or run in eval mode: all its blocks and the last norm. Its head is unused.

    Raises:
        UserError: the checkpoint has no whole encoder, or is a classifier that pools the mean: its norm is the head's.
    """
    config, weights = load_encoder(checkpoint)
    if "norm.weight" not in weights:
        state = read_state(locate(Path(checkpoint)))
        require_kind(state, checkpoint, "load_frozen_encoder", ENCODER, PRETRAINED)
    config = dataclasses.replace(encoder_config(config), depth=config.built_depth)
    model = Classifier(config, num_classes=1, pool="token")
    initialise_from(model, config, weights)
    return model.to(device).eval().requires_grad_(False)


@torch.no_grad()
def features(model: Classifier, images: Tensor, *, pool: str = "avg") -> Tensor:
    """Compute the features float32 [B, D] of a batch under a model of `load_frozen_encoder`.

    images: uint8 [B, H, W, C], or float [B, C, H, W] normalised. pool: "avg", the mean of the normed patch tokens;
    "token", the class token; or `HEAD`, the features that a fine-tuned classifier's head sees, whatever its pool.
    """
    if pool == HEAD:
        return model.features(images).float()
    return pool_tokens(model.tokens(images), pool).float()


def extract_features(
    model: Classifier,
    data: Path | str,
    *,
    pool: str,
    device: torch.device,
    batch_size: int = 64,
    threads: int = 4,
    split: str = "train",
    index_dir: Path | None = None,
) -> LabelledFeatures:
    """Compute `features` of every image of ``data``: short side resized, centre crop.

    split: "train" or "val", the part to take of a folder with both. index_dir: the indexes of tar shards, if they are
    not beside the shards.

    Raises:
        UserError: no images or no labels; every image broken.
    """
    config = model.config
    rows_of_batches, labels = [], []
    with build_eval_loader(
        data,
        image_size=(config.image_height, config.image_width),
        batch_size=batch_size,
        device_id=device.index or 0 if device.type == "cuda" else None,
        threads=threads,
        channels=config.channels,
        mean=config.mean,
        std=config.std,
        split=split,
        index_dir=index_dir,
    ) as loader:
        for batch in loader:
            rows = torch.from_numpy(batch.valid.nonzero()[0]).to(device)
            rows_of_batches.append(features(model, batch.images, pool=pool)[rows])
            labels.append(batch.labels[rows])
        classes, skipped, account = loader.classes, len(loader.bad_images), str(loader.ledger)
    found = LabelledFeatures(
        features=torch.cat(rows_of_batches),
        labels=torch.cat(labels),
        classes=classes,
        skipped=skipped,
        account=account,
    )
    if not len(found):
        raise UserError(f"every image of {data} is broken: run mirl validate-data on it")
    return found


def count_classes(train: LabelledFeatures, val: LabelledFeatures, *, names: tuple[str, str]) -> int:
    """Count the classes of both sets. UserError if they differ. ``names``: of the two sets."""
    require_same_classes(train.classes, val.classes, train=names[0], val=names[1])
    if train.classes is not None:
        return len(train.classes)
    classes, largest = int(train.labels.max()) + 1, int(val.labels.max())
    if largest >= classes:
        raise UserError(
            f"{names[1]} has label {largest} and the labels of {names[0]} end at {classes - 1}: give sets of the same "
            "classes"
        )
    return classes
