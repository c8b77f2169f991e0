"""Which settings of a resumed run must be those of its checkpoint, and what is said of those that are not.

A setting belongs to the experiment unless it stands in `FREE`, so that a new one is compared from its first day. One
that differs is refused, unless `--change NAME` says that it is meant. Length and warm-up are compared in steps.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from mirl.engine.checkpoints.reader import CheckpointReader
from mirl.engine.configuration.config import Config, values_before
from mirl.engine.training.schedule import lengths
from mirl.errors import UserError

C = TypeVar("C", bound=Config)

# Where the run goes on, how fast it computes and what it tells; of `statistics` the mean and std that it led to are
# compared. The data set is compared by the names of its images and
# the loader does that; paths to it may be others on another machine.
FREE: Mapping[str, frozenset[str]] = {
    "model": frozenset({"name", "attention", "statistics"}),
    "data": frozenset({"data", "index_dir", "loader_threads", "max_bad_images"}),
    "optim": frozenset({"micro_batch"}),
    "run": frozenset({
        "out", "resume", "init_from", "change", "device", "precision", "deepspeed_config", "vgg_weights",
        "checkpoint_every", "keep_checkpoints", "activation_checkpointing", "compile", "fused",
        "recompute_pointwise", "flat_gradients", "max_minutes", "max_nonfinite_steps", "watchdog_minutes",
        "cpu_threads", "on_spike", "spike_window",
    }),
    "log": frozenset({
        "log_every", "picture_every", "pictures", "val", "probe", "eval_every", "tensorboard", "track", "profile",
    }),
    "finetune": frozenset({"checkpoint", "val", "eval_every", "attention", "head_init"}),
    "segment": frozenset({
        "checkpoint", "labels", "val", "val_labels", "label_map", "ignore", "eval_every", "attention", "eval_mode",
        "eval_stride", "eval_scales", "eval_flip", "fresh",
    }),
    "detect": frozenset({
        "checkpoint", "annotations", "val", "val_annotations", "eval_every", "attention", "fresh",
    }),
}  # fmt: skip
# The order of images, or the shapes of the weights and moments, rest on these: no run can go on with others.
FIXED = frozenset({
    "seed", "batch_size", "depth", "width", "mlp_ratio", "patch_size", "channels", "segments", "decoder_width",
    "decoder_depth", "variant", "truncated_depth", "optimizer",
})  # fmt: skip
# The section that makes a run one of transfer, of its kind.
_OF_TRANSFER = ("finetune", "segment", "detect")
# Not told where they differ: each start has its own.
_OF_A_START = frozenset({"name", "out", "resume", "init_from", "change", "checkpoint", "statistics"})
# One of them is as good as the other in --change.
_TOGETHER = (
    {"image_size", "image_height", "image_width"}, {"lr", "base_lr"}, {"steps", "epochs"},
    {"warmup_steps", "warmup_epochs", "warmup_share"},
)  # fmt: skip
_LENGTHS = ("epochs", "steps", "warmup_epochs", "warmup_steps", "warmup_share")


@dataclass(frozen=True)
class Difference:
    """A setting whose value in the run, ``ours``, is not that of the checkpoint, ``theirs``."""

    section: str
    name: str
    ours: Any
    theirs: Any

    @property
    def free(self) -> bool:
        """Whether the setting may differ without being named."""
        return self.name in FREE.get(self.section, frozenset())


def keep_settled(config: C, reader: CheckpointReader) -> C:
    """Return ``config`` with what the first start of the run settled and no flag of this one decides.

    That is mean and std where the data set was found to be grey, what was scaled to the length of the run, and the
    value that a setting had in the version which wrote the checkpoint, if that version had no such setting.
    """
    saved = reader.state["config"]
    made = {}
    for section, kind in config.sections().items():
        ours, theirs = getattr(config, section), saved.get(section)
        if not isinstance(theirs, Mapping):
            continue  # of another kind of run
        changes = values_before(kind, theirs)
        for item in dataclasses.fields(kind):
            if "unset" in item.metadata and getattr(ours, item.name) is None and item.name in theirs:
                changes[item.name] = _plain(theirs[item.name])
        if getattr(ours, "statistics", None) == "auto" and theirs.get("statistics") == "grey":
            changes |= {name: _plain(theirs[name]) for name in ("mean", "std", "statistics")}
        made[section] = dataclasses.replace(ours, **changes)
    return dataclasses.replace(config, **made)


def compare_settings(config: Config, reader: CheckpointReader) -> list[str]:
    """Compare ``config`` with the checkpoint that it resumes; returns lines that tell what differs.

    Raises:
        UserError: settings of the experiment differ and are not named by ``run.change``; all of them are listed.
    """
    saved = reader.state["config"]
    own = [section for section in config.sections() if section in _OF_TRANSFER]
    if not set(config.sections()) <= set(saved) or own != [section for section in saved if section in _OF_TRANSFER]:
        return []  # of another kind of run, or imported: each kind of run says so itself
    found = [
        difference
        for section, kind in config.sections().items()
        for difference in differences(section, kind, getattr(config, section), saved[section])
    ]
    found = [item for item in found if not _means_the_same(item, config, saved)]
    wrong_lengths, grown = _compare_lengths(dataclasses.asdict(config.optim), saved["optim"], reader.state)
    refuse_unnamed([*[item for item in found if not item.free], *wrong_lengths], config, reader.path)
    told = [item for item in [*found, *wrong_lengths, *grown] if item.name not in _OF_A_START]
    if not told:
        return []
    pairs = ", ".join(f"{item.name} {_shown(item.theirs)} -> {_shown(item.ours)}" for item in told)
    return [f"goes on with other settings than {reader.path.name} was trained with: {pairs}"]


def differences(section: str, kind: type, ours: Any, saved: Mapping[str, Any]) -> list[Difference]:
    """Fields of ``ours``, of dataclass ``kind``, whose values are not those that ``saved`` holds.

    A field that the version which wrote ``saved`` did not have counts as having `values_before`, or its default.
    """
    result = []
    saved = values_before(kind, saved) | dict(saved)
    for field in dataclasses.fields(kind):
        if section == "optim" and field.name in _LENGTHS:
            continue
        here, there = (
            _plain(getattr(ours, field.name)),
            _plain(saved.get(field.name, field.metadata.get("before", field.default))),
        )
        if here != there:
            result.append(Difference(section, field.name, here, there))
    return result


def refuse_unnamed(found: list[Difference], config: Config, path: Any) -> None:
    """Refuse a resumed run with the differences ``found``, but for those that ``config.run.change`` names.

    Raises:
        UserError: names each setting with both values, and the flags that keep or accept them.
    """
    named = {name.replace("-", "_") for name in config.run.change}
    for group in _TOGETHER:
        named |= group if group & named else set()
    fixed = [item for item in found if item.name in FIXED]
    open_ones = [item for item in found if item.name not in FIXED and item.name not in named]
    if not fixed and not open_ones:
        return
    wrong = [*fixed, *open_ones]
    first = wrong[0]
    text = f"{first.name} is {_shown(first.ours)} and {path} was trained with {_shown(first.theirs)}"
    text += "".join(f"; {item.name} is {_shown(item.ours)}, it was {_shown(item.theirs)}" for item in wrong[1:])
    text += f": give {' '.join(dict.fromkeys(_flag(item, wrong) for item in wrong))} as before"
    if open_ones:
        text += f", or accept the new value by --change {' '.join(item.name for item in open_ones)}"
    if fixed:
        names = " and ".join(item.name for item in fixed)
        text += f" ({names} cannot change within a run"
        text += "; --micro-batch sets the accumulation)" if any(item.name == "batch_size" for item in fixed) else ")"
    raise UserError(text)


def require_known_changes(config: Config) -> None:
    """Check the names of ``run.change``, also for a run that is not resumed.

    Raises:
        UserError: a name that is no setting, with the nearest one, or one that cannot change within a run.
    """
    known = {field.name for kind in config.sections().values() for field in dataclasses.fields(kind)} | {"image_size"}
    for name in (given.replace("-", "_") for given in config.run.change):
        if name in FIXED:
            raise UserError(f"change is {name}: it cannot change within a run; start a new one, by --init-from")
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1)
            raise UserError(f"change is {name}, which is no setting: give {near[0] if near else 'names of flags'}")


def _means_the_same(item: Difference, config: Config, saved: Mapping[str, Any]) -> bool:
    """Whether two values have one effect."""
    if item.section == "optim" and item.name in ("lr", "base_lr"):
        theirs = saved["optim"]
        peak = theirs["lr"] or theirs["base_lr"] * theirs["batch_size"] / 256
        return config.optim.peak_lr == peak
    if item.section in _OF_TRANSFER:
        # The image size stands in the encoder, which is compared when it is known; the classes are those of the data.
        automatic = item.name == "num_classes" and 0 in (item.ours, item.theirs)
        return automatic or item.name in ("image_height", "image_width")
    return False


def _compare_lengths(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], state: Mapping[str, Any]
) -> tuple[list[Difference], list[Difference]]:
    """``(wrong, grown)``: what differs in length and warm-up; a longer run is welcome.

    So is the warm-up that a longer run has by default, a tenth of it or the recipe's share; and one that the checkpoint
    is past acts no more.
    """
    per_epoch = state["steps_per_epoch"]
    (total, warmup), (their_total, their_warmup) = (lengths(optim, per_epoch) for optim in (ours, theirs))
    length = _length("epochs" if theirs["epochs"] else "steps", ours, theirs, total, their_total, per_epoch)
    warming = _length(
        "warmup_epochs" if theirs["warmup_epochs"] else "warmup_steps", ours, theirs, warmup, their_warmup, per_epoch
    )
    wrong, grown = [], []
    if total != their_total:
        (grown if total > their_total else wrong).append(length)
    if warmup != their_warmup:
        past = state["applied_steps"] >= max(warmup, their_warmup)
        tenths = abs(10 * warmup - total) < 10 and abs(10 * their_warmup - their_total) < 10
        shares = ours["warmup_share"] and ours["warmup_share"] == theirs.get("warmup_share")
        (grown if total > their_total and (past or tenths or shares) else wrong).append(warming)
    return wrong, grown


def _length(
    name: str, ours: Mapping[str, Any], theirs: Mapping[str, Any], steps: int, their_steps: int, per_epoch: int
) -> Difference:
    """The difference in the unit in which the checkpoint has its length."""
    if not name.endswith("epochs"):
        return Difference("optim", name, steps, their_steps)
    return Difference("optim", name, ours[name] or steps / per_epoch, theirs[name])


def _plain(value: Any) -> Any:
    return tuple(_plain(part) for part in value) if isinstance(value, list | tuple) else value


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_shown, value)) or "none"
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def _flag(item: Difference, among: list[Difference]) -> str:
    """The flag that gives the checkpoint's value."""
    if item.name in ("image_height", "image_width"):
        sides = {"image_height": None, "image_width": None}
        sides |= {other.name: other.theirs for other in among if other.name in sides}
        known = item.theirs
        return f"--image-size {sides['image_height'] or known}x{sides['image_width'] or known}"
    flag = item.name.replace("_", "-")
    if isinstance(item.theirs, bool):
        return f"--{flag}" if item.theirs else f"--no-{flag}"
    return f"no --{flag}" if item.theirs in (None, (), "") else f"--{flag} {_shown(item.theirs)}"
