"""What a pre-training run evaluates on: held-out images, and labelled ones for a linear probe.

Letters: n images.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mirl.dataloaders import EvalLoader, ImageError, SubsetSource, build_eval_loader, load_images, open_source
from mirl.dataloaders.sources.base import JoinedSource, Source
from mirl.dataloaders.sources.listing import split_folder
from mirl.engine.configuration.config import PretrainConfig
from mirl.engine.training.plan import RunPlan, agree_on_main
from mirl.engine.training.run_data import device_id, loader_threads
from mirl.engine.transfer.classification.classes import require_same_classes
from mirl.errors import UserError
from mirl.keyed import keyed_u64

MOST_PROBED = 5000  # images that the probe is fitted to, and as many that it is measured on
MEASURED_SHARE = 5  # one in so many images of each class measures the probe, where there is no split for it
TRIED = 8  # images that are read before the run begins
BATCH = 64  # at most, of an evaluation
_SPLIT_STREAM = 14  # first word of a key; others are in engine/training/noise.py


@dataclass(frozen=True, kw_only=True)
class ProbeData:
    """loader: the images that the probe is fitted to, ``fitted`` of them, then those that it is measured on."""

    loader: EvalLoader
    fitted: int
    num_classes: int


def require_whole_weights(plan: RunPlan[PretrainConfig]) -> None:
    """UserError where a probe is asked for and no rank has the whole encoder, which it runs by itself."""
    if plan.config.log.probe and plan.ds_config.get("zero_optimization", {}).get("stage") == 3:
        raise UserError(
            f"probe is {' '.join(plan.config.log.probe)} and {plan.config.run.deepspeed_config} is ZeRO stage 3, where "
            "no rank has the whole encoder: use --deepspeed_config zero2, or mirl probe on a checkpoint"
        )


def open_val(plan: RunPlan[PretrainConfig]) -> EvalLoader | None:
    """The held-out images of ``plan``, each once over all ranks; None where none were asked for.

    Raises:
        UserError: there are no images, or those that were tried cannot be read as the model's.
    """
    paths = plan.config.log.val
    if not paths:
        return None
    source = open_source([Path(path) for path in paths], index_dir=plan.config.data.index_dir or None, split="val")
    agree_on_main(plan.ranks, lambda: _require_readable(source, plan.config, "val"))
    return _loader(plan, source, labels=False)


def open_probe(plan: RunPlan[PretrainConfig]) -> ProbeData | None:
    """The labelled images of ``plan``; None where none were asked for.

    A folder with train/ beside val/ has them apart. Of other data one in `MEASURED_SHARE` of each class is set aside.

    Raises:
        UserError: no images, no labels, fewer than two classes, or no class with two images.
    """
    config = plan.config
    if not config.log.probe:
        return None
    roots = [Path(path).expanduser() for path in config.log.probe]
    index_dir = config.data.index_dir or None
    train = open_source(roots, labels=True, index_dir=index_dir, split="train")
    apart = [split_folder(root, "train") != split_folder(root, "val") for root in roots]
    if all(apart):
        val = open_source(roots, labels=True, index_dir=index_dir, split="val")
        require_same_classes(train.classes, val.classes, train="probe (train)", val="probe (val)")
        source: Source = JoinedSource([train, val])
        fit = np.arange(train.num_images)
        measure = np.arange(train.num_images, source.num_images)
    else:
        source = train
        fit, measure = np.arange(0), np.arange(0)
    labels_n = np.array(agree_on_main(plan.ranks, lambda: _labels(source)))
    classes = len(np.unique(labels_n))
    if classes < 2:
        raise UserError(f"probe is {' '.join(config.log.probe)}, which has one class: give images of two or more")
    if not all(apart):
        fit, measure = _set_aside(labels_n)
        if not len(measure):
            raise UserError(f"probe is {' '.join(config.log.probe)}, where no class has two images: give more of them")
    fit, measure = _spread(fit, labels_n), _spread(measure, labels_n)
    chosen = SubsetSource(source, [*fit.tolist(), *measure.tolist()])
    agree_on_main(plan.ranks, lambda: _require_readable(chosen, config, "probe"))
    return ProbeData(loader=_loader(plan, chosen, labels=True), fitted=len(fit), num_classes=int(labels_n.max()) + 1)


def _loader(plan: RunPlan[PretrainConfig], source: Source, *, labels: bool) -> EvalLoader:
    config, ranks, model = plan.config, plan.ranks, plan.config.model
    return build_eval_loader(
        source, image_size=(model.image_height, model.image_width), batch_size=min(BATCH, plan.micro_batch),
        rank=ranks.rank, world_size=ranks.world_size, device_id=device_id(ranks), threads=loader_threads(config, ranks),
        channels=model.channels, mean=model.mean, std=model.std, index_dir=config.data.index_dir or None,
        labels=labels,
    )  # fmt: skip


def _require_readable(source: Source, config: PretrainConfig, name: str) -> None:
    """UserError where none of some images, spread over ``source``, can be read as those of the model."""
    model, problem = config.model, ""
    count = min(TRIED, source.num_images)
    for index in (number * source.num_images // count for number in range(count)):
        try:
            load_images(
                [source.path(index)], image_size=(model.image_height, model.image_width), channels=model.channels,
                mean=model.mean, std=model.std, index_dir=config.data.index_dir or None,
            )  # fmt: skip
            return
        except UserError as error:
            problem = problem or str(error)
    given = " ".join(getattr(config.log, name))
    raise UserError(f"{name} is {given}, where {count} of {count} images tried cannot be read: {problem}")


def _labels(source: Source) -> list[int]:
    found = []
    for index in range(source.num_images):
        try:
            found.append(source.label(index))
        except ImageError as error:
            raise UserError(f"probe: {source.path(index)}: {error}; mend this sample or leave it out") from error
    if min(found) < 0:
        raise UserError(f"probe has label {min(found)}: give class numbers from 0")
    return found


def _set_aside(labels_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the images to fit to and to measure on: of each class with two or more the latter are at least one."""
    order_n = np.argsort(keyed_u64(_SPLIT_STREAM, np.arange(len(labels_n))), kind="stable")
    members: dict[int, list[int]] = defaultdict(list)
    for index in order_n.tolist():
        members[int(labels_n[index])].append(index)
    fit, measure = [], []
    for numbers in members.values():
        aside = max(1, len(numbers) // MEASURED_SHARE) if len(numbers) > 1 else 0
        measure += numbers[:aside]
        fit += numbers[aside:]
    return np.sort(fit).astype(np.int64), np.sort(measure).astype(np.int64)


def _spread(rows: np.ndarray, labels_n: np.ndarray) -> np.ndarray:
    """At most `MOST_PROBED` of ``rows``, evenly from all classes."""
    if len(rows) <= MOST_PROBED:
        return rows
    by_class = rows[np.argsort(labels_n[rows], kind="stable")]
    return np.sort(by_class[np.arange(MOST_PROBED) * len(rows) // MOST_PROBED])
