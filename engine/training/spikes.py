"""Steps whose loss or gradient norm leaves the band of the steps before them: found, named, and not taken if so asked.

The band of a value is one-sided. Of the natural logarithms of its last W values (``--spike-window``) let m be the
median and d the median of their distances from m. A value is outside where

    log(value) > m + 6 * max(1.4826 * d, floor)

1.4826 * d is the standard deviation of normal numbers (Hampel 1974). The floor, 0.02 for the loss and 0.1 for the
gradient norm, keeps a flat stretch from having a band of no width: a loss 1.13 times its median, or a norm 1.82 times,
is never outside. There is no band before W / 2 values. Values outside count as later ones do: median and d bear them as
long as they are fewer than half, and a run that has moved to another level for good has a band there after W / 2 steps.
Where the size of the images changes the band begins anew.

Literature: the runs of OLMo 2 (2025) skip a step whose loss or gradient norm is more than 6 standard deviations above
the mean of the last 128; PaLM (Chowdhery et al. 2022) went back to a checkpoint and left out the batches around a
spike; ZClip (Kumar et al. 2025) clips by the z-score of a running mean of norms. Mean and deviation are drawn along by
the very spikes that they are to find, so that median and d take their place here, and of logarithms, because norms
spread in proportion to their size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np

from mirl.dataloaders import Batch, TrainLoader
from mirl.dataloaders.sources.paths import shown
from mirl.engine.checkpoints.files import write_whole
from mirl.engine.configuration.config import RunConfig
from mirl.engine.distributed.ds_engine import TrainEngine
from mirl.engine.distributed.launch import Ranks
from mirl.engine.distributed.spike_gate import SeenStep
from mirl.engine.training.block_scales import BlockScale, block_scales, first_grown
from mirl.engine.training.run_folder import Progress
from mirl.engine.training.run_log import RunLog
from mirl.engine.training.task import Place, Task
from mirl.errors import UserError

WIDTH = 6.0
DEVIATIONS = 1.4826  # of a normal distribution, in medians of the distance from the median
LOSS_FLOOR, NORM_FLOOR = 0.02, 0.1
FOLDER = "spikes"
KEPT = 4  # micro-batches of a step, and one of the step before, whose pixels stay until the step is over
FILES_NAMED = 4
_LEAST, _MOST = 1e-30, 88.0  # a value whose logarithm is taken, and an exponent that float32 holds


def band_limit(values: Sequence[float], window: int, floor: float) -> float:
    """The largest value inside the band of the last ``values``, a float32 number; infinite while they are too few."""
    if len(values) < window // 2:
        return math.inf
    logs = [math.log(max(value, _LEAST)) for value in values]
    middle = median(logs)
    deviation = DEVIATIONS * median(abs(log - middle) for log in logs)
    # Rounded as the device holds it, so that host and device never differ on a value at the limit.
    return float(np.float32(math.exp(min(_MOST, middle + WIDTH * max(deviation, floor)))))


@dataclass(frozen=True, kw_only=True)
class Spike:
    """A step outside its band; ``most``: the largest values inside it."""

    seen: SeenStep
    most: SeenStep

    def __str__(self) -> str:
        pairs = (
            ("loss", self.seen.loss, self.most.loss),
            ("gradient norm", self.seen.gradient_norm, self.most.gradient_norm),
        )
        return ", ".join(
            f"{name} {value:.4g} ({'outside its band' if value > most else 'inside'}, up to {most:.4g})"
            for name, value, most in pairs
        )


@dataclass(eq=False)
class SpikeWatch:
    """Watches the steps of one rank. All ranks make the same calls in the same order, and find the same."""

    config: RunConfig
    ranks: Ranks
    engine: TrainEngine
    task: Task
    loader: TrainLoader
    log: RunLog
    progress: Progress
    _now: list[tuple[Batch, Place]] = field(default_factory=list, init=False)
    _before: tuple[Batch, Place] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        watches = self.engine.can_watch_steps
        self._gate = self.engine.watch_steps(closes=self.config.on_spike != "log") if watches else None
        if not watches:
            self.log.say(
                "no step is watched for a spike of its loss or gradient norm: that needs ZeRO stage 1 or 2 with flat "
                "gradients"
            )

    def begin_band(self) -> None:
        """Forget the values so far: from here on images have another size, and losses another level."""
        self.progress.recent_losses.clear()
        self.progress.recent_norms.clear()

    def begin_step(self) -> None:
        """Set the limits of the step to come."""
        if self._gate is None:
            return
        window, progress = self.config.spike_window, self.progress
        self._gate.most_loss = band_limit(progress.recent_losses, window, LOSS_FLOOR)
        self._gate.most_norm = band_limit(progress.recent_norms, window, NORM_FLOOR)
        self._before = self._now[-1] if self._now else self._before
        self._now = []

    def keep(self, batch: Batch, place: Place) -> None:
        """Keep a micro-batch of the step until it is over."""
        if self._gate is not None and len(self._now) < KEPT:
            self._now.append((batch, place))

    def end_step(self) -> Spike | None:
        """What was wrong with the step that was made, if it was outside its band. A step that is not finite is not."""
        if self._gate is None:
            return None
        seen = self._gate.take()
        most = SeenStep(self._gate.most_loss, self._gate.most_norm)
        if not (math.isfinite(seen.loss) and math.isfinite(seen.gradient_norm)):
            return None
        for values, value in (
            (self.progress.recent_losses, seen.loss), (self.progress.recent_norms, seen.gradient_norm),
        ):  # fmt: skip
            values.append(value)
            del values[: -self.config.spike_window]
        outside = seen.loss > most.loss or seen.gradient_norm > most.gradient_norm
        return Spike(seen=seen, most=most) if outside else None

    def tell(self, spike: Spike, sample_ids: Sequence[np.ndarray], *, skipped: bool) -> str:
        """Tell of ``spike``, with every rank's files and the first block that grew; returns these details.

        The forward pass of the step is made again for it, and that of a micro-batch of the step before beside it, both
        with the weights of now. ``sample_ids``: of this rank's micro-batches. ``skipped``: whether the step was not
        taken.
        """
        step = self.progress.step
        files = [path for ids in sample_ids for path in self.loader.paths(ids)]
        reports = self.ranks.gather((files, self._grown()))
        path = self.log.out / FOLDER / f"step-{step:08d}.json"
        where, blocks = self._where(reports)
        if self.ranks.is_main:
            try:
                path.parent.mkdir(exist_ok=True)
                ranks = [{"rank": rank, "files": files} for rank, (files, _) in enumerate(reports)]
                write_whole(path, json.dumps({"step": step, "ranks": ranks}, indent=1))
            except OSError as error:
                self.log.say(f"warning: the files of step {step} could not be written: {error}; training goes on")
        detail = f"{spike}; {where}; all files of the step: {path}"
        self.log.say(f"step {step} left its band{', and was not taken' if skipped else ''}: {detail}")
        self.log.event(
            "spike", step, loss=spike.seen.loss, gradient_norm=spike.seen.gradient_norm, most_loss=spike.most.loss,
            most_gradient_norm=spike.most.gradient_norm, skipped=skipped, grown=blocks, files=str(path), detail=detail,
        )  # fmt: skip
        self._now = []  # the next spike is compared with a step that was none
        return detail

    def _grown(self) -> dict[str, Any] | None:
        """This rank's first block that grew, with its place in the order of blocks and the image that shows it most."""
        if self._before is None:
            return None
        beside = self._scales(*self._before)
        grown: list[dict[str, Any]] = []
        order = [block.name for block in beside]
        for batch, place in self._now:
            found = first_grown(self._scales(batch, place), beside)
            if found is not None:
                block, times = found
                image = None if block.image is None else self.loader.paths(batch.sample_ids[block.image :][:1])[0]
                grown.append({"block": block.name, "place": order.index(block.name), "times": times, "image": image})
        return _first(grown)

    def _scales(self, batch: Batch, place: Place) -> list[BlockScale]:
        return block_scales(self.engine.module, lambda: self.task.forward(batch, place), len(batch.sample_ids))

    def _where(self, reports: Sequence[tuple[list[str], dict[str, Any] | None]]) -> tuple[str, dict[str, Any] | None]:
        """In words, and as values, the first block of all ranks that grew."""
        first = _first([report | {"rank": rank} for rank, (_, report) in enumerate(reports) if report])
        if first is not None:
            image = f", most for {shown(first['image'])}" if first["image"] else ""
            of_rank = f" on rank {first['rank']}" if len(reports) > 1 else ""
            return (
                f"the first block that grew{of_rank} is {first['block']}, {first['times']:.3g} times as large as in "
                f"the step before{image}"
            ), {name: value for name, value in first.items() if name != "place"}
        named = "; ".join(
            f"rank {rank}: files {', '.join(map(shown, files[:FILES_NAMED]))}, ..."
            for rank, (files, _) in enumerate(reports)
        )
        if self._before is None:
            return f"there is no step before it since the start, beside which a block could have grown ({named})", None
        return f"no block grew beside the step before, so look at weights and learning rate ({named})", None


def _first(grown: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The earliest block; of those on several images or ranks the one that grew most."""
    return min(grown, key=lambda item: (item["place"], -item["times"] if item["times"] == item["times"] else -math.inf),
               default=None)  # fmt: skip


def refuse_unwatched(config: RunConfig, engine: TrainEngine) -> None:
    """UserError where steps are to be skipped and nothing can watch them."""
    if config.on_spike != "log" and not engine.can_watch_steps:
        raise UserError(
            f"on_spike is {config.on_spike!r}, which needs ZeRO stage 1 or 2 with flat gradients: give --on-spike log, "
            "or another --deepspeed-config and no --no-flat-gradients"
        )
