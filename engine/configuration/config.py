"""The settings of a pre-training run: frozen dataclasses, checked when they are made.

A run is a `PretrainConfig`. Recipes (`engine/pretraining/recipes.py`) return one, the command line
(`engine/configuration/flags.py`) overrides single fields, and the result is printed, saved as config.json beside the
checkpoints and read back by `--resume`.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from mirl.engine.configuration.image_sizes import read_stages, require_fitting
from mirl.engine.models.config import ModelConfig
from mirl.errors import UserError
from mirl.keyed import fold_seed
from mirl.settings import LARGEST, Section

PRECISIONS = ("auto", "bf16", "fp32")
SWITCHES = ("auto", "on", "off")
COMPILES = (*SWITCHES, "max")
AUTO = "auto"
ON_SPIKE = ("log", "skip", "rollback")
SCHEDULES = ("cosine", "step", "poly")
OPTIMIZERS = ("adamw", "muon")
_CROPPED = ("model", "finetune")  # runs whose images are cropped without regard to label images or boxes
_PICTURED = ("model", "segment", "detect")


def setting(default: Any, text: str, **metadata: Any) -> Any:
    """A dataclass field with the help text of its command-line flag.

    ``of`` in ``metadata``: the section of the only kind of run that offers the flag, or those of several. ``unset``:
    what None, which the run replaces by a value when it begins, is called in help; a resumed run goes on with the value
    of its checkpoint. ``word``: what is allowed beside positive numbers; ``absent``: what the default 0 of such a
    setting, which is not written, is called in help.
    """
    return field(default=default, metadata={"help": text, **metadata})


def is_offered(item: Any, section: str, sections: Collection[str]) -> bool:
    """Whether a run with ``sections`` offers the field ``item`` of ``section`` as a flag (``of`` of `setting`)."""
    of = item.metadata.get("of", section)
    return any(name in sections for name in ((of,) if isinstance(of, str) else of))


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """Which images are read and how they are cropped."""

    data: tuple[str, ...] = setting(
        (), "folder(s), text list(s) or tar shard(s) of images; none: the demo photographs", metavar="PATH"
    )
    index_dir: str = setting(
        "", "folder of the .idx files of tar shards; none: beside the shards", metavar="DIR", of=_CROPPED
    )
    window: tuple[float, ...] = setting(
        (), "centre and width of the numbers of scans that become 0 to 1; none: those of the file", metavar="X",
        before=(), of=_CROPPED,
    )  # fmt: skip
    crop_scale: tuple[float, float] | None = setting(
        (0.2, 1.0),
        "smallest and largest share of the image area that a crop covers",
        unset="scaled",
        of=_CROPPED,
    )
    crop_ratio: tuple[float, float] = setting(
        (3 / 4, 4 / 3), "narrowest and widest aspect ratio of a crop", of=_CROPPED
    )
    flip: bool = setting(True, "mirror every other crop at random")
    centre_crops: float | None = setting(
        0.0,
        "share of the images that are cropped as in evaluation instead, and not mirrored",
        unset="scaled",
        before=0.0,
        of=_CROPPED,
    )
    image_sizes: tuple[str, ...] = setting(
        (),
        "sizes of the crops, each with the share of the run from which it holds, up to --image-size: 112 160@0.5 "
        "224@0.85; none: one size (docs/recipes.md)",
        metavar="SIDE[@SHARE]",
        of="model",
    )
    loader_threads: int = setting(
        0, "CPU threads that decode images, per rank; 0: the cores of the machine shared by its ranks"
    )
    max_bad_images: float = setting(0.001, "share of unreadable images past which the run stops")

    def check(self) -> None:
        object.__setattr__(self, "image_sizes", tuple(map(str, read_stages(self.image_sizes))))
        low, high = self.crop_scale or (1.0, 1.0)
        if not 0 < low <= high <= 1:
            raise UserError(f"crop_scale is {self.crop_scale}: give 0 < MIN <= MAX <= 1, e.g. 0.2 1.0")
        if not 0 <= (self.centre_crops or 0.0) <= 1:
            raise UserError(f"centre_crops is {self.centre_crops}: give a share from 0 to 1")
        if self.window and (len(self.window) != 2 or self.window[1] <= 0):
            raise UserError(f"window is {self.window}: give its centre and its width, above 0, e.g. 40 400")
        low, high = self.crop_ratio
        if not 0 < low <= high:
            raise UserError(f"crop_ratio is {self.crop_ratio}: give 0 < MIN <= MAX, e.g. 0.75 1.3333")
        if self.loader_threads < 0:
            raise UserError(f"loader_threads is {self.loader_threads}: give 0 (automatic) or a positive number")
        if not 0 <= self.max_bad_images <= 1:
            raise UserError(f"max_bad_images is {self.max_bad_images}: give a share from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Section):
    """The optimiser, its learning rate and how long it runs (section 4.1 of the paper; the recipe of MAE)."""

    batch_size: int = setting(4096, "effective batch: images of one optimiser step over all ranks")
    micro_batch: int | str = setting(
        0,
        "images per rank and forward pass; if not given, the most that divide the batch and fit into memory, as "
        "estimated; auto: the same, tried by a step at the start and halved where memory runs out",
        word=AUTO,
        absent="as estimated",
    )
    epochs: float = setting(0.0, "passes over the data set; this or --steps", metavar="N")
    steps: int = setting(0, "optimiser steps; this or --epochs")
    warmup_epochs: float = setting(0.0, "epochs of linear warm-up; this or --warmup-steps")
    warmup_steps: int = setting(0, "optimiser steps of linear warm-up")
    warmup_share: float = setting(
        0.0, "linear warm-up as a share of the run; one of the two flags above replaces it", metavar="SHARE"
    )
    base_lr: float = setting(1.5e-4, "learning rate at an effective batch of 256; scaled linearly with the batch")
    lr: float = setting(0.0, "peak learning rate itself; 0: base_lr * batch_size / 256")
    min_lr: float = setting(0.0, "learning rate at the end of the cosine")
    schedule: str = setting(
        "cosine",
        "learning-rate curve after the warm-up; step: x0.1 at 90 % and at 95 %; poly: a straight line",
        choices=SCHEDULES,
    )
    step_at: tuple[float, ...] = setting(
        (0.90, 0.95), "shares of the run from which schedule step takes a tenth of the rate", of="detect"
    )
    optimizer: str = setting(
        "adamw",
        "muon: orthogonal updates for the matrices of the blocks, AdamW for the rest; under ZeRO 1 and 2",
        choices=OPTIMIZERS,
    )
    betas: tuple[float, float] = setting((0.9, 0.95), "AdamW's decay rates of the two moments")
    weight_decay: float = setting(0.05, "weight decay, on matrices only")
    teacher_decay: float = setting(
        0.999, "share of the old average that the teacher of --feature-loss keeps in a step", of="model"
    )
    ema: float = setting(
        0.0,
        "decay of an average of the weights kept beside them, for mirl average; 0: none",
        metavar="DECAY",
        of="model",
    )
    clip_grad: float = setting(0.0, "largest global gradient norm; 0: no clipping")

    @property
    def given_micro_batch(self) -> int:
        """The micro-batch that was given as a number, else 0."""
        return self.micro_batch if isinstance(self.micro_batch, int) else 0

    def check(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"batch_size is {self.batch_size}: give a positive number of images")
        if self.micro_batch != AUTO and (not isinstance(self.micro_batch, int) or self.micro_batch < 0):
            raise UserError(
                f"micro_batch is {self.micro_batch}: give auto or a positive number of images, or leave it out"
            )
        if bool(self.epochs > 0) == bool(self.steps > 0):
            raise UserError(
                f"epochs is {self.epochs:g} and steps is {self.steps}: give exactly one of them, above zero"
            )
        if self.warmup_epochs and self.warmup_steps:
            raise UserError(
                f"warmup_epochs is {self.warmup_epochs:g} and warmup_steps is {self.warmup_steps}: give one of them "
                "and set the other to 0"
            )
        if not 0 <= self.warmup_share < 1:
            raise UserError(f"warmup_share is {self.warmup_share}: give a share of the run from 0 up to below 1")
        for name in ("epochs", "warmup_epochs", "warmup_steps", "min_lr", "lr", "weight_decay", "clip_grad"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}: give zero or more")
        if self.base_lr <= 0:
            raise UserError(f"base_lr is {self.base_lr}: give a positive learning rate, e.g. 1.5e-4")
        if self.optimizer not in OPTIMIZERS:
            raise UserError(f"optimizer is {self.optimizer!r}: choose one of {', '.join(OPTIMIZERS)}")
        if self.schedule not in SCHEDULES:
            raise UserError(f"schedule is {self.schedule!r}: choose one of {', '.join(SCHEDULES)}")
        if not all(0 < share < 1 for share in self.step_at) or list(self.step_at) != sorted(self.step_at):
            raise UserError(f"step_at is {self.step_at}: give rising shares of the run between 0 and 1, e.g. 0.9 0.95")
        for name in ("teacher_decay", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: give a number in [0, 1), e.g. 0.999")
        if not 0 < self.peak_lr <= LARGEST:
            raise UserError(
                f"base_lr is {self.base_lr} and batch_size is {self.batch_size:g}: the learning rate would be "
                f"{self.peak_lr:g}; give a smaller base_lr, e.g. 1.5e-4"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"betas is {self.betas}: give two numbers in [0, 1), e.g. 0.9 0.95")

    @property
    def peak_lr(self) -> float:
        return self.lr or self.base_lr * self.batch_size / 256


@dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
    """Where the run writes, in which precision it computes, how it is resumed and stopped."""

    out: str = setting("runs/pretrain", "folder of this run: log, metrics, pictures, checkpoints", metavar="DIR")
    seed: int = setting(0, "seed of the weights, the order of images, crops and masks: any whole number", any_size=True)
    device: str = setting(
        "auto", "auto: the GPUs of this machine, or its CPU where it has none; cpu: its CPU", choices=("auto", "cpu")
    )
    precision: str = setting("auto", "auto: bf16 where the device computes in it, else fp32", choices=PRECISIONS)
    deepspeed_config: str = setting(
        "zero2", "JSON file for DeepSpeed, or the name of one in ds_configs/", metavar="FILE"
    )
    resume: str = setting(
        "", "auto: go on from the newest good checkpoint in --out; or a checkpoint's path", metavar="auto|PATH"
    )
    change: tuple[str, ...] = setting(
        (), "settings that a resumed run may change on purpose: lr mask_ratio ... (docs/checkpoints.md)", metavar="NAME"
    )
    vgg_weights: str = setting(
        "", "file of torchvision's vgg16 weights (.pth or .safetensors), for --vgg-loss", metavar="FILE", of="model"
    )
    init_from: str = setting("", "start a new run from the weights of this checkpoint", metavar="PATH", of="model")
    checkpoint_every: int = setting(0, "optimiser steps between checkpoints; 0: twenty in a run")
    keep_checkpoints: int = setting(3, "newest checkpoints kept; 0: all")
    activation_checkpointing: str = setting(
        "none",
        "recompute activations in the backward pass: none, every, segments, or every n-th block (a number)",
        metavar="none|every|segments|N",
    )
    compile: str = setting(
        "auto",
        "compile the bodies of the blocks, once each; auto: on a GPU; max: search tilings and epilogues of their "
        "matrix products too, which takes minutes",
        choices=COMPILES,
    )
    fused: str = setting(
        "auto",
        "add + LayerNorm and bias + GELU as one kernel each, outside of compiled regions; auto: on a GPU",
        choices=SWITCHES,
    )
    choices: str = setting(
        "auto",
        "which implementation computes attention, norm and GELU where several give the same; auto: measured before the "
        "first step on a GPU, by rule on a CPU; measure: measured on any device; default is by rule; or choices.json "
        "of another run (docs/kernels.md)",
        metavar="auto|measure|default|FILE",
    )
    recompute_pointwise: bool = setting(
        False, "keep only the inputs of LayerNorm and GELU for the backward pass: less memory, the same results"
    )
    flat_gradients: bool = setting(
        True, "ZeRO 1 and 2: gradients go straight into one flat buffer; without it, through DeepSpeed's buckets"
    )
    max_minutes: float = setting(0.0, "save and leave after this many minutes (exit code 75); 0: no limit")
    max_nonfinite_steps: int = setting(
        5, "skipped steps in a row (non-finite loss or gradient) after which all ranks stop"
    )
    on_spike: str = setting(
        "log",
        "a step whose loss or gradient norm leaves the band of the steps before it: log names it, its files and the "
        "first block that grew; skip does not take it either; rollback goes back to the last good checkpoint and on "
        "past it (docs/faults.md)",
        choices=ON_SPIKE,
    )
    spike_window: int = setting(128, "steps whose loss and gradient norm make the band; it begins after half of them")
    watchdog_minutes: float = setting(
        10.0, "end a rank that finished no step for this long, after dumping its stacks (exit code 70); 0: never"
    )
    cpu_threads: int = setting(0, "torch threads of a rank on a CPU; 0: the cores of the machine shared by its ranks")

    def check(self) -> None:
        object.__setattr__(self, "seed", fold_seed(self.seed))
        if self.precision not in PRECISIONS:
            raise UserError(f"precision is {self.precision!r}: choose one of {', '.join(PRECISIONS)}")
        for name, allowed in (("compile", COMPILES), ("fused", SWITCHES), ("on_spike", ON_SPIKE)):
            if getattr(self, name) not in allowed:
                raise UserError(f"{name} is {getattr(self, name)!r}: choose one of {', '.join(allowed)}")
        if not self.choices:
            raise UserError("choices is empty: give auto, measure, default, or choices.json of another run")
        if self.recompute_pointwise and self.activation_checkpointing != "none":
            raise UserError(
                f"recompute_pointwise is True and activation_checkpointing is {self.activation_checkpointing!r}, which "
                "does more of the same: keep one of them"
            )
        if self.resume and self.init_from:
            raise UserError(
                "resume and init_from are both given: resume goes on with a run, init_from starts a new one; keep one"
            )
        for name in ("checkpoint_every", "keep_checkpoints", "max_minutes", "watchdog_minutes", "cpu_threads"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}: give zero or more")
        if self.max_nonfinite_steps < 1:
            raise UserError(f"max_nonfinite_steps is {self.max_nonfinite_steps}: give 1 or more")
        if self.spike_window < 8:
            raise UserError(f"spike_window is {self.spike_window}: give 8 or more")
        if self.activation_checkpointing not in ("none", "every", "segments") and not (
            self.activation_checkpointing.isdigit() and int(self.activation_checkpointing) > 0
        ):
            raise UserError(
                f"activation_checkpointing is {self.activation_checkpointing!r}: give none, every, segments, or a "
                "positive number n (every n-th block)"
            )


# Names of trackers, which are those of their packages, and what pip installs them by.
TRACKERS = {"wandb": "wandb>=0.21", "mlflow": "mlflow-skinny>=3"}
MOST_PROFILED_STEPS = 100  # about 20,000 events and 1 MB a step of a model of 48 blocks


@dataclass(frozen=True, kw_only=True)
class LogConfig(Section):
    """What the run tells while it goes on."""

    log_every: int = setting(0, "optimiser steps between log lines; 0: sixty in a run")
    picture_every: int = setting(0, "optimiser steps between picture grids; 0: six in a run", of=_PICTURED)
    pictures: int = setting(4, "images in a picture grid; 0: no pictures", of=_PICTURED)
    val: tuple[str, ...] = setting(
        (), "held-out images whose loss is told while training goes on; none: no such loss", metavar="PATH", of="model"
    )
    probe: tuple[str, ...] = setting(
        (), "labelled images for a linear probe of the encoder while training goes on; none: no probe", metavar="PATH",
        of="model",
    )  # fmt: skip
    eval_every: int = setting(
        0, "optimiser steps between evaluations by --val and --probe; 0: ten in a run, or as few as take under 2 % of "
        "its time", of="model",
    )  # fmt: skip
    tensorboard: bool = setting(True, "write TensorBoard event files")
    track: tuple[str, ...] = setting(
        (), "send metrics, pictures and settings to these trackers too; none: to none (docs/systems.md)",
        choices=tuple(TRACKERS),
    )  # fmt: skip
    profile: int = setting(
        0,
        "trace this many steps of this start for Perfetto, with a table by class of operators; 0: none (docs/plan.md)",
    )

    def check(self) -> None:
        for name in self.track:
            if name not in TRACKERS or self.track.count(name) > 1:
                raise UserError(f"track is {' '.join(self.track)}: give each of {', '.join(TRACKERS)} at most once")
        if self.profile > MOST_PROFILED_STEPS:
            raise UserError(
                f"profile is {self.profile}: a trace holds every operator, give {MOST_PROFILED_STEPS} or fewer"
            )
        for name in ("log_every", "picture_every", "pictures", "eval_every", "profile"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}: give zero or more")


@dataclass(frozen=True, kw_only=True)
class Config:
    """What every run has. ``recipe`` names where its defaults came from. A kind of run adds sections of its own."""

    recipe: str
    data: DataConfig
    optim: OptimConfig
    run: RunConfig = field(default_factory=RunConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @classmethod
    def sections(cls) -> dict[str, type]:
        """The dataclass of each section, by the name of its field, a run's own sections first."""
        hints = typing.get_type_hints(cls)
        common = set(Config.__annotations__)
        kinds = {
            item.name: hints[item.name]
            for item in dataclasses.fields(cls)
            if dataclasses.is_dataclass(hints[item.name])
        }
        return {name: kinds[name] for name in sorted(kinds, key=lambda name: name in common)}

    def to_dict(self) -> dict[str, Any]:
        """Plain nested values, as config.json holds them."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, source: str) -> Self:
        """The inverse of `to_dict`; UserError names ``source`` and the field that does not fit."""
        try:
            made = {name: section_from_dict(kind, values[name], source=source) for name, kind in cls.sections().items()}
            return cls(recipe=values["recipe"], **made)
        except (KeyError, TypeError) as error:
            raise UserError(f"{source} is not a configuration of this engine: {error}") from error


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(Config):
    """One pre-training run."""

    model: ModelConfig

    def __post_init__(self) -> None:
        require_fitting(self.data.image_sizes, self.model)
        if self.model.vgg_loss and not self.run.vgg_weights:
            raise UserError(
                f"vgg_loss is {self.model.vgg_loss} and vgg_weights is not given: name a file of torchvision's vgg16 "
                "weights (vgg16-397923af.pth), or set vgg_loss to 0"
            )


def section_from_dict(kind: type, values: dict[str, Any], *, source: str) -> Any:
    """One section of a configuration from JSON values (lists become tuples).

    A field that ``values`` lacks has the value that its metadata ``before`` names, else its default.
    """
    values = values_before(kind, values) | dict(values)
    known = {item.name for item in dataclasses.fields(kind)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise UserError(
            f"{source}: {kind.__name__} has no field {unknown[0]!r}; it was written by another version of the engine"
        )
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def values_before(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """What the fields that ``values`` lacks were before they were settings, for those that say so (``before``)."""
    fields = dataclasses.fields(kind)
    return {
        item.name: item.metadata["before"] for item in fields if "before" in item.metadata and item.name not in values
    }
