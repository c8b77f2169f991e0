"""The fine-tuning run: what it builds from a pre-trained encoder, and what it says of it."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mirl.dataloaders import Batch, EvalLoader, ImageError, TrainLoader, build_eval_loader
from mirl.engine.accounting.flops import CLASSES
from mirl.engine.accounting.run_memory import Footprint, classifier_footprint
from mirl.engine.checkpoints.pretrained import load_encoder, load_weights
from mirl.engine.distributed.ds_engine import FragmentReader
from mirl.engine.models import ModelConfig
from mirl.engine.training.computing import set_computation
from mirl.engine.training.ema import ShardedEma
from mirl.engine.training.plan import RunPlan, agree_on_main
from mirl.engine.training.resumed_settings import differences, refuse_unnamed
from mirl.engine.training.run import RunKind, RunParts, run_training
from mirl.engine.training.run_data import ImageShape, build_loader, device_id, loader_threads
from mirl.engine.transfer.classification.augmentation import BatchAugmentation
from mirl.engine.transfer.classification.classifier import Classifier, encoder_config
from mirl.engine.transfer.classification.config import OFF, FinetuneConfig
from mirl.engine.transfer.classification.evaluation import require_same_classes
from mirl.engine.transfer.classification.rand_augment import RandAugment
from mirl.engine.transfer.classification.recipes import finetune_recipe
from mirl.engine.transfer.classification.task import FinetuneTask
from mirl.engine.transfer.initialise_from import initialise_from, reinit_last
from mirl.engine.transfer.layer_decay import layer_decay_groups
from mirl.errors import UserError

FinetunePlan = RunPlan[FinetuneConfig]


def finetune(config: FinetuneConfig) -> Path:
    """Run ``config`` on this rank; returns the run's folder. Raises what `run_training` does."""
    return run_training(config, Finetuning())


class Finetuning(RunKind[FinetuneConfig]):
    """A classifier, trained end to end from a pre-trained encoder on labelled images."""

    num_classes: int
    val: EvalLoader | None

    def __init__(self) -> None:
        self._remarks: list[str] = []

    def recipe_out(self, name: str) -> str:
        return finetune_recipe(name).run.out

    def read_start(self, plan: FinetunePlan) -> FinetunePlan:
        """The plan comes back with the encoder's two configurations."""
        if not plan.config.data.data:
            raise UserError("data is not given: name a folder with a sub-folder of images for each class")
        source = agree_on_main(plan.ranks, lambda: _source_config(plan))
        return plan.with_config(_with_models(plan.config, source))

    def footprint(self, plan: FinetunePlan) -> Footprint:
        config, section = plan.config, plan.config.finetune
        return classifier_footprint(
            _with_models(config, config.pretrained).encoder, section.num_classes or CLASSES, plan.precision,
            on_gpu=plan.ranks.device.type == "cuda", checkpointing=config.run.activation_checkpointing,
            averaged=bool(section.ema), paired=bool(section.mixup or section.cutmix), ranks=plan.ranks.world_size,
        )  # fmt: skip

    def open_data(self, plan: FinetunePlan, closing: ExitStack) -> tuple[FinetunePlan, TrainLoader]:
        """The plan comes back with the names of the classes."""
        rand_augment = _rand_augment(plan)
        if rand_augment is not None:
            closing.callback(rand_augment.close)
        # Closed before the workers that it calls.
        transform = partial(_prepare, plan.config.finetune.num_classes, rand_augment)
        loader = build_loader(plan, ImageShape.of(plan.config.encoder), labels=True, batch_transform=transform)
        closing.callback(loader.close)
        self.num_classes = _num_classes(plan.config, loader)
        plan = plan.with_config(dataclasses.replace(plan.config, classes=tuple(loader.source.classes or ())))
        self.val = _build_val(plan, loader, self.num_classes, closing)
        return plan, loader

    def build_model(self, plan: FinetunePlan) -> Classifier:
        config, section, device = plan.config, plan.config.finetune, plan.ranks.device
        torch.manual_seed(config.run.seed)
        model = Classifier(
            config.encoder,
            num_classes=self.num_classes,
            pool=section.pool,
            drop_path=section.drop_path,
            position_grid=config.pretrained.grid,
            train_positions=section.train_positions,
        )
        set_computation(model, config.run, device)
        if plan.reader is not None:
            load_weights(model, plan.reader)
            return model.to(device)
        self._remarks = initialise_from(model, *load_encoder(section.checkpoint))
        if section.reinit_last:
            reinit_last(model, section.reinit_last, config.run.seed)
            self._remarks.append(
                f"the last {section.reinit_last} of {config.encoder.depth} blocks are initialised afresh"
            )
        return model.to(device)

    def parameter_groups(self, plan: FinetunePlan, model: Classifier) -> list[dict[str, Any]]:
        config = plan.config
        return layer_decay_groups(model, weight_decay=config.optim.weight_decay, decay=config.finetune.layer_decay)

    def exact_weights(self, plan: FinetunePlan, model: Classifier) -> FragmentReader:
        """The pre-trained weights: in bf16 DeepSpeed makes its fp32 weights of rounded ones, and low bits are lost."""
        weights = {name: parameter.detach().float().cpu().clone() for name, parameter in model.named_parameters()}

        def read(name: str, kind: str, start: int, numel: int) -> torch.Tensor:
            assert kind == "weight"
            return weights[name].flatten()[start : start + numel]

        return read

    def build_task(self, parts: RunParts[FinetuneConfig]) -> FinetuneTask:
        plan, config, section = parts.plan, parts.plan.config, parts.plan.config.finetune
        augmentation = BatchAugmentation(
            num_classes=self.num_classes, mean=config.encoder.mean, std=config.encoder.std, seed=config.run.seed,
            micro_batch=plan.micro_batch, device=plan.ranks.device, random_erase=section.random_erase,
            mixup=section.mixup, cutmix=section.cutmix, label_smoothing=section.label_smoothing,
        )  # fmt: skip
        ema = ShardedEma(parts.engine, section.ema, updates=parts.progress.applied_steps) if section.ema else None
        eval_every = max(1, round(section.eval_every * parts.loader.steps_per_epoch)) if section.eval_every else None
        return FinetuneTask(
            config.encoder, ranks=plan.ranks, engine=parts.engine, log=parts.log, augmentation=augmentation, ema=ema,
            val=self.val, eval_every=eval_every,
        )  # fmt: skip

    def opening_lines(self, plan: FinetunePlan, parameters: int) -> list[str]:
        config, model, section = plan.config, plan.config.encoder, plan.config.finetune
        evaluated = f"evaluated on {self.val.ledger}" if self.val is not None else "not evaluated (no --val)"
        return [
            f"fine-tuning, recipe {config.recipe}, out {config.run.out} (resolved configuration in config.json)",
            f"encoder {model.label} from {section.checkpoint}: depth {model.depth}, width {model.width}; "
            f"{self.num_classes} classes, {section.pool} pool, {parameters / 1e6:.1f} M parameters; image "
            f"{model.image_height}x{model.image_width}x{model.channels}; {evaluated}",
            f"layer decay {section.layer_decay:g}, drop path {section.drop_path:g}, RandAugment "
            f"{section.rand_augment}, erase {section.random_erase:g}, mixup {section.mixup:g}, cutmix "
            f"{section.cutmix:g}, label smoothing {section.label_smoothing:g}, EMA {section.ema:g}",
            *self._remarks,
        ]


def _source_config(plan: FinetunePlan) -> ModelConfig:
    """The configuration of the pre-trained encoder; a resumed run has it without the pre-trained checkpoint."""
    config = plan.config
    if plan.reader is not None:
        if "finetune" not in plan.reader.state["config"]:
            raise UserError(f"resume: {plan.reader.path} is of pre-training: start from it by --checkpoint")
        saved = FinetuneConfig.from_dict(plan.reader.state["config"], source=str(plan.reader.path))
        _require_same_model(saved, _with_models(config, saved.pretrained), plan.reader.path)
        return saved.pretrained
    if not config.finetune.checkpoint:
        raise UserError("checkpoint is not given: name a pre-trained checkpoint, or the folder of a run")
    return load_encoder(config.finetune.checkpoint)[0]


def _require_same_model(saved: FinetuneConfig, asked: FinetuneConfig, path: Path) -> None:
    """UserError that names what differs: fixed positions and stochastic depth show in no weight."""
    found = differences("model", ModelConfig, asked.encoder, dataclasses.asdict(saved.encoder))
    refuse_unnamed([item for item in found if not item.free], asked, path)


def _with_models(config: FinetuneConfig, source: ModelConfig) -> FinetuneConfig:
    section = config.finetune
    model = config.resized(encoder_config(source, section.drop_path, section.attention))
    return dataclasses.replace(config, source=source, model=model)


def _rand_augment(plan: FinetunePlan) -> RandAugment | None:
    config, model = plan.config, plan.config.encoder
    if config.finetune.rand_augment == OFF:
        return None
    workers = loader_threads(config, plan.ranks)
    return RandAugment(
        config.finetune.rand_augment, image_size=(model.image_height, model.image_width), mean=model.mean,
        seed=config.run.seed, workers=0 if workers == 1 else workers,
    )  # fmt: skip


def _prepare(num_classes: int, rand_augment: RandAugment | None, batch: Batch) -> Batch:
    """Check the labels and apply RandAugment, in the loader's thread, where the labels are still on the host.

    num_classes: as asked for, 0 where folders gave the labels, which are then right.
    """
    assert batch.labels is not None, "the loader was built without labels"
    largest = int(batch.labels.max())
    if num_classes and largest >= num_classes:
        raise UserError(f"data has label {largest} and num_classes is {num_classes}: give at least {largest + 1}")
    return batch if rand_augment is None else rand_augment(batch)


def _num_classes(config: FinetuneConfig, loader: TrainLoader) -> int:
    classes = loader.source.classes
    asked = config.finetune.num_classes
    if classes is None and not asked:
        raise UserError(f"num_classes is not given and {config.data.data[0]} has no class folders: give --num-classes")
    if classes is not None and asked and asked < len(classes):
        raise UserError(f"num_classes is {asked} and the data has {len(classes)} classes: give 0 or {len(classes)}")
    count = asked or len(classes or ())
    if count < 2:
        raise UserError(f"num_classes is {count} ({config.data.data[0]}): a classifier needs two classes or more")
    return count


def _label(val: EvalLoader, index: int) -> int:
    try:
        return val.source.label(index)
    except ImageError as error:
        raise UserError(f"val: {val.source.path(index)}: {error}; mend this sample or leave it out") from error


def _build_val(plan: FinetunePlan, loader: TrainLoader, num_classes: int, closing: ExitStack) -> EvalLoader | None:
    """Open the evaluation data. All of its labels are looked at now: a wrong one would end the run an epoch later."""
    config, model = plan.config, plan.config.encoder
    if not config.finetune.val:
        return None
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
    closing.callback(val.close)
    require_same_classes(loader.source.classes, val.classes, train="data", val="val")
    labels = [_label(val, index) for index in range(val.num_images)]
    for label in (min(labels), max(labels)):
        if not 0 <= label < num_classes:
            raise UserError(f"val has label {label} and there are {num_classes} classes: give sets of the same classes")
    return val
