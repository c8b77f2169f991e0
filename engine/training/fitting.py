"""The micro-batch that fits into memory, before anything is built; or one line that says what would."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from mirl.dataloaders import typical_image_bytes
from mirl.engine.accounting.free_memory import FreeMemory, free_memory
from mirl.engine.accounting.machines import largest_fitting, micro_batches
from mirl.engine.accounting.memory import GIB
from mirl.engine.accounting.run_memory import DECODED_BYTES, Footprint, Placement, run_bytes
from mirl.engine.checkpoints.reader import CheckpointReader
from mirl.engine.configuration.config import AUTO, Config
from mirl.engine.configuration.overrides import override
from mirl.engine.training.plan import BATCH_KEYS, RunPlan, agree_on_main
from mirl.errors import UserError

C = TypeVar("C", bound=Config)
# The estimate may be wrong by so much: what exceeds it beyond that is refused.
CLEARLY = 1.1

FootprintOf = Callable[[RunPlan[Any]], Footprint]


def fit_to_memory(plan: RunPlan[C], footprint_of: FootprintOf, *, at_most: int | None = None) -> RunPlan[C]:
    """``plan`` with a micro-batch that fits, on all ranks the same; the effective batch stays what it is.

    ``at_most``: none that is larger, because it was tried.

    A micro-batch that was asked for is kept. One that a resumed run has recorded is kept where it fits, and always
    where the results rest on it.

    Raises:
        UserError: nothing fits, or the given micro-batch is clearly too large; it says which flags would fit.
    """
    ranks = plan.ranks
    free = min(ranks.gather(free_memory(ranks.device, ranks.local_world_size)))
    plan = dataclasses.replace(plan, decoded_bytes=_decoded_bytes(plan))
    need = Need(plan, footprint_of)
    allowed = micro_batches(plan.micro_batch * plan.accumulation, need.footprint.group)
    allowed = [size for size in allowed if at_most is None or size <= at_most]
    recorded = _recorded(plan.resumed_from)
    if plan.micro_batch_given:
        micro, kept = plan.micro_batch, True
    elif recorded in allowed and (
        need.footprint.group > 1 or (need(recorded) <= free.bytes and plan.config.optim.micro_batch != AUTO)
    ):
        micro, kept = recorded, True
    else:
        micro, kept = largest_fitting(allowed, need, free.bytes, on_gpu=ranks.device.type == "cuda"), False
    if need(micro) > CLEARLY * free.bytes:
        raise UserError(_refusal(need, micro, allowed, free, kept))
    accumulation = need.share // micro
    batch_keys = dict(zip(BATCH_KEYS, (micro, accumulation), strict=True))
    line = _told(need, micro, free, recorded if kept and not plan.micro_batch_given else 0)
    return dataclasses.replace(
        plan, micro_batch=micro, accumulation=accumulation, ds_config=plan.ds_config | batch_keys,
        remarks=[*plan.remarks, line],
    )  # fmt: skip


class Need:
    """Bytes that the run needs with a micro-batch, as it is planned or with settings changed."""

    def __init__(self, plan: RunPlan[Any], footprint_of: FootprintOf) -> None:
        self.plan, self._footprint_of = plan, footprint_of
        self.share = plan.micro_batch * plan.accumulation
        self.footprint = footprint_of(plan)
        self.place = self._place_of(plan.ds_config)

    def __call__(self, micro: int) -> float:
        return self._of(self.footprint, micro)

    def changed(self, changes: dict[str, Any], micro: int) -> float:
        """The need with single settings changed; UserError where they do not fit together."""
        return self._of(self._footprint_of(self.plan.with_config(override(self.plan.config, changes))), micro)

    def placed(self, ds_config: dict[str, Any], micro: int) -> float:
        """The need with the states where another DeepSpeed configuration has them."""
        place, parts = self._place_of(ds_config), self.share // micro
        return run_bytes(self.footprint, place, micro, parts, decoded_bytes=self.plan.decoded_bytes)

    def _place_of(self, ds_config: dict[str, Any]) -> Placement:
        plan = self.plan
        on_gpu = plan.ranks.device.type == "cuda"
        return Placement.of(ds_config, ranks=plan.ranks.world_size, precision=plan.precision, on_gpu=on_gpu)

    def _of(self, footprint: Footprint, micro: int) -> float:
        return run_bytes(footprint, self.place, micro, self.share // micro, decoded_bytes=self.plan.decoded_bytes)


def smaller_micro_batches(plan: RunPlan[Any], need: Need) -> list[int]:
    """Micro-batches below that of ``plan`` that divide a rank's images of a step, the largest first."""
    return [size for size in micro_batches(need.share, need.footprint.group) if size < plan.micro_batch]


def _told(need: Need, micro: int, free: FreeMemory, recorded: int) -> str:
    """The line of the log; ``recorded``: the micro-batch of the checkpoint, if that was taken, else 0."""
    text = f"memory {gib(need(micro))} estimated for micro-batch {micro}, {gib(free.bytes)} {free.bound}"
    if need(micro) > free.bytes:
        return f"warning: {text}: it may not be enough; {_mend(need, micro, micro_batches(need.share), free)}"
    if micro == recorded:
        text += "; the micro-batch of the checkpoint is kept"
    elif micro < need.share and not need.plan.micro_batch_given:
        text += (
            f"; the {need.share} images of a step at once would take {gib(need(need.share))}, and so come in "
            f"{need.share // micro} micro-batches"
        )
    return text


def _refusal(need: Need, micro: int, allowed: list[int], free: FreeMemory, kept: bool) -> str:
    """One line: what is needed, what there is, and which flags would fit."""
    even = "" if kept else "even "
    return (
        f"memory is {gib(free.bytes)} ({free.bound}) and the run needs about {gib(need(micro))} {even}with micro-batch "
        f"{micro}: {_mend(need, micro, allowed, free)}"
    )


def _mend(need: Need, micro: int, allowed: list[int], free: FreeMemory) -> str:
    smaller = next((size for size in allowed if size < micro and need(size) <= free.bytes), None)
    ways = [f"--micro-batch {smaller}"] if smaller else []
    for flag, changes in _changes(need.plan.config, need.plan.config.sections()):
        try:
            fits = need.changed(changes, allowed[-1]) <= free.bytes
        except UserError:  # it does not go with another setting
            continue
        if fits and len(ways) < 3:
            ways.append(flag + (f" --micro-batch {allowed[-1]}" if need.plan.micro_batch_given else ""))
    return f"give {', or '.join(ways)}" if ways else "give a smaller --model or --image-size, or more memory"


def _changes(config: Any, sections: dict[str, type]) -> list[tuple[str, dict[str, Any]]]:
    """``(flags, settings)`` that make a run smaller, the one that changes least first."""
    changes: list[tuple[str, dict[str, Any]]] = []
    if config.run.activation_checkpointing == "none" and not config.run.recompute_pointwise:
        changes.append(("--recompute-pointwise", {"run.recompute_pointwise": True}))
    if config.run.activation_checkpointing != "every":
        changes.append(
            ("--activation-checkpointing every",
             {"run.activation_checkpointing": "every", "run.recompute_pointwise": False})
        )  # fmt: skip
    model = config.model
    section = next(name for name, kind in sections.items() if "image_height" in kind.__dataclass_fields__)
    for divisor in (2, 4):
        sides = tuple(
            max(1, side // divisor // model.patch_size) * model.patch_size
            for side in (model.image_height, model.image_width)
        )
        text = str(sides[0]) if sides[0] == sides[1] else f"{sides[0]}x{sides[1]}"
        changes.append((f"--image-size {text}", {f"{section}.image_size": sides}))
    if section == "model" and model.width > 384:
        changes.append(("--model vit_s", {"model.name": "vit_s"}))
    return changes


def _decoded_bytes(plan: RunPlan[Any]) -> float:
    """Of an image of the data as it is stored; ranks may see different files first, so rank 0 tells."""
    paths = [Path(path) for path in plan.config.data.data]
    return agree_on_main(plan.ranks, lambda: typical_image_bytes(paths) or DECODED_BYTES)


def _recorded(reader: CheckpointReader | None) -> int:
    """Images of the micro-batch that the checkpoint was trained with; 0: none, or imported."""
    if reader is None or "optim" not in reader.state.get("config", {}):
        return 0
    state, optim = reader.state, reader.state["config"]["optim"]
    given = optim["micro_batch"]
    return state.get("micro_batch") or (given if given != AUTO else 0) or optim["batch_size"] // state["world_size"]


def gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"
