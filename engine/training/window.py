"""The figures of one log line: what was added up on the device since the last line, over all ranks."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mirl.engine.distributed.launch import Ranks


@dataclass(kw_only=True)
class Window:
    """What happened since the last log line. Loss terms stay on the device until then."""

    started: float = field(default_factory=time.perf_counter)
    terms: Tensor | None = None
    loss: Tensor | None = None
    micro_batches: int = 0
    images: int = 0
    wait_started: float = 0.0
    cost: float = 0.0
    plain_cost: float = 0.0

    def add(
        self, loss: Tensor, terms: Tensor, images: int, *, cost: float = 1.0, plain_cost: float = 1.0
    ) -> None:  # fmt: skip
        """Add a micro-batch. cost, plain_cost: FLOPs of one of its images beside one of the whole size, with the exact
        skips and without.
        """
        self.terms = terms.detach().clone() if self.terms is None else self.terms + terms.detach()
        self.loss = loss.detach().clone() if self.loss is None else self.loss + loss.detach()
        self.micro_batches += 1
        self.images += images
        self.cost += cost
        self.plain_cost += plain_cost

    def leave_out(self, seconds: float) -> None:
        """Count ``seconds`` of the window as no part of its steps."""
        self.started += seconds

    def reduce(self, ranks: Ranks, term_names: tuple[str, ...], bad_images: int) -> dict[str, float]:
        """Mean loss and terms over ranks and micro-batches, sum of ``bad_images``; the host waits for the device."""
        sums = torch.cat([self.loss.reshape(1), self.terms]).double() / self.micro_batches
        sums = torch.cat([sums, sums.new_tensor([float(bad_images)])])
        if ranks.world_size > 1:
            torch.distributed.all_reduce(sums)
            sums[:-1] /= ranks.world_size
        loss, *terms, bad = sums.tolist()
        named = dict(zip(term_names, terms, strict=True)) if len(terms) > 1 else {}
        return {"loss": loss} | {f"loss_{name}": term for name, term in named.items()} | {"bad_images": int(bad)}

    def speed(self, ranks: Ranks, accumulation: int, wait_seconds: float) -> dict[str, float]:
        """Images a second over all ranks, milliseconds a step, share of the time spent waiting for data."""
        seconds = time.perf_counter() - self.started
        return {
            "images_per_s": self.images * ranks.world_size / seconds,
            "step_ms": 1000 * seconds / max(1, self.micro_batches // accumulation),
            "data_wait_percent": 100 * (wait_seconds - self.wait_started) / seconds,
        }


def line_of(values: dict[str, Any], total_steps: int) -> str:
    """The log line of a record of metrics, whose seconds_left may be None: not known yet."""
    step = values["step"]
    terms = [f"{key.removeprefix('loss_')} {value:.4f}" for key, value in values.items() if key.startswith("loss_")]
    parts = [f"step {step:>{len(str(total_steps))}}/{total_steps}", f"loss {values['loss']:.4f}", *terms]
    parts += [
        f"lr {values['lr']:.2e}",
        f"grad {values['gradient_norm']:.2f}",
        f"{values['images_per_s']:.0f} images/s",
        f"wait {values['data_wait_percent']:.1f}%",
        f"mem {values['memory_gib']:.1f}GiB",
    ]
    if "mfu_percent" in values:
        parts.append(f"mfu {values['mfu_percent']:.1f}% (plain {values['plain_mfu_percent']:.1f}%)")
    parts.append(f"left {_clock(values['seconds_left'])}")
    return "  ".join(parts)


def _clock(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
