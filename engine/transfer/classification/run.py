"""One fine-tuning run, from its configuration to its last checkpoint and figure."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mirl.dataloaders import Batch, EvalLoader, TrainLoader, build_eval_loader
from mirl.engine.checkpoints.pretrained import load_encoder, load_weights
from mirl.engine.checkpoints.writer import CheckpointWriter
from mirl.engine.distributed.ds_engine import DEEPSPEED_VERSION, TrainEngine
from mirl.engine.distributed.launch import Ranks, seconds_since_process_start
from mirl.engine.models import Execution, ModelConfig
from mirl.engine.training.ema import ShardedEma
from mirl.engine.training.optimizer import build_optimizer
from mirl.engine.training.run_data import ImageShape, build_loader, device_id, loader_threads
from mirl.engine.training.run_log import RunLog
from mirl.engine.training.run_setup import (
    Plan,
    agree_on_main,
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
from mirl.engine.transfer.classification.augmentation import BatchAugmentation
from mirl.engine.transfer.classification.classifier import Classifier, encoder_config
from mirl.engine.transfer.classification.config import OFF, FinetuneConfig
from mirl.engine.transfer.classification.evaluation import require_same_classes
from mirl.engine.transfer.classification.rand_augment import RandAugment
from mirl.engine.transfer.classification.recipes import recipe
from mirl.engine.transfer.classification.task import FinetuneTask
from mirl.engine.transfer.initialise_from import initialise_from, reinit_last
from mirl.engine.transfer.layer_decay import layer_decay_groups
from mirl.engine.version import __version__
from mirl.errors import UserError


def finetune(config: FinetuneConfig) -> Path:
    """Run ``config`` on this rank; returns the run's folder. Raises what pre-training does."""

    def run(ranks: Ranks) -> Path:
        with ExitStack() as closing:
            return _finetune(config, ranks, closing)

    return on_this_rank(run)


def _finetune(config: FinetuneConfig, ranks: Ranks, closing: ExitStack) -> Path:
    """What has threads or processes is left to ``closing``, the loader before the workers that it calls."""
    if not config.data.data:
        raise UserError("data is not given: name a folder with a sub-folder of images for each class")
    plan = make_plan(config, ranks, recipe_out=recipe(config.recipe).run.out)
    config = _with_models(plan.config, agree_on_main(ranks, lambda: _source_config(plan)))
    plan = dataclasses.replace(plan, config=config)
    section, model_config, out = config.finetune, config.model, plan.out

    rand_augment = _rand_augment(plan)
    if rand_augment is not None:
        closing.callback(rand_augment.close)
    transform = partial(_prepare, section.num_classes, rand_augment)
    loader = build_loader(plan, ImageShape.of(model_config), labels=True, batch_transform=transform)
    closing.callback(loader.close)
    num_classes = _num_classes(config, loader)
    config = dataclasses.replace(config, classes=tuple(loader.source.classes or ()))
    plan = dataclasses.replace(plan, config=config)
    val = _build_val(plan, loader, num_classes)
    if val is not None:
        closing.callback(val.close)
    durations = Durations.resolve(config.optim, config.run, config.log, steps_per_epoch=loader.steps_per_epoch)
    model, remarks = _build_model(plan, num_classes)
    progress = first_progress(plan, loader)
    refuse_finished(plan, progress, durations)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    groups = layer_decay_groups(model, weight_decay=config.optim.weight_decay, decay=section.layer_decay)
    optimizer = build_optimizer(model, config.optim, ranks.device, groups)
    augmentation = BatchAugmentation(
        num_classes=num_classes, mean=model_config.mean, std=model_config.std, seed=config.run.seed,
        micro_batch=plan.micro_batch, device=ranks.device, random_erase=section.random_erase, mixup=section.mixup,
        cutmix=section.cutmix, label_smoothing=section.label_smoothing,
    )  # fmt: skip
    # A run that goes on reads its fp32 weights from the checkpoint.
    started_from = [] if plan.reader is not None else model.named_parameters()
    start = {name: parameter.detach().float().cpu().clone() for name, parameter in started_from}
    engine = TrainEngine(model, optimizer, plan.ds_config, flat_gradients=config.run.flat_gradients)
    if plan.reader is not None:
        engine.load_fragments(plan.reader.read, optimizer_steps=progress.applied_steps)
    else:
        # In bf16 DeepSpeed makes its fp32 weights of rounded ones, which would cost pre-trained ones their low bits.
        engine.load_fragments(partial(_piece_of, start), optimizer_steps=0)
    del start
    ema = ShardedEma(engine, section.ema, updates=progress.applied_steps) if section.ema else None
    if ema is not None and plan.reader is not None:
        ema.load(plan.reader.read)

    require_attention(engine, ranks)
    compiled = compile_where_chosen(plan, engine)
    log = RunLog(out, is_main=ranks.is_main)
    open_out(plan, log, durations, progress.step)
    for line in [
        *_opening(config, parameters, num_classes, val),
        *describe_run(plan, durations, loader, engine),
        *plan.remarks,
        *remarks,
        f"compiled regions {compiled}; fused norm and GELU {'on' if model.execution.fused_norm else 'off'}",
    ]:
        log.say(line)
    task = FinetuneTask(
        model_config, ranks=ranks, engine=engine, log=log, augmentation=augmentation, ema=ema, val=val,
        eval_every=max(1, round(section.eval_every * loader.steps_per_epoch)) if section.eval_every else 2**62,
    )  # fmt: skip
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
        for line in closing_lines(out):
            log.say(line)
    finally:
        log.close()
    return out


# --- what the run is made of


def _source_config(plan: Plan) -> ModelConfig:
    """Of the pre-trained encoder; a resumed run knows it without the pre-trained checkpoint."""
    config: Any = plan.config
    if plan.reader is not None:
        if "finetune" not in plan.reader.state["config"]:
            raise UserError(f"resume: {plan.reader.path} is of pre-training: start from it by --checkpoint")
        saved = FinetuneConfig.from_dict(plan.reader.state["config"], source=str(plan.reader.path))
        _require_same_model(saved, _with_models(config, saved.source), plan.reader.path)
        return saved.source
    if not config.finetune.checkpoint:
        raise UserError("checkpoint is not given: name a pre-trained checkpoint, or the folder of a run")
    return load_encoder(config.finetune.checkpoint)[0]


def _require_same_model(saved: FinetuneConfig, asked: FinetuneConfig, path: Path) -> None:
    """UserError that names what differs: fixed positions and stochastic depth show in no weight."""
    for field in dataclasses.fields(ModelConfig):
        ours, theirs = getattr(asked.model, field.name), getattr(saved.model, field.name)
        if ours != theirs and field.name != "attention":
            raise UserError(f"{field.name} is {ours} and {path} was trained with {theirs}: resume with the same flags")


def _with_models(config: Any, source: ModelConfig) -> FinetuneConfig:
    section = config.finetune
    size = {"image_height": section.image_height, "image_width": section.image_width} if section.image_height else {}
    model = dataclasses.replace(encoder_config(source, section.drop_path, section.attention), **size)
    return dataclasses.replace(config, source=source, model=model)


def _rand_augment(plan: Plan) -> RandAugment | None:
    config: Any = plan.config
    if config.finetune.rand_augment == OFF:
        return None
    model = config.model
    workers = loader_threads(config, plan.ranks)
    return RandAugment(
        config.finetune.rand_augment, image_size=(model.image_height, model.image_width), mean=model.mean,
        seed=config.run.seed, workers=0 if workers == 1 else workers,
    )  # fmt: skip


def _piece_of(weights: dict[str, torch.Tensor], name: str, kind: str, start: int, numel: int) -> torch.Tensor:
    """A `FragmentReader` of weights in memory."""
    assert kind == "weight"
    return weights[name].flatten()[start : start + numel]


def _prepare(num_classes: int, rand_augment: RandAugment | None, batch: Batch) -> Batch:
    """In the loader's thread, where the labels are still on the host: check them, then RandAugment.

    num_classes: as asked for, 0 where folders gave the labels, which are then right.
    """
    largest = int(batch.labels.max())
    if num_classes and largest >= num_classes:
        raise ValueError(f"data has label {largest} and num_classes is {num_classes}: give at least {largest + 1}")
    return batch if rand_augment is None else rand_augment(batch)


def _num_classes(config: FinetuneConfig, loader: TrainLoader) -> int:
    classes = loader.source.classes
    asked = config.finetune.num_classes
    if classes is None and not asked:
        raise UserError(f"num_classes is not given and {config.data.data[0]} has no class folders: give --num-classes")
    if classes is not None and asked and asked < len(classes):
        raise UserError(f"num_classes is {asked} and the data has {len(classes)} classes: give 0 or {len(classes)}")
    count = asked or len(classes)
    if count < 2:
        raise UserError(f"num_classes is {count} ({config.data.data[0]}): a classifier needs two classes or more")
    return count


def _build_val(plan: Plan, loader: TrainLoader, num_classes: int) -> EvalLoader | None:
    """The labels of the whole set are looked at now: a wrong one would end the run an epoch later."""
    config: Any = plan.config
    if not config.finetune.val:
        return None
    model = config.model
    val = build_eval_loader(
        [Path(path) for path in config.finetune.val],
        image_size=(model.image_height, model.image_width),
        batch_size=plan.micro_batch,
        rank=plan.ranks.rank,
        world_size=plan.ranks.world_size,
        device_id=device_id(plan.ranks),
        threads=loader_threads(config, plan.ranks),
        channels=model.channels,
        mean=model.mean,
        std=model.std,
        index_dir=config.data.index_dir or None,
    )
    require_same_classes(loader.source.classes, val.classes, train="data", val="val")
    largest = max(val.source.label(index) for index in range(val.num_images))
    if largest >= num_classes:
        raise UserError(f"val has label {largest} and there are {num_classes} classes: give sets of the same classes")
    return val


def _build_model(plan: Plan, num_classes: int) -> tuple[Classifier, list[str]]:
    """The classifier on its device with its first weights, and remarks on them."""
    config: Any = plan.config
    section, device = config.finetune, plan.ranks.device
    torch.manual_seed(config.run.seed)
    model = Classifier(
        config.model,
        num_classes=num_classes,
        pool=section.pool,
        drop_path=section.drop_path,
        position_grid=config.source.grid,
        train_positions=section.train_positions,
    )
    if config.run.activation_checkpointing != "none":
        model.set_activation_checkpointing(config.run.activation_checkpointing)
    fused = device.type == "cuda" if config.run.fused == "auto" else config.run.fused == "on"
    model.set_execution(Execution(fused_norm=fused, fused_gelu=fused, recompute=config.run.recompute_pointwise))
    if plan.reader is not None:
        load_weights(model, plan.reader)
        return model.to(device), []
    remarks = initialise_from(model, *load_encoder(section.checkpoint))
    if section.reinit_last:
        reinit_last(model, section.reinit_last, config.run.seed)
        remarks.append(f"the last {section.reinit_last} of {config.model.depth} blocks are initialised afresh")
    return model.to(device), remarks


def _opening(config: FinetuneConfig, parameters: int, num_classes: int, val: EvalLoader | None) -> list[str]:
    model, section = config.model, config.finetune
    evaluated = f"evaluated on {val.num_images} images" if val is not None else "not evaluated (no --val)"
    return [
        f"MIRL engine {__version__}  torch {torch.__version__}  deepspeed {DEEPSPEED_VERSION}",
        f"fine-tuning, recipe {config.recipe}, out {config.run.out} (resolved configuration in config.json)",
        f"encoder {model.name} from {section.checkpoint}: depth {model.depth}, width {model.width}; {num_classes} "
        f"classes, {section.pool} pool, {parameters / 1e6:.1f} M parameters; image "
        f"{model.image_height}x{model.image_width}x{model.channels}; {evaluated}",
        f"layer decay {section.layer_decay:g}, drop path {section.drop_path:g}, RandAugment {section.rand_augment}, "
        f"erase {section.random_erase:g}, mixup {section.mixup:g}, cutmix {section.cutmix:g}, label smoothing "
        f"{section.label_smoothing:g}, EMA {section.ema:g}",
    ]
