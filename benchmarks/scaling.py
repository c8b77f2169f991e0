"""The tables of docs/scaling.md: memory, traffic and step time of many GPUs, computed, not measured.

    python -m benchmarks.scaling [--gpu H100] [--batch 4096] [--hbm-gib 80]

Counted: parameters, bytes of memory (engine/accounting/memory.py), operators of a step with their bytes and FLOPs
(engine/accounting/fake_step.py), bytes that ZeRO sends (engine/accounting/traffic.py, with its formulas). Predicted
from them: the time that one GPU computes, as `mirl plan` does (engine/accounting/predict.py). Assumed and printed with
the tables: the speed of the links, the share of the traffic that hides behind computation.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import cache

from mirl.engine.accounting.devices import Device, device_named
from mirl.engine.accounting.fake_step import FakeStep, fake_step, optimiser_operators
from mirl.engine.accounting.flops import pretraining_parameters, training_flops_per_image
from mirl.engine.accounting.memory import GIB, activation_bytes, state_bytes
from mirl.engine.accounting.predict import Times, times
from mirl.engine.accounting.traffic import Links, link_seconds, sent_bytes, shown_seconds
from mirl.engine.models import MIRL, ModelConfig, model_config

MODELS = ("vit_b_48", "vit_s_54")
GPUS = (8, 32, 256)
STAGES = (2, 3)  # stage 1 is as stage 2 (engine/distributed/flat_gradients.py)
# Kernels' work space and the allocator, on top of the counted bytes; and what CUDA's context and NCCL's buffers leave.
MEMORY_OVERHEAD, USABLE_MEMORY = 1.10, 0.92
MICRO_BATCHES = (512, 256, 128, 64, 32, 16, 8)


@dataclass(frozen=True, kw_only=True)
class Row:
    model: str
    gpus: int
    stage: int
    micro_batch: int
    accumulation: int
    memory_gib: float
    states_gib: float
    sent_gb: float
    device_ms: float
    compute_ms: float
    link_ms: float
    step_ms: float

    @property
    def efficiency_percent(self) -> float:
        return 100 * self.device_ms / self.step_ms


@cache
def listed(config: ModelConfig, micro_batch: int) -> FakeStep:
    return fake_step(lambda: MIRL(config), micro_batch)


def compute(
    config: ModelConfig, micro_batch: int, accumulation: int, gpus: int, device: Device, *, one_pass: bool = False
) -> Times:
    """A step's computation on one of ``gpus`` GPUs, as `mirl plan` predicts it."""
    step = listed(config, micro_batch)
    last = optimiser_operators(step.parameters, gpus, accumulation=accumulation, one_pass=one_pass)
    return times(step.operators, device, accumulation=accumulation, step=last)


def micro_batch_that_fits(config: ModelConfig, stage: int, ranks: int, share: int, hbm_gib: float) -> int | None:
    """The largest micro-batch that divides ``share`` images of a rank and fits; None if none does."""
    for micro in MICRO_BATCHES:
        if micro <= share and share % micro == 0:
            states = state_bytes(config, stage, ranks, accumulation=share // micro)
            needed = MEMORY_OVERHEAD * (states + activation_bytes(config, micro)) / GIB
            if needed <= USABLE_MEMORY * hbm_gib:
                return micro
    return None


def row(
    config: ModelConfig, gpus: int, stage: int, batch: int, device: Device, links: Links, hbm_gib: float
) -> Row | None:
    share, parameters = batch // gpus, pretraining_parameters(config)
    micro = micro_batch_that_fits(config, stage, gpus, share, hbm_gib)
    if micro is None:
        return None
    accumulation = share // micro
    found = compute(config, micro, accumulation, gpus, device, one_pass=stage < 3)
    link_s = link_seconds(parameters, stage, gpus, accumulation, links)
    step_s = found.compute_s + shown_seconds(link_s, found.compute_s, links)
    states = state_bytes(config, stage, gpus, accumulation=accumulation)
    return Row(
        model=config.name, gpus=gpus, stage=stage, micro_batch=micro, accumulation=accumulation,
        memory_gib=MEMORY_OVERHEAD * (states + activation_bytes(config, micro)) / GIB, states_gib=states / GIB,
        sent_gb=sent_bytes(parameters, stage, gpus, accumulation) / 1e9, device_ms=1e3 * found.device_s,
        compute_ms=1e3 * found.compute_s, link_ms=1e3 * link_s, step_ms=1e3 * step_s,
    )  # fmt: skip


def tables(batch: int, device: Device, links: Links, hbm_gib: float) -> str:
    lines = [
        f"Effective batch {batch}, 224 px, bf16, {device.key}. Assumed: {links.node_bytes_per_s / 1e9:.0f} GB/s "
        f"inside a node, {links.network_bytes_per_s / 1e9:.0f} GB/s between nodes, {1e6 * links.hop_s:.0f} us a hop, "
        f"{100 * links.hidden:.0f} % of the traffic hidden, {hbm_gib:.0f} GiB a GPU.",
    ]
    for name in MODELS:
        config = model_config(name)
        lines += [
            "",
            f"### {name}: {pretraining_parameters(config) / 1e6:.1f} M parameters, "
            f"{training_flops_per_image(config) / 1e9:.1f} GFLOP an image",
            "",
            "| GPUs | stage | micro-batch x accumulation | memory GiB | states GiB | sent GB | links ms | device ms "
            "| compute ms | step ms | device / step |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for gpus in GPUS:
            for stage in STAGES:
                made = row(config, gpus, stage, batch, device, links, hbm_gib)
                if made is None:
                    lines.append(f"| {gpus} | {stage} | does not fit | | | | | | | | |")
                    continue
                lines.append(
                    f"| {gpus} | {stage} | {made.micro_batch} x {made.accumulation} | {made.memory_gib:.1f} | "
                    f"{made.states_gib:.2f} | {made.sent_gb:.2f} | {made.link_ms:.1f} | {made.device_ms:.1f} | "
                    f"{made.compute_ms:.1f} | {made.step_ms:.1f} | {made.efficiency_percent:.1f} % |"
                )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--gpu", default="H100", help="a name that `mirl plan --gpu` knows")
    parser.add_argument("--hbm-gib", type=float, default=80.0)
    parser.add_argument("--network-gb-per-s", type=float, default=Links.network_bytes_per_s / 1e9)
    given = parser.parse_args()
    links = Links(network_bytes_per_s=1e9 * given.network_gb_per_s)
    print(tables(given.batch, device_named(given.gpu), links, given.hbm_gib))


if __name__ == "__main__":
    main()
