"""Fit a linear probe of the encoder at the start: the head may begin with it, and the classifier is compared with it.

Kumar et al. (2022, "Fine-tuning can distort pretrained features") fit the head to frozen features first. A head near
zero needs hundreds of steps to grow, which a short run does not have, and until then pulls the encoder along.

Letters: n images, D width, C classes.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mirl.dataloaders import Batch, EvalLoader, SubsetSource, build_eval_loader
from mirl.dataloaders.sources.base import Source
from mirl.engine.distributed.launch import Ranks
from mirl.engine.training.plan import RunPlan
from mirl.engine.training.run_data import device_id, loader_threads
from mirl.engine.transfer.classification.classifier import Classifier
from mirl.engine.transfer.classification.config import FinetuneConfig
from mirl.engine.transfer.classification.evaluation import hits
from mirl.engine.transfer.classification.linear_probe import LabelledFeatures, LinearProbe, train_linear_probe
from mirl.errors import UserError

MOST_IMAGES = 20_000
FEWEST_IMAGES = 2_000
EPOCHS = 100
RECORDED = "val_start_probe_top1_percent"


@dataclass(frozen=True, kw_only=True)
class StartProbe:
    """The probe is the same on every rank.

    top1_percent: on the evaluation set; None without one. images, of: how many training images it was fitted to, and
    how many there are.
    """

    probe: LinearProbe
    top1_percent: float | None
    images: int
    of: int

    def __str__(self) -> str:
        share = f"{self.images}" if self.images == self.of else f"{self.images} of {self.of}"
        found = "" if self.top1_percent is None else f", top-1 {self.top1_percent:.2f}%"
        return f"linear probe of the encoder as it is, on {share} training images{found}"


def fit_start_probe(
    plan: RunPlan[FinetuneConfig], model: Classifier, source: Source, val: EvalLoader | None, *, num_classes: int
) -> StartProbe:
    """Fit a linear probe to the features that the head of ``model`` sees in centre crops of ``source``, on all ranks.

    It takes at most `MOST_IMAGES`, spread over the set. It takes no more than the run itself will see, but at least
    `FEWEST_IMAGES` if the set has them.

    Raises:
        UserError: no class has two readable images; a label beyond ``num_classes``.
    """
    config, ranks, encoder = plan.config, plan.ranks, plan.config.encoder
    optim = config.optim
    seen = int((optim.epochs * source.num_images) if optim.epochs else optim.steps * optim.batch_size)
    count = min(MOST_IMAGES, source.num_images, max(FEWEST_IMAGES, seen))
    chosen = SubsetSource(source, [number * source.num_images // count for number in range(count)])
    with build_eval_loader(
        chosen, image_size=(encoder.image_height, encoder.image_width), batch_size=min(64, plan.micro_batch),
        rank=ranks.rank, world_size=ranks.world_size, device_id=device_id(ranks), threads=loader_threads(config, ranks),
        channels=encoder.channels, mean=encoder.mean, std=encoder.std,
        index_dir=Path(config.data.index_dir) if config.data.index_dir else None,
    ) as loader:  # fmt: skip
        train = _features(model, loader, ranks)
    seen_val = None if val is None else _features(model, val, ranks)
    found = None
    if ranks.is_main:
        found = _fit(train, seen_val, num_classes, config.run.seed)
    probe, top1, problem = ranks.broadcast(found)
    if problem:
        raise UserError(problem)
    return StartProbe(probe=probe, top1_percent=top1, images=len(train), of=source.num_images)


def recorded_start(out: Path) -> float | None:
    """Return the top-1 of the probe that the run in folder ``out`` recorded at its start; None if it recorded none."""
    found = None
    with contextlib.suppress(FileNotFoundError):
        for line in (out / "metrics.jsonl").read_text().splitlines():
            with contextlib.suppress(ValueError, AttributeError):
                found = json.loads(line).get(RECORDED, found)
    return found


def compare_with_start(reached: float | None, probe: float | None, unknown: str) -> str:
    """Write one line that compares the top-1 of the classifier, ``reached``, with that of the probe, in per cent.

    reached: None if no evaluation was as good as the probe at the start. unknown: why there is no ``probe``.
    """
    if probe is None:
        return f"not compared with a linear probe of the encoder it began from: {unknown}"
    if reached is None:
        return (
            f"NOT AS GOOD AS THE PROBE: no evaluation reached the {probe:.2f}% of the linear probe that the "
            "run began with, which is kept as the best checkpoint: train longer or with a lower --lr "
            "(docs/finetuning.md)"
        )
    if reached >= probe:
        return f"top-1 {reached:.2f}%; a linear probe of the encoder it began from has {probe:.2f}%"
    return (
        f"BELOW THE PROBE: top-1 {reached:.2f}%; a linear probe of the encoder it began from has {probe:.2f}%: train "
        "longer, with --head-init probe, or with a lower --lr (docs/finetuning.md)"
    )


def _fit(
    train: LabelledFeatures, val: LabelledFeatures | None, num_classes: int, seed: int
) -> tuple[LinearProbe | None, float | None, str]:
    """Return (probe, its top-1 in per cent on ``val``, why there is none), on one rank."""
    largest = int(train.labels.max()) if len(train) else -1
    if largest >= num_classes:
        return None, None, f"data has label {largest} and num_classes is {num_classes}: give at least {largest + 1}"
    try:
        probe = train_linear_probe(train, num_classes=num_classes, epochs=EPOCHS, seed=seed, by_loss=True)
    except UserError as error:
        return None, None, str(error)
    if val is None or not len(val):
        return probe, None, ""
    # It counts in whole numbers, as an evaluation does, because the two are compared.
    return probe, 100 * int(hits(probe(val.features), val.labels)[:, 0].sum()) / len(val), ""


@torch.no_grad()
def set_head(model: Classifier, probe: LinearProbe) -> None:
    """Make the head of ``model`` give the logits of ``probe``; its weights take in the standardisation of features."""
    weight_CD = probe.weight / probe.deviation
    model.head.weight.copy_(weight_CD)
    model.head.bias.copy_(probe.bias - weight_CD @ probe.mean)


@torch.no_grad()
def _features(model: Classifier, batches: Iterable[Batch], ranks: Ranks) -> LabelledFeatures:
    """Return the features that the head sees of every readable image, of all ranks, on the CPU."""
    features, labels = [torch.empty(0, model.config.width)], [torch.empty(0, dtype=torch.int64)]
    training = model.training
    model.eval()
    try:
        for batch in batches:
            assert batch.labels is not None and batch.valid is not None
            rows = torch.from_numpy(batch.valid.nonzero()[0])
            features.append(model.features(batch.images).float().cpu()[rows])
            labels.append(batch.labels.cpu()[rows])
    finally:
        model.train(training)
    parts: list[tuple[Tensor, Tensor]] = ranks.gather((torch.cat(features), torch.cat(labels)))
    return LabelledFeatures(
        features=torch.cat([part[0] for part in parts]), labels=torch.cat([part[1] for part in parts]), classes=None
    )
