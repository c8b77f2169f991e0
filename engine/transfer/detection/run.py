"""The detection run builds a detector from a pre-trained encoder, and describes it in the log."""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mirl.dataloaders.order import StepPlan
from mirl.engine.accounting.detection import detector_flops, detector_image_bytes
from mirl.engine.accounting.run_memory import Footprint, writes_out_attention
from mirl.engine.checkpoints.pretrained import load_encoder, load_weights
from mirl.engine.distributed.ds_engine import FragmentReader
from mirl.engine.models import ModelConfig
from mirl.engine.training.computing import set_computation
from mirl.engine.training.plan import RunPlan, agree_on_main
from mirl.engine.training.resumed_settings import differences, refuse_unnamed
from mirl.engine.training.run import RunKind, RunParts, run_training
from mirl.engine.training.run_data import loader_threads
from mirl.engine.transfer.detection.annotations import CocoSet
from mirl.engine.transfer.detection.config import DetectConfig
from mirl.engine.transfer.detection.detector import Detector, padding_multiple
from mirl.engine.transfer.detection.early import open_sets, require_inputs
from mirl.engine.transfer.detection.load import build_detector, shape_of
from mirl.engine.transfer.detection.loader import DetectionBatch, DetectionLoader, evaluation_batches
from mirl.engine.transfer.detection.recipes import detect_recipe
from mirl.engine.transfer.detection.task import DetectTask
from mirl.engine.transfer.detection.transforms import for_evaluation, pad_together
from mirl.engine.transfer.encoder_model import encoder_config
from mirl.engine.transfer.initialise_from import exact_reader, initialise_from
from mirl.engine.transfer.layer_decay import layer_decay_groups
from mirl.errors import UserError

DetectPlan = RunPlan[DetectConfig]
TRIAL_OBJECTS = 20  # objects of an image; the estimate counts as many masks
MANY_TOKENS = 2048
USUAL_CLASSES = 80  # an estimate before the annotations are read assumes so many


def detect(config: DetectConfig) -> Path:
    """Run ``config`` on this rank; return the run's folder. Raises what `run_training` does."""
    return run_training(config, Detection())


class Detection(RunKind[DetectConfig]):
    """This kind of run trains a Mask R-CNN end to end from a pre-trained encoder on COCO annotations."""

    train: CocoSet
    val: CocoSet | None

    def __init__(self) -> None:
        self._remarks: list[str] = []

    def recipe_out(self, name: str) -> str:
        return detect_recipe(name).run.out

    def read_start(self, plan: DetectPlan) -> DetectPlan:
        """Return the plan with the encoder's two configurations."""
        require_inputs(plan.config)
        source = agree_on_main(plan.ranks, lambda: _source_config(plan))
        plan = plan.with_config(with_models(plan.config, source))
        refuse_full_matrix(plan.config, plan.ranks.device.type)
        return plan

    def footprint(self, plan: DetectPlan) -> Footprint:
        config = with_models(plan.config, plan.config.pretrained)
        return detection_footprint(config, plan.precision, on_gpu=plan.ranks.device.type == "cuda")

    def open_data(self, plan: DetectPlan, closing: ExitStack) -> tuple[DetectPlan, DetectionLoader]:  # type: ignore[override]
        """Open the data, and return the plan with names and ids of the classes."""
        config, ranks = plan.config, plan.ranks
        self.train, self.val = open_sets(config)
        config = dataclasses.replace(config, classes=self.train.names, category_ids=self.train.category_ids)
        _require_same_classes_as_before(plan, config)
        plan = plan.with_config(config)
        shares = StepPlan(
            num_images=self.train.num_images, micro_batch=plan.micro_batch, accumulation=plan.accumulation,
            rank=ranks.rank, world_size=ranks.world_size,
        )  # fmt: skip
        loader = DetectionLoader(
            self.train, shares, config.detect, size=config.size, multiple=_multiple(config), seed=config.run.seed,
            device=ranks.device, threads=loader_threads(config, ranks), channels=config.encoder.channels,
            flip=config.data.flip, bad_image_limit=config.data.max_bad_images,
        )  # fmt: skip
        closing.callback(loader.close)
        if len(set(ranks.gather(loader.fingerprint))) > 1:
            raise UserError("the ranks see different annotations: give every host the same files")
        return plan, loader

    def build_model(self, plan: DetectPlan) -> Detector:
        config, device = plan.config, plan.ranks.device
        torch.manual_seed(config.run.seed)
        model = self._detector(plan, device)
        if plan.reader is not None:
            load_weights(model, plan.reader)
        elif config.detect.fresh:
            self._remarks = ["FRESH ENCODER: of the checkpoint the shape is taken, and no weight"]
        else:
            self._remarks = initialise_from(model, *load_encoder(config.detect.checkpoint))
        return model.to(device)

    def _detector(self, plan: DetectPlan, device: torch.device) -> Detector:
        """Make the model with its first weights, to compute as ``plan`` asks for on ``device``, where it is not yet."""
        model = build_detector(plan.config, len(plan.config.classes))
        set_computation(model, plan.config.run, device)
        return model

    def trial_loss(self, plan: DetectPlan, model: Detector, images: Tensor, generator: torch.Generator) -> Tensor:  # type: ignore[override]
        """Sum the five losses of images padded as in a run, with `TRIAL_OBJECTS` random objects on each."""
        height, width = (-(-side // model.multiple) * model.multiple for side in images.shape[1:3])
        padded = F.pad(images, (0, 0, 0, width - images.shape[2], 0, height - images.shape[1]))
        targets = []
        for _ in padded:
            corners = torch.rand(TRIAL_OBJECTS, 2, generator=generator) / 2
            sides = 0.1 + 0.4 * torch.rand(TRIAL_OBJECTS, 2, generator=generator)
            boxes = torch.cat([corners, corners + sides], dim=1) * torch.tensor([width, height, width, height])
            targets.append({
                "boxes": boxes.to(images.device),
                "labels": torch.ones(TRIAL_OBJECTS, dtype=torch.int64, device=images.device),
                "masks": torch.ones(TRIAL_OBJECTS, height, width, dtype=torch.uint8, device=images.device),
            })  # fmt: skip
        return torch.stack(list(model(padded, [(height, width)] * len(padded), targets).values())).sum()

    def bare_model(self, plan: DetectPlan) -> None:
        """Return None: a step with sampled regions has no fixed list of operators to predict from."""
        return None

    def parameter_groups(self, plan: DetectPlan, model: Detector) -> list[dict[str, Any]]:  # type: ignore[override]
        config = plan.config
        return layer_decay_groups(model, weight_decay=config.optim.weight_decay, decay=config.detect.layer_decay)

    def exact_weights(self, plan: DetectPlan, model: Detector) -> FragmentReader:  # type: ignore[override]
        return exact_reader(model)

    def build_task(self, parts: RunParts[DetectConfig]) -> DetectTask:
        plan, config, section = parts.plan, parts.plan.config, parts.plan.config.detect
        shown = self.val or self.train
        count = min(config.log.pictures, shown.num_images)
        indices = [number * shown.num_images // count for number in range(count)]
        per_epoch = parts.loader.steps_per_epoch
        return DetectTask(
            ranks=plan.ranks, engine=parts.engine, log=parts.log, out=plan.out, seed=config.run.seed,
            classes=config.classes, flops=detector_flops(config.encoder, shape_of(config, len(config.classes))),
            val=self.val, val_batches=partial(_val_batches, plan, self.val), shown=(shown, indices),
            shown_batch=partial(_one_picture, config, shown, plan.ranks.device),
            eval_every=max(1, round(section.eval_every * per_epoch)) if section.eval_every else None,
            picture_every=parts.durations.picture_every if count else None,
        )  # fmt: skip

    def opening_lines(self, plan: DetectPlan, parameters: int) -> list[str]:
        config, model, section = plan.config, plan.config.encoder, plan.config.detect
        flops = detector_flops(model, shape_of(config, len(config.classes)))
        evaluated = f"evaluated on {self.val}" if self.val is not None else "not evaluated (no --val-annotations)"
        return [
            f"detection, recipe {config.recipe}, out {config.run.out} (resolved configuration in config.json)",
            f"Mask R-CNN, variant {section.variant}, of encoder {model.label} from {section.checkpoint}: depth "
            f"{model.depth}, width {model.width}; {len(config.classes)} classes, {parameters / 1e6:.1f} M parameters; "
            f"images up to {config.size[0]}x{config.size[1]}, padded to multiples of {_multiple(config)}; {evaluated}",
            f"attention {f'in windows of {section.window} patches' if section.window else 'global'}; forward "
            f"{flops.total / 1e9:.1f} GFLOP an image, of which encoder {flops.encoder / 1e9:.1f}; layer decay "
            f"{section.layer_decay:g}, drop path {section.drop_path:g}, box loss {section.box_loss}, "
            f"{section.regions} regions an image",
            *self._remarks,
        ]

    def closing_lines(self, out: Path) -> list[str]:
        results = [f"  results     {out / 'evaluation'}"] if self.val is not None else []
        return [*results, f"detect in images of your own: mirl predict {shlex.quote(os.fspath(out))} IMAGE ..."]


def detection_footprint(config: DetectConfig, precision: str, *, on_gpu: bool) -> Footprint:
    """Return what a run of ``config``, whose checkpoint has been read, holds in memory."""
    model, classes = config.encoder, len(config.classes) or USUAL_CLASSES
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in build_detector(config, classes).parameters())
    return Footprint(
        parameters=parameters,
        image_bytes=detector_image_bytes(
            model, shape_of(config, classes), precision, math=writes_out_attention(model, on_gpu=on_gpu),
            checkpointing=config.run.activation_checkpointing, recompute=config.run.recompute_pointwise,
        ),
        pixel_bytes=model.image_height * model.image_width * model.channels,
    )  # fmt: skip


def with_models(config: DetectConfig, source: ModelConfig) -> DetectConfig:
    """Return ``config`` with the encoder of ``source``, and with it at the size of the largest padded image."""
    section = config.detect
    config = dataclasses.replace(config, source=source)
    if bool(section.image_height) != bool(section.image_width):
        raise UserError(f"image_size is {section.image_height}x{section.image_width}: give both numbers, or none")
    multiple = padding_multiple(source.patch_size, section.window)
    height, width = (-(-side // multiple) * multiple for side in config.size)
    model = encoder_config(source, section.drop_path, section.attention)
    return dataclasses.replace(config, model=dataclasses.replace(model, image_height=height, image_width=width))


def refuse_full_matrix(config: DetectConfig, device: str) -> None:
    """Raise UserError if attention would write out its whole matrix on a GPU.

    At 4,096 tokens and 12 heads the matrix takes 384 MiB an image and block in bfloat16, before its softmax.
    """
    tokens = config.encoder.num_patches
    if device == "cuda" and config.detect.attention == "math" and tokens >= MANY_TOKENS:
        raise UserError(
            f"attention is math, which forms a matrix of {tokens} x {tokens} in every global block on a GPU: give "
            "--attention auto or sdpa, or smaller images"
        )


def _multiple(config: DetectConfig) -> int:
    return padding_multiple(config.pretrained.patch_size, config.detect.window)


def _source_config(plan: DetectPlan) -> ModelConfig:
    """Return the configuration of the pre-trained encoder; a resumed run has it without the pre-trained checkpoint."""
    config = plan.config
    if plan.reader is None:
        return load_encoder(config.detect.checkpoint)[0]
    if "detect" not in plan.reader.state["config"]:
        raise UserError(f"resume: {plan.reader.path} is of another kind of run: start from it by --checkpoint")
    saved = DetectConfig.from_dict(plan.reader.state["config"], source=str(plan.reader.path))
    asked = with_models(config, saved.pretrained)
    found = differences("model", ModelConfig, asked.encoder, dataclasses.asdict(saved.encoder))
    refuse_unnamed([item for item in found if not item.free], asked, plan.reader.path)
    return saved.pretrained


def _require_same_classes_as_before(plan: DetectPlan, config: DetectConfig) -> None:
    if plan.resumed_from is None:
        return
    before = tuple(plan.resumed_from.state["config"]["classes"])
    if before != config.classes:
        raise UserError(
            f"annotations is {config.detect.annotations}, whose {len(config.classes)} classes are not the "
            f"{len(before)} of {plan.resumed_from.path}: give the file as it was, or start a new run"
        )


def _val_batches(plan: DetectPlan, val: CocoSet | None) -> Iterator[DetectionBatch]:
    config = plan.config
    assert val is not None
    return evaluation_batches(
        val, rank=plan.ranks.rank, world_size=plan.ranks.world_size, batch_size=plan.micro_batch,
        variant=config.detect.variant, size=config.size, multiple=_multiple(config), device=plan.ranks.device,
        channels=config.encoder.channels, threads=loader_threads(config, plan.ranks),
    )  # fmt: skip


def _one_picture(config: DetectConfig, data: CocoSet, device: torch.device, index: int) -> DetectionBatch:
    """Return picture ``index`` as evaluation shows it."""
    return picture_batch(config, data.picture(index, config.encoder.channels), device)


def picture_batch(config: DetectConfig, pixels: np.ndarray, device: torch.device | str) -> DetectionBatch:
    """Make a batch of one picture, uint8 [H, W, C], as evaluation shows it."""
    image = for_evaluation(pixels, config.detect.variant, config.size)
    least = config.size if config.detect.variant == "vitdet" else (1, 1)
    size = int(image.shape[1]), int(image.shape[2])
    return DetectionBatch(
        images=pad_together([image], least, _multiple(config)).to(device), sample_ids=np.array([0]), epoch=0,
        positions=np.array([0]), sizes=[size], originals=[(int(pixels.shape[0]), int(pixels.shape[1]))],
    )  # fmt: skip
