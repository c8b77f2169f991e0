"""The segmentation run builds a segmenter from a checkpoint and pairs of images, and describes it in the log."""

from __future__ import annotations

import dataclasses
import math
import os
import shlex
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mirl.dataloaders import TrainLoader
from mirl.dataloaders.decoding.pair_crops import PairAugmentation
from mirl.dataloaders.label_scan import scan_labels
from mirl.dataloaders.order import StepPlan
from mirl.dataloaders.pair_loader import PairLoader, PairReader
from mirl.dataloaders.sources.label_map import IGNORED, LabelMap, map_of_values
from mirl.dataloaders.sources.label_pairs import PairSource
from mirl.engine.accounting.run_memory import Footprint, segmenter_footprint
from mirl.engine.checkpoints.pretrained import load_encoder, load_weights
from mirl.engine.distributed.ds_engine import FragmentReader
from mirl.engine.distributed.launch import Ranks
from mirl.engine.models import ModelConfig
from mirl.engine.training.computing import set_computation
from mirl.engine.training.plan import RunPlan, agree_on_main
from mirl.engine.training.resumed_settings import differences, refuse_unnamed
from mirl.engine.training.run import RunKind, RunParts, run_training
from mirl.engine.training.run_data import loader_threads
from mirl.engine.transfer.dense.norms import each_rank_alone
from mirl.engine.transfer.encoder_model import encoder_config
from mirl.engine.transfer.initialise_from import exact_reader, initialise_from
from mirl.engine.transfer.layer_decay import layer_decay_groups
from mirl.engine.transfer.segmentation.config import SegmentConfig
from mirl.engine.transfer.segmentation.early import given_map, open_sets, require_inputs
from mirl.engine.transfer.segmentation.load import build_segmenter, view_of
from mirl.engine.transfer.segmentation.recipes import segment_recipe
from mirl.engine.transfer.segmentation.segmenter import Segmenter
from mirl.engine.transfer.segmentation.task import SegmentTask, pixel_cross_entropy
from mirl.engine.transfer.segmentation.upernet import AUXILIARY_WEIGHT
from mirl.errors import UserError

SegmentPlan = RunPlan[SegmentConfig]
EVALUATIONS = 10  # a run has so many if no interval is given
CLASSES = 150  # ADE20K's number, with which memory is estimated before the label images are opened


def segment(config: SegmentConfig) -> Path:
    """Run ``config`` on this rank; return the run's folder. Raises what `run_training` does."""
    return run_training(config, Segmenting())


class Segmenting(RunKind[SegmentConfig]):
    """This kind of run trains a segmenter end to end from a pre-trained encoder on images with label images."""

    train: PairSource
    val: PairSource | None

    def __init__(self) -> None:
        self._remarks: list[str] = []
        self._pixels: np.ndarray | None = None

    def recipe_out(self, recipe: str) -> str:
        return segment_recipe(recipe).run.out

    def read_start(self, plan: SegmentPlan) -> SegmentPlan:
        """Return the plan with the encoder's two configurations."""
        require_inputs(plan.config)
        source = agree_on_main(plan.ranks, lambda: _source_config(plan))
        plan = plan.with_config(_with_models(plan.config, source))
        if source.channels not in (1, 3):
            raise UserError(f"channels is {source.channels}: segmentation reads pictures of 1 or 3 channels")
        return plan

    def footprint(self, plan: SegmentPlan) -> Footprint:
        config, section = plan.config, plan.config.segment
        return segmenter_footprint(
            _with_models(config, config.pretrained).encoder, len(config.classes) if config.labels else CLASSES,
            section.head_channels, plan.precision, on_gpu=plan.ranks.device.type == "cuda",
            checkpointing=config.run.activation_checkpointing, recompute=config.run.recompute_pointwise,
            # Batch norms take statistics of a micro-batch: results depend on its size, and one image of one place has
            # none.
            group=2 if section.norm == "batch" else 1,
        )  # fmt: skip

    def open_data(self, plan: SegmentPlan, closing: ExitStack) -> tuple[SegmentPlan, TrainLoader]:
        """Open the data, and return the plan with the meaning of the values in label images."""
        config, ranks, model = plan.config, plan.ranks, plan.config.encoder
        self.train, self.val = agree_on_main(ranks, lambda: open_sets(config))
        threads = loader_threads(config, ranks)
        known = agree_on_main(ranks, lambda: given_map(config, self.train, self.val))
        self._pixels = scan_on_all(ranks, self.train, known, threads)
        if known is None:
            known = map_of_values(np.flatnonzero(self._pixels).tolist(), config.segment.ignore)
        if len(known.names) < 2:
            raise UserError(
                f"data has {len(known.names)} class in its label images ({known}): segmentation needs two or more"
            )
        if self.val is not None:
            scan_on_all(ranks, self.val, known, threads)
        if plan.reader is not None:
            _require_same_labels(known, plan.reader.state["config"], plan.reader.path)
        plan = plan.with_config(dataclasses.replace(config, labels=known))
        section = config.segment
        loader = PairLoader(
            self.train,
            StepPlan(
                num_images=self.train.num_images, micro_batch=plan.micro_batch, accumulation=plan.accumulation,
                rank=ranks.rank, world_size=ranks.world_size,
            ),
            PairAugmentation(
                size=(model.image_height, model.image_width), scale=section.scale, cat_max_ratio=section.cat_max_ratio,
                flip=config.data.flip, photometric=section.photometric, mean=model.mean,
            ),
            known, channels=model.channels, seed=config.run.seed, device=ranks.device, threads=threads,
            bad_image_limit=config.data.max_bad_images,
            raise_on_bad_limit=False,  # the trainer lets all ranks agree to stop
        )  # fmt: skip
        closing.callback(loader.close)
        return plan, loader

    def build_model(self, plan: SegmentPlan) -> Segmenter:
        config, section, device = plan.config, plan.config.segment, plan.ranks.device
        if section.norm == "batch" and plan.micro_batch * plan.ranks.world_size < 2:
            raise UserError(
                "norm is batch and a forward pass has one image, which has no statistics: give --micro-batch 2 or "
                "more, or --norm group"
            )
        torch.manual_seed(config.run.seed)
        model = build_segmenter(config)
        set_computation(model, config.run, device)
        if plan.reader is not None:
            load_weights(model, plan.reader)
        elif section.fresh:
            self._remarks = ["the encoder is fresh: nothing of the checkpoint but its shape is used"]
        else:
            self._remarks = initialise_from(model, *load_encoder(section.checkpoint))
        return model.to(device)

    def trial_loss(self, plan: SegmentPlan, model: Segmenter, images: Tensor, generator: torch.Generator) -> Tensor:  # type: ignore[override]
        """Return the cross-entropy of both heads with random labels; batch statistics are those of this rank."""
        labels_BHW = torch.randint(0, model.num_classes, images.shape[:3], generator=generator).to(images.device)
        with each_rank_alone():
            decode, auxiliary = model(images)
        return pixel_cross_entropy(decode, labels_BHW) + AUXILIARY_WEIGHT * pixel_cross_entropy(auxiliary, labels_BHW)

    def parameter_groups(self, plan: SegmentPlan, model: Segmenter) -> list[dict[str, Any]]:
        config = plan.config
        return layer_decay_groups(model, weight_decay=config.optim.weight_decay, decay=config.segment.layer_decay)

    def exact_weights(self, plan: SegmentPlan, model: Segmenter) -> FragmentReader:
        return exact_reader(model)

    def build_task(self, parts: RunParts[SegmentConfig]) -> SegmentTask:
        plan, config, total = parts.plan, parts.plan.config, parts.durations.total_steps
        section = config.segment
        every = round(section.eval_every * parts.loader.steps_per_epoch) or (1 if section.eval_every else 0)
        train, val = (
            None if source is None else PairReader(source, config.label_map, channels=config.encoder.channels)
            for source in (self.train, self.val)
        )
        assert train is not None
        return SegmentTask(
            ranks=plan.ranks, engine=parts.engine, log=parts.log, seed=config.run.seed, names=config.classes,
            view=view_of(config), val=val, eval_every=every or math.ceil(total / EVALUATIONS), shown=val or train,
            picture_every=parts.durations.picture_every, pictures=config.log.pictures,
            threads=loader_threads(config, plan.ranks),
        )  # fmt: skip

    def opening_lines(self, plan: SegmentPlan, parameters: int) -> list[str]:
        config, model, section = plan.config, plan.config.encoder, plan.config.segment
        evaluated = f"evaluated on {self.val.ledger}, {view_of(config)}" if self.val else "not evaluated (no --val)"
        return [
            f"segmentation, recipe {config.recipe}, out {config.run.out} (resolved configuration in config.json)",
            f"encoder {model.label} from {section.checkpoint}: depth {model.depth}, width {model.width}; UperNet with "
            f"{section.norm} norms, {parameters / 1e6:.1f} M parameters; crop {model.image_height}x{model.image_width}x"
            f"{model.channels}; {evaluated}",
            f"labels: {config.label_map}",
            *self._unseen(config.label_map),
            f"layer decay {section.layer_decay:g}, drop path {section.drop_path:g}, scale {section.scale[0]:g} to "
            f"{section.scale[1]:g}, cat_max_ratio {section.cat_max_ratio:g}, photometric "
            f"{'on' if section.photometric else 'off'}",
            *self._remarks,
        ]

    def _unseen(self, known: LabelMap) -> list[str]:
        """Return a line that names classes without a pixel in the training set."""
        assert self._pixels is not None
        seen = set(known.table()[np.flatnonzero(self._pixels)].tolist()) - {IGNORED}
        missing = [name for index, name in enumerate(known.names) if index not in seen]
        return [f"warning: no pixel of data is {', '.join(missing[:8])}: they cannot be learned"] if missing else []

    def closing_lines(self, out: Path) -> list[str]:
        run = shlex.quote(os.fspath(out))
        return [
            f"  mirl predict {run} IMAGE ... --out DIR     classes of every pixel, as pictures and numbers",
            f"  mirl export {run} --to hf --out DIR        for transformers, with equal outputs",
        ]


def scan_on_all(ranks: Ranks, source: PairSource, known: LabelMap | None, threads: int) -> np.ndarray:
    """Scan a part of the files on each rank by `scan_labels`; return the sum, or raise the first problem, on all."""
    found, problem = None, None
    try:
        found = scan_labels(source, known, threads=threads, rank=ranks.rank, world_size=ranks.world_size)
    except (UserError, OSError) as error:
        problem = str(error)
    problems = [text for text in ranks.gather(problem) if text]
    if problems:
        error = UserError(problems[0])
        error.of_all_ranks = True
        raise error
    return np.sum(ranks.gather(found), axis=0)


def _source_config(plan: SegmentPlan) -> ModelConfig:
    """Return the configuration of the pre-trained encoder; a resumed run has it without the pre-trained checkpoint."""
    config = plan.config
    if plan.reader is not None:
        if "segment" not in plan.reader.state["config"]:
            raise UserError(f"resume: {plan.reader.path} is no segmenter: start from it by --checkpoint")
        saved = SegmentConfig.from_dict(plan.reader.state["config"], source=str(plan.reader.path))
        asked = _with_models(config, saved.pretrained)
        found = differences("model", ModelConfig, asked.encoder, dataclasses.asdict(saved.encoder))
        refuse_unnamed([item for item in found if not item.free], asked, plan.reader.path)
        return saved.pretrained
    return load_encoder(config.segment.checkpoint)[0]


def _with_models(config: SegmentConfig, source: ModelConfig) -> SegmentConfig:
    section = config.segment
    model = config.resized(encoder_config(source, section.drop_path, section.attention))
    return dataclasses.replace(config, source=source, model=model)


def _require_same_labels(known: LabelMap, saved: dict[str, Any], path: Path) -> None:
    theirs = LabelMap.from_dict(saved["labels"])
    if theirs.meanings() != known.meanings() or theirs.names != known.names:
        raise UserError(
            f"the label images mean {known} and {path} was trained with {theirs}: give the data, --label-map and "
            "--ignore that it was trained with"
        )
