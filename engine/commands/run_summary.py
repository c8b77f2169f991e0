"""`mirl summary` with a recipe or flags of a run tells what that run takes, before it is started.

Parameters and FLOPs are counted, memory is estimated as a run does it before anything is built, and the time of a step
is measured on this machine, by a few real ones on synthetic images.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirl.dataloaders import open_source, prepare_demo, typical_image_bytes
from mirl.engine.accounting.flops import (
    classifier_flops,
    decoder_parameters,
    encoder_parameters,
    pretraining_parameters,
    training_flops_per_image,
)
from mirl.engine.accounting.free_memory import free_memory
from mirl.engine.accounting.machines import Machine, largest_fitting, memory_by_machine, micro_batches
from mirl.engine.accounting.memory import GIB
from mirl.engine.accounting.run_memory import (
    DECODED_BYTES,
    Footprint,
    Placement,
    classifier_footprint,
    pretraining_footprint,
    run_bytes,
)
from mirl.engine.checkpoints.pretrained import load_encoder
from mirl.engine.commands.device_flag import device_of_process
from mirl.engine.commands.step_time import step_seconds
from mirl.engine.configuration.config import AUTO, Config, PretrainConfig
from mirl.engine.configuration.flags import parse
from mirl.engine.distributed.ds_config import read_ds_config, resolve_batch, resolve_ds_config, resolve_precision
from mirl.engine.models import ModelConfig
from mirl.engine.models.skips import ExactSkips
from mirl.engine.pretraining.command_line import PRETRAIN
from mirl.engine.training.image_sizes import StepSizes
from mirl.engine.training.schedule import Durations
from mirl.engine.transfer.classification.classifier import encoder_config
from mirl.engine.transfer.classification.command_line import FINETUNE
from mirl.engine.transfer.classification.config import FinetuneConfig

MEASURED_UP_TO = 120e6  # parameters: a larger model is built and measured only if --time asks for it


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """The summary tells what a run takes. Sizes are in bytes, times in seconds; unknown times and steps are None.

    Memory and ``gflops_per_image`` are of the whole image size. mean_cost: FLOPs of an image of the run beside that,
    below 1 where images grow; ``seconds_per_step`` is an average over their sizes too.
    """

    config: Config
    model: ModelConfig
    precision: str
    parameters: dict[str, int]
    gflops_per_image: float
    free: str
    micro_batch: int
    accumulation: int
    bytes_here: float
    bytes_free: float
    elsewhere: list[str]
    seconds_per_step: float | None
    measured_with: int
    images: int | None
    steps: int | None
    mean_cost: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for --json."""
        run_seconds = self.seconds_per_step * self.steps if self.seconds_per_step and self.steps else None
        return {
            "recipe": self.config.recipe, "model": self.model.label, "precision": self.precision,
            "parameters": self.parameters, "train_gflop_per_image": self.gflops_per_image,
            "image_sizes": list(self.config.data.image_sizes),
            "mean_train_gflop_per_image": self.gflops_per_image * self.mean_cost,
            "batch_size": self.config.optim.batch_size, "micro_batch": self.micro_batch,
            "accumulation": self.accumulation, "memory_gib": self.bytes_here / GIB, "free_gib": self.bytes_free / GIB,
            "elsewhere": self.elsewhere, "seconds_per_step": self.seconds_per_step, "images": self.images,
            "steps": self.steps, "seconds_of_run": run_seconds,
        }  # fmt: skip

    def __str__(self) -> str:
        model, total = self.model, sum(self.parameters.values())
        parts = " + ".join(f"{name} {count / 1e6:.1f}" for name, count in self.parameters.items())
        fits = "" if self.bytes_here <= self.bytes_free else "; that does not fit"
        begun = ", with which auto begins" if self.config.optim.micro_batch == AUTO else ""
        lines = [
            ("run", f"recipe {self.config.recipe}, batch {self.config.optim.batch_size}, {_length(self)}"),
            ("model", f"{model.label}: depth {model.depth}, width {model.width}, image {model.image_height}x"
             f"{model.image_width}x{model.channels}, patch {model.patch_size}"),
            ("parameters", f"{total / 1e6:.1f} M ({parts})"),
            ("FLOPs", f"{self.gflops_per_image:.2f} G an image, forward and backward"),
            *([("image sizes", _sizes(self))] if self.mean_cost != 1 else []),
            ("memory here", f"{self.bytes_here / GIB:.1f} GiB estimated, {self.precision}, micro-batch "
             f"{self.micro_batch} x {self.accumulation}{begun}; {self.bytes_free / GIB:.1f} GiB {self.free}{fits}"),
            *(("elsewhere", text) for text in self.elsewhere),
            ("time here", _time(self)),
        ]  # fmt: skip
        return "\n".join(f"{name:<12} {text}" for name, text in lines)


def summarise_run(argv: Sequence[str], *, measure: bool | None = None) -> RunSummary:
    """Summarise the run that ``argv`` asks for: fine-tuning if it names a --checkpoint, else pre-training.

    measure: whether real steps are timed; None: if the model is small enough for some seconds.

    Raises:
        UserError: such a run cannot be, or its data or checkpoint cannot be read.
    """
    finetuning = any(token.split("=")[0] == "--checkpoint" for token in argv)
    config = parse(FINETUNE if finetuning else PRETRAIN, argv)
    device = device_of_process(config.run.device)
    images, classes, decoded = _data(config)
    model = _encoder(config) if isinstance(config, FinetuneConfig) else config.model
    raw = read_ds_config(config.run.deepspeed_config)
    precision, _ = resolve_precision(config.run.precision, device)
    share, _ = resolve_batch(config, 1)
    ds_config = resolve_ds_config(
        {key: value for key, value in raw.items() if not key.startswith(("train_", "gradient_accum"))},
        config, micro_batch=share, accumulation=1, precision=precision, device=device,
    )  # fmt: skip
    batch = config.optim.batch_size

    def footprint(precision: str, on_gpu: bool) -> Footprint:
        return _footprint(config, model, classes, precision, on_gpu)

    here = footprint(precision, device.type == "cuda")
    place = Placement.of(ds_config, ranks=1, precision=precision, on_gpu=device.type == "cuda")

    def need(micro: int) -> float:
        return run_bytes(here, place, micro, batch // micro, decoded_bytes=decoded)

    free = free_memory(device, 1)
    micro = config.optim.given_micro_batch or largest_fitting(
        micro_batches(batch, here.group), need, free.bytes, on_gpu=place.on_gpu
    )

    def on_machine(machine: Machine) -> Footprint:
        return footprint(machine.precision, machine.on_gpu)

    seconds, measured_with = None, 0
    if measure or (measure is None and here.parameters <= MEASURED_UP_TO and need(1) < free.bytes):
        seconds, measured_with = step_seconds(config, model, classes, precision, device, micro, batch)
    steps = config.optim.steps or None
    if not steps and images:
        per_epoch = max(1, images // batch)
        steps = Durations.resolve(config.optim, config.run, config.log, steps_per_epoch=per_epoch).total_steps
    sizes = StepSizes.of(config, steps or 10_000)  # whose shares are exact enough
    if seconds is not None and sizes:
        shares = [(step_model, share) for step_model, share in sizes.shares() if step_model != model]
        smaller = [step_seconds(config, each, classes, precision, device, micro, batch)[0] for each, _ in shares]
        whole = 1 - sum(share for _, share in shares)
        seconds = whole * seconds + sum(each * share for each, (_, share) in zip(smaller, shares, strict=True))
    return RunSummary(
        config=config, model=model, precision=precision, parameters=_parameters(config, model, here.parameters),
        gflops_per_image=_flops(config, model, classes) / 1e9, free=free.bound, micro_batch=micro,
        accumulation=batch // micro, bytes_here=need(micro), bytes_free=free.bytes,
        elsewhere=memory_by_machine(on_machine, batch), seconds_per_step=seconds, measured_with=measured_with,
        images=images, steps=steps, mean_cost=sizes.mean_cost,
    )  # fmt: skip


def _encoder(config: FinetuneConfig) -> ModelConfig:
    section = config.finetune
    model = encoder_config(load_encoder(section.checkpoint)[0], section.drop_path or 0.0, section.attention)
    return config.resized(model)


def _data(config: Config) -> tuple[int | None, int, float]:
    """Return ``(images, classes, bytes of a decoded image)`` of the run's data; None and 1000 if they are not known."""
    paths = [Path(path) for path in config.data.data]
    classes = 1000
    if isinstance(config, FinetuneConfig):
        classes = config.finetune.num_classes or classes
        if not paths:
            return None, classes, DECODED_BYTES
    source_paths = paths or [prepare_demo()]
    with ExitStack() as closing:
        source = open_source(
            source_paths, labels=isinstance(config, FinetuneConfig), index_dir=config.data.index_dir or None
        )
        closing.callback(source.close)
        if isinstance(config, FinetuneConfig) and source.classes and not config.finetune.num_classes:
            classes = len(source.classes)
        return source.num_images, classes, typical_image_bytes(source_paths) or DECODED_BYTES


def _footprint(config: Config, model: ModelConfig, classes: int, precision: str, on_gpu: bool) -> Footprint:
    if isinstance(config, PretrainConfig):
        return pretraining_footprint(config, precision, on_gpu=on_gpu)
    assert isinstance(config, FinetuneConfig)
    return classifier_footprint(
        model, classes, precision, on_gpu=on_gpu, checkpointing=config.run.activation_checkpointing,
        averaged=bool(config.finetune.ema), paired=config.finetune.mixes_pairs,
    )  # fmt: skip


def _parameters(config: Config, model: ModelConfig, total: int) -> dict[str, int]:
    if isinstance(config, PretrainConfig):
        assert total == pretraining_parameters(model)
        return {"encoder": encoder_parameters(model), "decoders": decoder_parameters(model)}
    return {"encoder": encoder_parameters(model), "head": total - encoder_parameters(model)}


def _flops(config: Config, model: ModelConfig, classes: int) -> float:
    if isinstance(config, PretrainConfig):
        return training_flops_per_image(model, ExactSkips())
    return classifier_flops(model, classes).training


def _length(summary: RunSummary) -> str:
    optim = summary.config.optim
    if summary.steps is None:
        return f"{optim.epochs:g} epochs (give --data for the steps)"
    of_demo = "" if summary.config.data.data else " of the demo photographs"
    images = f", {summary.images} images{of_demo}" if summary.images else ""
    return f"{summary.steps} steps{f', {optim.epochs:g} epochs' if optim.epochs else ''}{images}"


def _sizes(summary: RunSummary) -> str:
    mean, share = summary.gflops_per_image * summary.mean_cost, 100 * summary.mean_cost
    return (
        f"{' '.join(summary.config.data.image_sizes)}: {mean:.2f} G an image on average, {share:.0f} % of those of one "
        "size; memory is of the whole size"
    )


def _time(summary: RunSummary) -> str:
    if summary.seconds_per_step is None:
        return "not measured (--time does it)"
    per_second = summary.config.optim.batch_size / summary.seconds_per_step
    text = f"{_spoken(summary.seconds_per_step)} a step, {per_second:.3g} images/s"
    if summary.steps:
        text += f"; the run {_spoken(summary.seconds_per_step * summary.steps)}"
    return (
        f"{text} (measured on synthetic images, {summary.measured_with} at a time; loader, pictures and checkpoints "
        "are left out)"
    )


def _spoken(seconds: float) -> str:
    """Format seconds as seconds, minutes, hours or days, with two or three digits."""
    for size, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {name}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
