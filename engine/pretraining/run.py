"""One pre-training run, from its configuration to its last checkpoint."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import torch

from mirl.dataloaders import TrainLoader, load_images
from mirl.engine.checkpoints.pretrained import load_weights
from mirl.engine.checkpoints.writer import CheckpointWriter
from mirl.engine.configuration.config import PretrainConfig
from mirl.engine.distributed.ds_engine import DEEPSPEED_VERSION, TrainEngine
from mirl.engine.distributed.launch import Ranks, seconds_since_process_start
from mirl.engine.models import MIRL, Execution
from mirl.engine.models.objectives.perceptual import PerceptualLoss, read_vgg
from mirl.engine.models.teacher import EmaTeacher
from mirl.engine.pretraining.recipes import recipe
from mirl.engine.pretraining.task import PretrainTask
from mirl.engine.training.optimizer import build_optimizer
from mirl.engine.training.run_data import ImageShape, build_loader
from mirl.engine.training.run_log import RunLog
from mirl.engine.training.run_setup import (
    Plan,
    closing_lines,
    compile_where_chosen,
    describe_run,
    first_progress,
    make_plan,
    on_this_rank,
    open_out,
    refuse_finished,
    require_attention,
)
from mirl.engine.training.schedule import Durations
from mirl.engine.training.trainer import Trainer
from mirl.engine.version import __version__
from mirl.errors import UserError


def pretrain(config: PretrainConfig) -> Path:
    """Run ``config`` on this rank; returns the run's folder.

    Raises:
        UserError: the configuration cannot be run here; nothing was written.
        mirl.engine.errors.Diverged, mirl.engine.errors.Preempted, mirl.engine.errors.NotSaved: see `Trainer.run`.
        mirl.engine.errors.LostRank: another rank is gone.
    """
    return on_this_rank(lambda ranks: _pretrain(config, ranks))


def _pretrain(config: PretrainConfig, ranks: Ranks) -> Path:
    plan = make_plan(config, ranks, recipe_out=recipe(config.recipe).run.out)
    config, out = plan.config, plan.out
    loader = build_loader(plan, ImageShape.of(config.model))
    durations = Durations.resolve(config.optim, config.run, config.log, steps_per_epoch=loader.steps_per_epoch)
    model = _build_model(plan)
    progress = first_progress(plan, loader)
    refuse_finished(plan, progress, durations)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    optimizer = build_optimizer(model, config.optim, ranks.device)
    engine = TrainEngine(model, optimizer, plan.ds_config, flat_gradients=config.run.flat_gradients)
    if plan.reader is not None:
        engine.load_fragments(plan.reader.read, optimizer_steps=progress.applied_steps)

    teacher = _build_teacher(plan, engine)
    require_attention(engine, ranks)
    compiled = compile_where_chosen(plan, engine)
    log = RunLog(out, is_main=ranks.is_main)
    open_out(plan, log, durations, progress.step)
    for line in [*_opening(config, parameters), *describe_run(plan, durations, loader, engine), *plan.remarks]:
        log.say(line)
    log.say(
        f"compiled regions {compiled}; fused norm and GELU {'on' if model.execution.fused_norm else 'off'}; recomputed "
        f"{'norm and GELU' if config.run.recompute_pointwise else 'nothing'}"
    )
    task = PretrainTask(
        config,
        ranks=ranks,
        engine=engine,
        durations=durations,
        log=log,
        picture_images=_picture_images(config, ranks, loader),
        out=out,
        teacher=teacher,
    )
    trainer = Trainer(
        config,
        ranks=ranks,
        engine=engine,
        task=task,
        loader=loader,
        durations=durations,
        writer=CheckpointWriter(out / "checkpoints", ranks, keep=config.run.keep_checkpoints),
        log=log,
        progress=progress,
        micro_batch=plan.micro_batch,
        accumulation=plan.accumulation,
    )
    log.say(f"first step begins {seconds_since_process_start():.1f} s after the start of this process")
    try:
        trainer.run()
        for line in [*closing_lines(out), _next_command(out)]:
            log.say(line)
    finally:
        log.close()
        loader.close()
    return out


def _build_model(plan: Plan) -> MIRL:
    """The model on its device with its first weights."""
    config, device = plan.config, plan.ranks.device
    torch.manual_seed(config.run.seed)
    model = MIRL(config.model)
    if config.run.activation_checkpointing != "none":
        model.set_activation_checkpointing(config.run.activation_checkpointing)
    fused = device.type == "cuda" if config.run.fused == "auto" else config.run.fused == "on"
    model.set_execution(Execution(fused_norm=fused, fused_gelu=fused, recompute=config.run.recompute_pointwise))
    if plan.reader is not None:
        load_weights(model, plan.reader)
    if config.model.vgg_loss:
        perceptual = PerceptualLoss(read_vgg(config.run.vgg_weights), config.model.mean, config.model.std)
        dtype = torch.bfloat16 if plan.precision == "bf16" else torch.float32
        model.set_perceptual(perceptual.to(device, dtype))
    return model.to(device)


def _build_teacher(plan: Plan, engine: TrainEngine) -> EmaTeacher | None:
    """The teacher of the feature loss: as saved, or a copy of the weights that the run begins with."""
    config = plan.config
    if not config.model.feature_loss:
        return None
    if engine.stage == 3:
        raise UserError(
            f"feature_loss is {config.model.feature_loss} and {config.run.deepspeed_config} is ZeRO stage 3, where no "
            "rank has the weights that its teacher averages: use --deepspeed_config zero2"
        )
    teacher = EmaTeacher(engine.module, config.model, config.optim.teacher_decay)
    teacher.set_execution(dataclasses.replace(engine.module.execution, recompute=False))
    if plan.reader is not None and config.run.resume:
        PretrainTask.load_teacher(teacher, plan.reader.read)
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
            except ValueError:  # named, counted and reported by the loader when its turn comes
                continue
            chosen.append(image)
            break
    return torch.cat(chosen).to(ranks.device) if chosen else None


def _opening(config: PretrainConfig, parameters: int) -> list[str]:
    model = config.model
    return [
        f"MIRL engine {__version__}  torch {torch.__version__}  deepspeed {DEEPSPEED_VERSION}",
        f"recipe {config.recipe}, out {config.run.out} (resolved configuration in config.json)",
        f"model {model.name}: depth {model.depth}, width {model.width}, G {model.segments}, {model.variant} variant, "
        f"objective {model.objective}, {parameters / 1e6:.1f} M parameters; image "
        f"{model.image_height}x{model.image_width}x{model.channels}, patch {model.patch_size}, mask "
        f"{model.mask_ratio:g}",
    ]


def _next_command(out: Path) -> str:
    newest = (out / "checkpoints" / "latest").read_text().strip()
    return f"reconstruct your own images: mirl visualize {os.path.join(out, 'checkpoints', newest)} IMAGE ..."
