"""How long the experiment would take on a GPU, computed from its operators as `mirl plan` does. Nothing is measured.

Each worker launches its own operators, and all share one device: together they need the longer of the device's time for
all of it and of a host's for the units of one worker. Assumed beside what `mirl.engine.accounting.predict` assumes: the
operators that autocast's conversions add to a step, and the start of a worker.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.science.fresh_blocks import METHODS, NONE, SCALES, Scale
from benchmarks.science.views import CLASSES
from mirl.engine.accounting.devices import device_named
from mirl.engine.accounting.fake_step import fake_step, optimiser_operators
from mirl.engine.accounting.predict import HOST_S, times
from mirl.engine.models import MIRL
from mirl.engine.models.compute_choices import ComputeChoices
from mirl.engine.transfer.classification.classifier import Classifier, encoder_config

# Of a step's operators, those that only autocast makes: a conversion of most inputs and weights, and back.
AUTOCAST_SHARE = 0.5
START_S = 120.0  # of a worker: imports, views, the first step's kernels; and the probes of its units


@dataclass(frozen=True)
class Step:
    """device_s, host_s: of one training step; operators: counted of forward and backward pass."""

    device_s: float
    host_s: float
    operators: int


def step(build: Callable[[], ComputeChoices], batch: int, gpu: str) -> Step:
    """Of the model that ``build()`` makes, with the operators of forward and backward pass listed on fake tensors."""
    listed = fake_step(build, batch)
    found = times(listed.operators, device_named(gpu), step=optimiser_operators(listed.parameters, 1))
    counted = sum(listed.operators.values())
    # The conversions take about as long on the device as the elementwise operators that are there.
    return Step(found.device_s * (1 + AUTOCAST_SHARE), found.host_s + AUTOCAST_SHARE * counted * HOST_S, counted)


def seconds_of_unit(scale: Scale, method: str, gpu: str) -> tuple[float, float, str]:
    """Seconds of the device and of its host for one unit, and how they come about."""
    config = scale.model("mae" if method == NONE else method)
    pretraining = step(lambda: MIRL(config), scale.pretrain_batch, gpu)
    tuned = encoder_config(config)
    finetuning = step(lambda: Classifier(tuned, num_classes=CLASSES), scale.finetune.batch_size, gpu)
    steps, tunings = (0, scale.repeats) if method == NONE else (scale.pretrain_steps(method), 2 * scale.repeats)
    # A look passes all held-out views forward, which is a third of a training step on as many.
    looks = tunings * scale.looks * scale.held_out_views / scale.finetune.batch_size / 3
    tuning_steps = tunings * scale.finetune.steps + looks
    device_s = steps * pretraining.device_s + tuning_steps * finetuning.device_s
    host_s = steps * pretraining.host_s + tuning_steps * finetuning.host_s
    parts = [
        f"{count:.0f} {name} x (device {1e3 * one.device_s:.1f} ms, host {1e3 * one.host_s:.1f} ms, "
        f"{one.operators} operators)"
        for count, name, one in ((steps, "steps", pretraining), (tuning_steps, "of fine-tuning", finetuning))
    ]
    text = f"{method}: {' + '.join(parts)}"
    return device_s, host_s, text


def prediction(scale_name: str, gpu: str, seeds: int, workers: int) -> str:
    """Lines of the arithmetic, down to minutes for ``seeds`` of every method. Predicted, not measured."""
    units = [seconds_of_unit(SCALES[scale_name], method, gpu) for method in (*METHODS, NONE)]
    return total(scale_name, gpu, seeds, workers, units)


def total(scale_name: str, gpu: str, seeds: int, workers: int, units: list[tuple[float, float, str]]) -> str:
    """``units``: of each method what `seconds_of_unit` gives."""
    device_s = seeds * sum(device for device, _, _ in units)
    host_s = math.ceil(seeds * len(units) / workers) * sum(host for _, host, _ in units) / len(units)
    lines = [
        f"Predicted for one {gpu}, scale {scale_name}; nothing here was measured.",
        *(text for _, _, text in units),
    ]
    lines.append(
        f"{seeds} seeds of {len(units)} methods: device {device_s / 60:.1f} minutes, host of one of {workers} workers "
        f"{host_s / 60:.1f} minutes, start {START_S / 60:.0f}: {(START_S + max(device_s, host_s)) / 60:.1f} minutes"
    )
    return "\n".join(lines)
