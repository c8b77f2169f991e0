"""What a run on a GPU measured, beside what was predicted for it: the first run corrects the prediction."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from mirl.engine.accounting.devices import Device, device_reported
from mirl.engine.models.compute_choices import ComputeChoices
from mirl.engine.training.plan import RunPlan
from mirl.engine.training.run_log import RunLog

KEPT = ("step_ms", "images_per_s", "memory_gib")


@dataclass
class Measured:
    """The figures of all log lines of a run."""

    lines: list[dict[str, float]] = field(default_factory=list)

    def add(self, values: Mapping[str, Any]) -> None:
        """Keep the speed and memory of a log line."""
        self.lines.append({key: float(values[key]) for key in KEPT})

    @property
    def typical(self) -> dict[str, float] | None:
        """Medians without the first line, in which a run warms up; None where nothing came after it."""
        if len(self.lines) < 2:
            return None
        return {key: median(line[key] for line in self.lines[1:]) for key in KEPT}


def device_of(plan: RunPlan[Any]) -> Device | None:
    """The GPU of this run; None on a CPU, and for a GPU that the table of devices does not have."""
    if plan.ranks.device.type != "cuda":
        return None
    return device_reported(torch.cuda.get_device_name(plan.ranks.device))


def compare_with_prediction(
    plan: RunPlan[Any],
    build: Callable[[], ComputeChoices] | None,
    measured: Measured,
    log: RunLog,
    step: int,
    *,
    one_pass: bool = False,
) -> list[str]:
    """One line for the log of a run on a known GPU, on rank 0, and a record of it in metrics.jsonl; else none.

    ``build``: see `mirl.engine.accounting.fake_step`. ``step``: the last one. ``one_pass``: how the optimiser stepped.
    Nothing that goes wrong here ends the run, which is over.
    """
    device, typical = device_of(plan), measured.typical
    if device is None or build is None or typical is None or not plan.ranks.is_main or plan.precision != "bf16":
        return []
    try:
        predicted = _predict(plan, build, device, one_pass)
    except Exception as error:  # noqa: BLE001 - a run that is complete is not lost for a figure
        return [f"  predicted   not to be had: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"]
    log.event("prediction", step, gpu=device.key, predicted=predicted, measured=typical)
    ratio = typical["step_ms"] / predicted["step_ms"]
    return [
        f"  measured    step {typical['step_ms']:.1f} ms, {typical['images_per_s']:.0f} images/s; predicted for "
        f"{plan.ranks.world_size} x {device.key}: {predicted['step_ms']:.1f} ms (device {predicted['device_ms']:.1f}, "
        f"host {predicted['host_ms']:.1f}), {predicted['images_per_s']:.0f} images/s; measured / predicted {ratio:.2f}"
    ]


def _predict(
    plan: RunPlan[Any], build: Callable[[], ComputeChoices], device: Device, one_pass: bool
) -> dict[str, float]:
    # Only now: it takes the compiler's modules with it.
    from mirl.engine.accounting.forecast import forecast_step

    step = forecast_step(
        build, device, gpus=plan.ranks.world_size, micro_batch=plan.micro_batch, accumulation=plan.accumulation,
        stage=plan.ds_config["zero_optimization"]["stage"], one_pass=one_pass,
    )  # fmt: skip
    return {
        "step_ms": 1e3 * step.step_s, "images_per_s": step.images_per_s, "device_ms": 1e3 * step.times.device_s,
        "host_ms": 1e3 * step.times.host_s,
    }  # fmt: skip
