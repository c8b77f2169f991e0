"""The training data of a run: one loader a rank, the same data on every rank."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirl.dataloaders import TrainLoader, build_train_loader, prepare_demo
from mirl.dataloaders.sources.containers import with_window
from mirl.engine.configuration.config import Config, PretrainConfig
from mirl.engine.distributed.launch import Ranks, cores_per_rank
from mirl.engine.models import ModelConfig
from mirl.engine.training.plan import RunPlan, agree_on_main
from mirl.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ImageShape:
    """Of the images that a model takes: pixels, channels, and the statistics of each channel."""

    height: int
    width: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, model: ModelConfig) -> ImageShape:
        return cls(
            height=model.image_height, width=model.image_width, channels=model.channels, mean=model.mean, std=model.std
        )


def build_loader(plan: RunPlan[Any], shape: ImageShape, **options: Any) -> TrainLoader:
    """The training loader of this rank; ``options`` go to `build_train_loader`. UserError where ranks differ."""
    config, ranks = plan.config, plan.ranks
    sources = [Path(path) for path in config.data.data]
    if not sources:
        # One process cuts the photographs, the others find them cut.
        if ranks.local_rank == 0:
            prepare_demo()
        ranks.barrier()
        sources = [prepare_demo()]
    data = config.data
    assert data.crop_scale is not None and data.centre_crops is not None, "a scaled setting was not resolved"
    loader = build_train_loader(
        with_window(sources, data.window),
        image_size=(shape.height, shape.width),
        micro_batch=plan.micro_batch,
        accumulation=plan.accumulation,
        rank=ranks.rank,
        world_size=ranks.world_size,
        seed=config.run.seed,
        device_id=device_id(ranks),
        threads=loader_threads(config, ranks),
        scale=data.crop_scale,
        ratio=data.crop_ratio,
        flip=data.flip,
        centred=data.centre_crops,
        channels=shape.channels,
        mean=shape.mean,
        std=shape.std,
        index_dir=data.index_dir or None,
        bad_image_limit=data.max_bad_images,
        resumed_fingerprint=_fingerprint(plan),
        raise_on_bad_limit=False,  # the trainer lets all ranks agree to stop
        **options,
    )
    if len(set(ranks.gather(loader.fingerprint))) > 1:
        seen = ", ".join(f"rank {rank} {count}" for rank, count in enumerate(ranks.gather(loader.num_images)))
        raise UserError(f"the ranks see different data sets (images: {seen}): give every host the same files")
    return loader


def settle_statistics(plan: RunPlan[PretrainConfig], loader: TrainLoader) -> RunPlan[PretrainConfig]:
    """Return ``plan`` with one mean and std for all channels where the data set is grey, with a remark that says so.

    Statistics that differ by channel would colour the target of a grey image: normalised patch by patch, a flat patch
    is nothing but the differences between them. Rank 0 looks and all ranks agree. A resumed run keeps what it has.
    """
    model = plan.config.model
    equal = len(set(model.mean)) == len(set(model.std)) == 1
    if model.statistics != "auto" or equal or plan.resumed_from is not None:
        return plan
    if not agree_on_main(plan.ranks, loader.is_grey):
        return plan
    grey = dataclasses.replace(model, statistics="grey")
    loader.take_statistics(grey.mean, grey.std)
    remark = (
        f"the images are grey: mean {grey.mean[0]:g} and std {grey.std[0]:g} in all {grey.channels} channels "
        "(--mean and --std give others)"
    )
    config = dataclasses.replace(plan.config, model=grey)
    return dataclasses.replace(plan, config=config, remarks=[*plan.remarks, remark])


def _fingerprint(plan: RunPlan[Any]) -> str | None:
    """The data set of the checkpoint that the run goes on from; imported ones have none."""
    return plan.resumed_from.state.get("loader", {}).get("fingerprint") if plan.resumed_from is not None else None


def device_id(ranks: Ranks) -> int | None:
    """The GPU that decodes, None for the CPU."""
    return ranks.device.index if ranks.device.type == "cuda" else None


def loader_threads(config: Config, ranks: Ranks) -> int:
    return config.data.loader_threads or min(16, cores_per_rank(ranks.local_world_size))
