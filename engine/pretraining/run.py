"""The pre-training run: what it builds, and what it says of it."""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch

from mirl.dataloaders import TrainLoader, load_images
from mirl.engine.accounting.run_memory import Footprint, pretraining_footprint
from mirl.engine.checkpoints.pretrained import load_weights
from mirl.engine.configuration.config import PretrainConfig
from mirl.engine.distributed.ds_engine import TrainEngine
from mirl.engine.distributed.launch import Ranks
from mirl.engine.models import MIRL
from mirl.engine.models.objectives.perceptual import PerceptualLoss, read_vgg
from mirl.engine.models.teacher import EmaTeacher
from mirl.engine.pretraining.evaluating import Evaluation, EvaluationSets, complete_best
from mirl.engine.pretraining.evaluation_data import open_probe, open_val, require_whole_weights
from mirl.engine.pretraining.pictures import NORMALISED, column_titles, legend
from mirl.engine.pretraining.recipes import recipe
from mirl.engine.pretraining.task import PretrainTask
from mirl.engine.training.computing import bare_model, set_computation
from mirl.engine.training.ema import ShardedEma
from mirl.engine.training.image_sizes import StepSizes
from mirl.engine.training.plan import RunPlan
from mirl.engine.training.run import RunKind, RunParts, run_training
from mirl.engine.training.run_data import ImageShape, build_loader, settle_statistics
from mirl.engine.training.telling import newest_checkpoint
from mirl.errors import UserError


def pretrain(config: PretrainConfig) -> Path:
    """Run ``config`` on this rank; returns the run's folder. Raises what `run_training` does."""
    return run_training(config, Pretraining())


class Pretraining(RunKind[PretrainConfig]):
    """Masked Image Residual Learning, or another objective of the paper, on images without labels."""

    _sets: EvaluationSets

    def __init__(self) -> None:
        self._settled: list[str] = []

    def recipe_out(self, name: str) -> str:
        return recipe(name).run.out

    def footprint(self, plan: RunPlan[PretrainConfig]) -> Footprint:
        on_gpu = plan.ranks.device.type == "cuda"
        return pretraining_footprint(plan.config, plan.precision, on_gpu=on_gpu, ranks=plan.ranks.world_size)

    def open_data(
        self, plan: RunPlan[PretrainConfig], closing: ExitStack
    ) -> tuple[RunPlan[PretrainConfig], TrainLoader]:
        loader = build_loader(plan, ImageShape.of(plan.config.model))
        closing.callback(loader.close)
        plan = settle_statistics(plan, loader)
        self._config = plan.config
        require_whole_weights(plan)
        val = open_val(plan)
        if val is not None:
            closing.callback(val.close)
        probe = open_probe(plan)
        if probe is not None:
            closing.callback(probe.loader.close)
        self._sets = EvaluationSets(val=val, probe=probe)
        return plan, loader

    def build_model(self, plan: RunPlan[PretrainConfig]) -> MIRL:
        config, device = plan.config, plan.ranks.device
        torch.manual_seed(config.run.seed)
        model = MIRL(config.model)
        set_computation(model, config.run, device)
        if plan.reader is not None:
            load_weights(model, plan.reader)
        if config.model.vgg_loss:
            perceptual = PerceptualLoss(read_vgg(config.run.vgg_weights), config.model.mean, config.model.std)
            dtype = torch.bfloat16 if plan.precision == "bf16" else torch.float32
            model.set_perceptual(perceptual.to(device, dtype))
        return model.to(device)

    def build_task(self, parts: RunParts[PretrainConfig]) -> PretrainTask:
        config, ranks = parts.plan.config, parts.plan.ranks
        sizes = StepSizes.of(config, parts.durations.total_steps)
        if sizes:
            parts.loader.take_image_sizes(sizes.size_at)
            self._settled.append(f"image sizes {sizes}; memory is that of the last")
        evaluation = None
        if self._sets:
            if parts.plan.resumed_from is not None:
                complete_best(parts.progress.best, parts.plan.out, parts.progress.step)
            evaluation = Evaluation(
                config, self._sets, ranks=ranks, log=parts.log, total_steps=parts.durations.total_steps,
                best=parts.progress.best,
            )  # fmt: skip
            self._settled += evaluation.opening_lines()
        return PretrainTask(
            config, ranks=ranks, engine=parts.engine, durations=parts.durations, log=parts.log,
            picture_images=_picture_images(config, ranks, parts.loader), out=parts.plan.out,
            teacher=_build_teacher(config, parts.engine),
            ema=ShardedEma(parts.engine, config.optim.ema, updates=parts.progress.applied_steps)
            if config.optim.ema
            else None,
            evaluation=evaluation,
        )  # fmt: skip

    def bare_model(self, plan: RunPlan[PretrainConfig]) -> Callable[[], MIRL]:
        return partial(bare_model, plan.config.model, plan.config.run)

    def opening_lines(self, plan: RunPlan[PretrainConfig], parameters: int) -> list[str]:
        config, model = plan.config, plan.config.model
        return [
            f"recipe {config.recipe}, out {config.run.out} (resolved configuration in config.json)",
            f"model {model.label}: depth {model.depth}, width {model.width}, G {model.segments}, {model.variant} "
            f"variant, objective {model.objective}, {parameters / 1e6:.1f} M parameters; image "
            f"{model.image_height}x{model.image_width}x{model.channels}, patch {model.patch_size}, mask "
            f"{model.mask_ratio:g}",
            *self._settled,
        ]

    def closing_lines(self, out: Path) -> list[str]:
        config, lines = self._config, []
        if config.log.pictures:
            lines = [f"columns of the pictures: {'; '.join(legend(column_titles(config.model)))}"]
            lines += [NORMALISED] if config.model.norm_pix else []
        run, checkpoint = (shlex.quote(os.fspath(path)) for path in (out, newest_checkpoint(out)))
        return [
            *lines,
            f"reconstruct your own images: mirl visualize {checkpoint} IMAGE ...",
            f"measure its features: mirl probe {run} --data TRAIN --val VAL",
            f"make a classifier of it: mirl finetune --checkpoint {run} --data TRAIN --val VAL",
        ]


def _build_teacher(config: PretrainConfig, engine: TrainEngine) -> EmaTeacher | None:
    """The teacher of the feature loss, a copy of the weights that the run begins with; None without that loss."""
    if not config.model.feature_loss:
        return None
    if engine.stage == 3:
        raise UserError(
            f"feature_loss is {config.model.feature_loss} and {config.run.deepspeed_config} is ZeRO stage 3, where no "
            "rank has the weights that its teacher averages: use --deepspeed_config zero2"
        )
    teacher = EmaTeacher(engine.module, config.model, config.optim.teacher_decay)
    teacher.set_execution(dataclasses.replace(engine.module.execution, recompute=False))
    return teacher


def _picture_images(config: PretrainConfig, ranks: Ranks, loader: TrainLoader) -> torch.Tensor | None:
    """Images spread evenly over the data set, the same in every picture of the run.

    A broken one is no reason not to train: the image after it is taken. None where sixteen in a row are broken.
    """
    model = config.model
    count = min(config.log.pictures, loader.num_images)
    chosen = []
    for first in (number * loader.num_images // count for number in range(count)):
        for index in range(first, min(first + 16, loader.num_images)):
            try:
                image = load_images(
                    loader.paths([index]),
                    image_size=(model.image_height, model.image_width),
                    channels=model.channels,
                    mean=model.mean,
                    std=model.std,
                    index_dir=config.data.index_dir or None,
                )
            except UserError:  # named, counted and reported by the loader when its turn comes
                continue
            chosen.append(image)
            break
    return torch.cat(chosen).to(ranks.device) if chosen else None
