"""Predict what a training run would do on GPUs that are not here: speed, utilisation, memory, days."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from mirl.engine.accounting.devices import Device
from mirl.engine.accounting.fake_step import FLASH, fake_step, optimiser_operators
from mirl.engine.accounting.predict import Times, times
from mirl.engine.accounting.traffic import Links, link_seconds, shown_seconds
from mirl.engine.models.compute_choices import ComputeChoices
from mirl.kernels import AttentionBackend

FREE_SHARE = 0.975  # a driver leaves this share of a GPU's memory to programs
LINK_SHARE = 2 / 3  # a ring reaches this share of the data sheet's bandwidth


@dataclass(frozen=True, kw_only=True)
class StepForecast:
    """One optimiser step runs alike on each of ``gpus`` GPUs. ``shown_link_s``: seconds that traffic adds to it."""

    times: Times
    gpus: int
    images: int
    shown_link_s: float

    @property
    def step_s(self) -> float:
        return self.times.compute_s + self.shown_link_s

    @property
    def images_per_s(self) -> float:
        return self.images / self.step_s


def forecast_step(
    build: Callable[[], ComputeChoices],
    device: Device,
    *,
    gpus: int,
    micro_batch: int,
    accumulation: int = 1,
    stage: int = 2,
    links: Links | None = None,
    attention: AttentionBackend = FLASH,
    one_pass: bool = False,
) -> StepForecast:
    """Predict a step of the model that ``build`` makes.

    ``attention``: see `fake_step`. ``stage``: of ZeRO. ``one_pass``: see `optimiser_operators`.
    """
    links = links or Links(node_bytes_per_s=LINK_SHARE * device.link)
    seen = fake_step(build, micro_batch, attention=attention)
    last = optimiser_operators(seen.parameters, gpus, accumulation=accumulation, one_pass=one_pass)
    found = times(seen.operators, device, accumulation=accumulation, step=last)
    sent = link_seconds(sum(seen.parameters), stage, gpus, accumulation, links)
    return StepForecast(
        times=found, gpus=gpus, images=gpus * micro_batch * accumulation,
        shown_link_s=shown_seconds(sent, found.compute_s, links),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """A forecast is a run in plain figures.

    ``mfu_percent`` counts the FLOPs that the exact skips leave, ``plain_mfu_percent`` those of the plain form.
    ``launches``, ``bytes_gb`` and the times are of one GPU and one optimiser step. ``optimiser_gb``: the part of the
    bytes that comes after the backward passes. ``shares``: per cent of the device's time. ``days`` is None if the
    length of the run is unknown.
    """

    gpu: str
    gpus: int
    micro_batch: int
    accumulation: int
    device_ms: float
    host_ms: float
    link_ms: float
    step_ms: float
    launches: int
    bytes_gb: float
    optimiser_gb: float
    images_per_s: float
    mfu_percent: float
    plain_mfu_percent: float
    memory_gib: float
    memory_of_gpu_gib: float
    fits: bool
    days: float | None
    shares: dict[str, float]

    @classmethod
    def make(
        cls,
        step: StepForecast,
        device: Device,
        *,
        micro_batch: int,
        accumulation: int,
        flops_per_image: float,
        plain_flops_per_image: float,
        memory_gib: float,
        trained_images: float | None,
    ) -> Forecast:
        """Make the forecast of a step, with figures of the model's configuration.

        ``trained_images``: of the whole run.
        """
        found, speed = step.times, step.images_per_s
        utilisation = 100 * speed / (step.gpus * device.peak_flops)
        return cls(
            gpu=device.key, gpus=step.gpus, micro_batch=micro_batch, accumulation=accumulation,
            device_ms=1e3 * found.device_s, host_ms=1e3 * found.host_s, link_ms=1e3 * step.shown_link_s,
            step_ms=1e3 * step.step_s, launches=found.launches, bytes_gb=found.bytes / 1e9,
            optimiser_gb=found.optimiser_bytes / 1e9, images_per_s=speed,
            mfu_percent=utilisation * flops_per_image, plain_mfu_percent=utilisation * plain_flops_per_image,
            memory_gib=memory_gib, memory_of_gpu_gib=device.memory_gib,
            fits=memory_gib <= FREE_SHARE * device.memory_gib,
            days=None if trained_images is None else trained_images / speed / 86400,
            shares={kind: 100 * share for kind, share in found.shares.items()},
        )  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        return {"prediction": True} | asdict(self)
