"""Load a classifier from a checkpoint of fine-tuning, in one call and without a process group."""

from __future__ import annotations

from pathlib import Path

import torch

from mirl.engine.checkpoints.finding import locate, read_state
from mirl.engine.checkpoints.kinds import CLASSIFIER, given, kind_of
from mirl.engine.checkpoints.reader import CheckpointReader
from mirl.engine.training.ema import KIND
from mirl.engine.transfer.classification.classifier import Classifier
from mirl.engine.transfer.classification.config import FinetuneConfig
from mirl.errors import UserError

WEIGHTS = {"last": "weight", "ema": KIND}


def is_classifier(path: Path | str) -> bool:
    """Say whether the checkpoint, or the newest good one of a run, is of fine-tuning. UserError if there is none."""
    return kind_of(read_state(locate(Path(path)))) == CLASSIFIER


def load_classifier(
    path: Path | str, *, which: str | None = None, weights: str | None = None, device: torch.device | str = "cpu"
) -> tuple[Classifier, FinetuneConfig]:
    """Load the fine-tuned model (fp32, in eval mode) and its run's configuration, with the names of its classes.

    path: a checkpoint, or the folder of a run. which: of a run, "best" by validation or "last", the newest; None: the
    best if there is one, as the commands do. weights: "last", as training left them, or "ema", their average; None:
    those that made the checkpoint the best, else "last".

    Raises:
        UserError: ``path`` has no such checkpoint, a damaged one, or one without an average that was asked for.

    >>> model, config = load_classifier("runs/finetune")                         # doctest: +SKIP
    >>> config.classes[model(images).argmax()]                                   # doctest: +SKIP
    """
    found = given(path, which).require("load_classifier", CLASSIFIER)
    weights, reader = weights or found.weights, CheckpointReader(found.checkpoint)
    config = FinetuneConfig.from_dict(reader.state["config"], source=str(reader.path / "state.json"))
    if weights == "ema" and not config.finetune.ema:
        raise UserError(f"weights is 'ema' and {reader.path} was trained with --ema 0: give last")
    model = Classifier(
        config.encoder,
        num_classes=reader.shapes["head.weight"][0],
        pool=config.finetune.pool,
        position_grid=config.pretrained.grid,
        train_positions=config.finetune.train_positions,
    )
    reader.require_same_model({name: tuple(parameter.shape) for name, parameter in model.named_parameters()})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(reader.read(name, WEIGHTS[weights], 0, parameter.numel()).reshape(parameter.shape))
    return model.to(device).eval(), config
