"""The fine-tuning run builds a classifier from a pre-trained encoder, and describes it in the log."""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mirl.dataloaders import Batch, EvalLoader, TrainLoader, build_eval_loader, open_source
from mirl.dataloaders.sources.base import Source
from mirl.dataloaders.sources.containers import with_window
from mirl.engine.accounting.flops import CLASSES
from mirl.engine.accounting.run_memory import Footprint, classifier_footprint
from mirl.engine.checkpoints.best import read_best
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
from mirl.engine.transfer.classification.classes import require_labels, require_same_classes
from mirl.engine.transfer.classification.classifier import Classifier, encoder_config
from mirl.engine.transfer.classification.config import OFF, FinetuneConfig
from mirl.engine.transfer.classification.early import require_inputs
from mirl.engine.transfer.classification.head_probe import (
    MOST_IMAGES,
    compare_with_start,
    fit_start_probe,
    recorded_start,
    set_head,
)
from mirl.engine.transfer.classification.rand_augment import RandAugment
from mirl.engine.transfer.classification.recipes import finetune_recipe
from mirl.engine.transfer.classification.scaled import is_open, regularisation, settle
from mirl.engine.transfer.classification.task import FinetuneTask
from mirl.engine.transfer.initialise_from import exact_reader, initialise_from, reinit_last
from mirl.engine.transfer.layer_decay import layer_decay_groups
from mirl.errors import UserError

FinetunePlan = RunPlan[FinetuneConfig]


def finetune(config: FinetuneConfig) -> Path:
    """Run ``config`` on this rank; return the run's folder. Raises what `run_training` does."""
    return run_training(config, Finetuning())


class Finetuning(RunKind[FinetuneConfig]):
    """This kind of run trains a classifier end to end from a pre-trained encoder on labelled images."""

    num_classes: int
    source: Source
    val: EvalLoader | None

    def __init__(self) -> None:
        self._remarks: list[str] = []
        self.start: float | None = None  # top-1 of a linear probe of the encoder at the start of the run
        self.start_unknown = "it was not evaluated when the run began"

    def recipe_out(self, name: str) -> str:
        return finetune_recipe(name).run.out

    def read_start(self, plan: FinetunePlan) -> FinetunePlan:
        """Return the plan with the encoder's two configurations."""
        require_inputs(plan.config)
        source = agree_on_main(plan.ranks, lambda: _source_config(plan))
        plan = plan.with_config(_with_models(plan.config, source))
        if is_open(plan.config):
            model = plan.config.encoder
            images = agree_on_main(plan.ranks, lambda: _count_images(plan.config))
            settled = settle(plan.config, images=images, side=min(model.image_height, model.image_width))
            plan = plan.with_config(_with_models(settled, source))
        return plan

    def footprint(self, plan: FinetunePlan) -> Footprint:
        config, section = plan.config, plan.config.finetune
        return classifier_footprint(
            _with_models(config, config.pretrained).encoder, section.num_classes or CLASSES, plan.precision,
            on_gpu=plan.ranks.device.type == "cuda", checkpointing=config.run.activation_checkpointing,
            recompute=config.run.recompute_pointwise, averaged=bool(section.ema), paired=section.mixes_pairs,
            ranks=plan.ranks.world_size,
        )  # fmt: skip

    def open_data(self, plan: FinetunePlan, closing: ExitStack) -> tuple[FinetunePlan, TrainLoader]:
        """Open the data, and return the plan with the names of the classes."""
        rand_augment = _rand_augment(plan)
        if rand_augment is not None:
            closing.callback(rand_augment.close)
        # The loader is closed before the workers that it calls.
        transform = partial(_prepare, plan.config.finetune.num_classes, rand_augment)
        loader = build_loader(plan, ImageShape.of(plan.config.encoder), labels=True, batch_transform=transform)
        closing.callback(loader.close)
        self.num_classes = _num_classes(plan.config, loader)
        plan = plan.with_config(dataclasses.replace(plan.config, classes=tuple(loader.source.classes or ())))
        self.val = _build_val(plan, loader, self.num_classes, closing)
        self.source = loader.source
        return plan, loader

    def _classifier(self, plan: FinetunePlan, device: torch.device) -> Classifier:
        """Make the model with its first weights, to compute as ``plan`` asks for on ``device``, where it is not yet."""
        config, section = plan.config, plan.config.finetune
        model = Classifier(
            config.encoder,
            num_classes=self.num_classes,
            pool=section.pool,
            drop_path=regularisation(section).drop_path,
            position_grid=config.pretrained.grid,
            train_positions=section.train_positions,
        )
        set_computation(model, config.run, device)
        return model

    def bare_model(self, plan: FinetunePlan) -> Callable[[], Classifier]:
        return partial(self._classifier, plan, torch.device("cuda"))

    def build_model(self, plan: FinetunePlan) -> Classifier:
        config, section, device = plan.config, plan.config.finetune, plan.ranks.device
        torch.manual_seed(config.run.seed)
        model = self._classifier(plan, device)
        if plan.reader is not None:
            load_weights(model, plan.reader)
            run = plan.reader.path.parent.parent
            self.start = agree_on_main(plan.ranks, lambda: recorded_start(run))
            return model.to(device)
        self._remarks = initialise_from(model, *load_encoder(section.checkpoint))
        if section.reinit_last:
            reinit_last(model, section.reinit_last, config.run.seed)
            self._remarks.append(
                f"the last {section.reinit_last} of {config.encoder.depth} blocks are initialised afresh"
            )
        model.to(device)
        self._probe_start(plan, model)
        return model

    def _probe_start(self, plan: FinetunePlan, model: Classifier) -> None:
        """Fit the linear probe that the head begins with, or with which the run is compared.

        If it cannot be fitted, say why.
        """
        asked = plan.config.finetune.head_init == "probe"
        if not asked and (self.val is None or self.source.num_images > MOST_IMAGES):
            self.start_unknown = f"it has more than {MOST_IMAGES} training images and head_init is not probe"
            return
        try:
            found = fit_start_probe(plan, model, self.source, self.val, num_classes=self.num_classes)
        except UserError as error:
            self.start_unknown = str(error)
            self._remarks.append(f"no linear probe of the encoder, so that the head begins near zero: {error}")
            return
        if asked:
            set_head(model, found.probe)
        self.start = found.top1_percent
        self._remarks.append(f"head begins {'as the' if asked else 'near zero; for comparison a'} {found}")

    def parameter_groups(self, plan: FinetunePlan, model: Classifier) -> list[dict[str, Any]]:
        config = plan.config
        return layer_decay_groups(model, weight_decay=config.optim.weight_decay, decay=config.finetune.layer_decay)

    def exact_weights(self, plan: FinetunePlan, model: Classifier) -> FragmentReader:
        return exact_reader(model)

    def build_task(self, parts: RunParts[FinetuneConfig]) -> FinetuneTask:
        plan, config, section = parts.plan, parts.plan.config, parts.plan.config.finetune
        scaled = regularisation(section)
        augmentation = BatchAugmentation(
            num_classes=self.num_classes, mean=config.encoder.mean, std=config.encoder.std, seed=config.run.seed,
            micro_batch=plan.micro_batch, device=plan.ranks.device, random_erase=scaled.random_erase,
            mixup=scaled.mixup, cutmix=scaled.cutmix, label_smoothing=scaled.label_smoothing,
        )  # fmt: skip
        ema = ShardedEma(parts.engine, section.ema, updates=parts.progress.applied_steps) if section.ema else None
        eval_every = max(1, round(section.eval_every * parts.loader.steps_per_epoch)) if section.eval_every else None
        return FinetuneTask(
            config.encoder, ranks=plan.ranks, engine=parts.engine, log=parts.log, augmentation=augmentation, ema=ema,
            val=self.val, eval_every=eval_every,
            start_top1_percent=self.start, begins_with_probe=section.head_init == "probe",
        )  # fmt: skip

    def opening_lines(self, plan: FinetunePlan, parameters: int) -> list[str]:
        config, model, section = plan.config, plan.config.encoder, plan.config.finetune
        scaled, low = regularisation(section), (config.data.crop_scale or (1.0, 1.0))[0]
        centred = config.data.centre_crops or 0.0
        evaluated = f"evaluated on {self.val.ledger}" if self.val is not None else "not evaluated (no --val)"
        return [
            f"fine-tuning, recipe {config.recipe}, out {config.run.out} (resolved configuration in config.json)",
            f"encoder {model.label} from {section.checkpoint}: depth {model.depth}, width {model.width}; "
            f"{self.num_classes} classes, {section.pool} pool, {parameters / 1e6:.1f} M parameters; image "
            f"{model.image_height}x{model.image_width}x{model.channels}; {evaluated}",
            f"layer decay {section.layer_decay:g}, drop path {scaled.drop_path:g}, RandAugment "
            f"{scaled.rand_augment}, erase {scaled.random_erase:g}, mixup {scaled.mixup:g}, cutmix "
            f"{scaled.cutmix:g}, crops from {low:.2g} of the area, "
            f"{100 * centred:.0f}% centred, label smoothing "
            f"{scaled.label_smoothing:g}, EMA {section.ema:g}",
            *self._remarks,
        ]

    def closing_lines(self, out: Path) -> list[str]:
        best = read_best(out / "checkpoints")
        compared = []
        if best is not None:
            reached = best.score_percent if best.step else None
            compared = [compare_with_start(reached, self.start, self.start_unknown)]
        return [*compared, *_next_commands(out, self.val is not None)]


def _next_commands(out: Path, evaluated: bool) -> list[str]:
    taken = "the best checkpoint" if read_best(out / "checkpoints") else "the newest checkpoint"
    val = "the set above or another one" if evaluated else "labelled images"
    run = shlex.quote(os.fspath(out))
    return [
        f"these take {taken}, unless --which says otherwise:",
        f"  mirl evaluate {run} --val VAL     {val}: accuracy by class, confusion",
        f"  mirl predict {run} IMAGE ...      classes of images or folders",
        f"  mirl export {run} --to timm --out DIR",
    ]


def _count_images(config: FinetuneConfig) -> int:
    """Count the images of the training set if the length of the run is given in steps; return 1 if in epochs."""
    if config.optim.epochs:
        return 1
    return open_source(config.data.data, labels=True, index_dir=config.data.index_dir or None).num_images


def _source_config(plan: FinetunePlan) -> ModelConfig:
    """Return the configuration of the pre-trained encoder; a resumed run has it without the pre-trained checkpoint."""
    config = plan.config
    if plan.reader is not None:
        if "finetune" not in plan.reader.state["config"]:
            raise UserError(f"resume: {plan.reader.path} is of pre-training: start from it by --checkpoint")
        saved = FinetuneConfig.from_dict(plan.reader.state["config"], source=str(plan.reader.path))
        _require_same_model(saved, _with_models(config, saved.pretrained), plan.reader.path)
        return saved.pretrained
    return load_encoder(config.finetune.checkpoint)[0]


def _require_same_model(saved: FinetuneConfig, asked: FinetuneConfig, path: Path) -> None:
    """Raise UserError that names the difference, because fixed positions and stochastic depth show in no weight."""
    found = differences("model", ModelConfig, asked.encoder, dataclasses.asdict(saved.encoder))
    refuse_unnamed([item for item in found if not item.free], asked, path)


def _with_models(config: FinetuneConfig, source: ModelConfig) -> FinetuneConfig:
    section = config.finetune
    model = config.resized(encoder_config(source, section.drop_path or 0.0, section.attention))
    return dataclasses.replace(config, source=source, model=model)


def _rand_augment(plan: FinetunePlan) -> RandAugment | None:
    config, model = plan.config, plan.config.encoder
    form = regularisation(config.finetune).rand_augment
    if form == OFF:
        return None
    workers = loader_threads(config, plan.ranks)
    return RandAugment(
        form, image_size=(model.image_height, model.image_width), mean=model.mean,
        seed=config.run.seed, workers=0 if workers == 1 else workers,
    )  # fmt: skip


def _prepare(num_classes: int, rand_augment: RandAugment | None, batch: Batch) -> Batch:
    """Check the labels and apply RandAugment, in the loader's thread, while the labels are still on the host.

    num_classes: as asked for; 0: folders gave the labels, so they are right.
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


def _build_val(plan: FinetunePlan, loader: TrainLoader, num_classes: int, closing: ExitStack) -> EvalLoader | None:
    """Open the evaluation data and check all of its labels now: a wrong one would end the run an epoch later."""
    config, model = plan.config, plan.config.encoder
    if not config.finetune.val:
        return None
    val = build_eval_loader(
        with_window([Path(path) for path in config.finetune.val], config.data.window),
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
    require_labels(val.source, num_classes)
    return val
