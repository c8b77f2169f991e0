"""The tables of docs/scaling.md: memory, traffic and step time of many GPUs, computed, not measured.

    python -m benchmarks.scaling [--mfu 0.45] [--batch 4096] [--hbm-gib 80]

Counted: parameters, FLOPs and bytes of memory (engine/accounting/flops.py, engine/accounting/memory.py), bytes that
ZeRO sends. Assumed and printed with the tables: the GPU's peak, the utilisation that a step reaches, the speed of the
links, the share of the traffic that hides behind the backward pass.

Bytes that one rank sends in a step, P parameters, R ranks, ring collectives of (R - 1) / R each; weights travel in bf16
(2 bytes), gradients in bf16, but in float32 where stages 1 and 2 add up several micro-batches before they send:

| stage | collectives                                                  | bytes, times P (R - 1) / R           |
|-------|--------------------------------------------------------------|--------------------------------------|
| 1, 2  | reduction of gradients to their owners, all-gather of weights | 2 + 2, with micro-batches 4 + 2      |
| 3     | reduce-scatter, weights gathered in forward and backward pass | 2 + 2 x 2, all for every micro-batch |

A ring over nodes leaves each node once, so a node's network ports together carry what one rank sends. Each collective
of a ring takes R - 1 hops; gradients go in pieces of at most 2e8 values, the gathers of stage 3 in 5e7 (ds_configs/).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from mirl.engine.accounting.flops import pretraining_parameters, training_flops_per_image
from mirl.engine.accounting.memory import GIB, activation_bytes, state_bytes
from mirl.engine.models import ModelConfig, model_config

MODELS = ("vit_b_48", "vit_s_54")
GPUS = (8, 32, 256)
STAGES = (2, 3)  # stage 1 is as stage 2 (engine/distributed/flat_gradients.py)
NODE = 8
BUCKET, PREFETCH = 200_000_000, 50_000_000
OVERHEAD = 1.10  # kernels' work space and the allocator, on top of the counted bytes (engine/accounting/memory.py)
MICRO_BATCHES = (512, 256, 128, 64, 32, 16, 8)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What is assumed of the machine, none of it measured."""

    peak_flops: float = 989e12  # H100 SXM, dense bf16, data sheet
    mfu: float = 0.45
    node_bytes_per_s: float = 300e9  # NVLink of an H100: 450 GB/s a direction, two thirds reached
    network_bytes_per_s: float = 320e9  # of a node: eight ports of 400 Gbit/s = 50 GB/s, four fifths reached
    hop_s: float = 4e-6
    hidden: float = 0.7  # share of gradient and weight traffic behind computation
    hbm_gib: float = 80.0


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
    compute_ms: float
    link_ms: float
    step_ms: float

    @property
    def efficiency_percent(self) -> float:
        return 100 * self.compute_ms / self.step_ms


def sent_bytes(parameters: int, stage: int, ranks: int, accumulation: int) -> float:
    """Bytes that one rank sends in an optimiser step."""
    reduced = 2 * accumulation if stage == 3 else 2 if accumulation == 1 else 4
    gathered = 2 * 2 * accumulation if stage == 3 else 2
    return (reduced + gathered) * parameters * (ranks - 1) / ranks


def hops(parameters: int, stage: int, ranks: int, accumulation: int) -> float:
    """Steps of all rings, one after another."""
    buckets, prefetches = -(-parameters // BUCKET), -(-parameters // PREFETCH)
    reductions = buckets * (accumulation if stage == 3 else 1)
    gathers = 2 * accumulation * prefetches if stage == 3 else buckets
    return (reductions + gathers) * (ranks - 1)


def micro_batch_that_fits(config: ModelConfig, stage: int, ranks: int, share: int, hbm_gib: float) -> int | None:
    """The largest micro-batch that divides ``share`` images of a rank and fits; None if none does."""
    for micro in MICRO_BATCHES:
        if micro <= share and share % micro == 0:
            states = state_bytes(config, stage, ranks, accumulation=share // micro)
            needed = OVERHEAD * (states + activation_bytes(config, micro)) / GIB
            if needed <= 0.92 * hbm_gib:  # CUDA's context and NCCL's buffers take some GiB
                return micro
    return None


def row(config: ModelConfig, gpus: int, stage: int, batch: int, cluster: Cluster) -> Row | None:
    share = batch // gpus
    micro = micro_batch_that_fits(config, stage, gpus, share, cluster.hbm_gib)
    if micro is None:
        return None
    accumulation = share // micro
    sent = sent_bytes(pretraining_parameters(config), stage, gpus, accumulation)
    compute_s = share * training_flops_per_image(config) / (cluster.peak_flops * cluster.mfu)
    slowest = min(cluster.node_bytes_per_s, cluster.network_bytes_per_s if gpus > NODE else float("inf"))
    link_s = sent / slowest + cluster.hop_s * hops(pretraining_parameters(config), stage, gpus, accumulation)
    # Traffic hides behind computation, but never more than there is computation to hide behind.
    shown_s = link_s - min(cluster.hidden * link_s, compute_s)
    states = state_bytes(config, stage, gpus, accumulation=accumulation)
    return Row(
        model=config.name, gpus=gpus, stage=stage, micro_batch=micro, accumulation=accumulation,
        memory_gib=OVERHEAD * (states + activation_bytes(config, micro)) / GIB, states_gib=states / GIB,
        sent_gb=sent / 1e9, compute_ms=1e3 * compute_s, link_ms=1e3 * link_s, step_ms=1e3 * (compute_s + shown_s),
    )  # fmt: skip


def tables(batch: int, cluster: Cluster) -> str:
    lines = [
        f"Effective batch {batch}, 224 px, bf16. Assumed: peak {cluster.peak_flops / 1e12:.0f} TFLOP/s, utilisation "
        f"{100 * cluster.mfu:.0f} %, {cluster.node_bytes_per_s / 1e9:.0f} GB/s inside a node, "
        f"{cluster.network_bytes_per_s / 1e9:.0f} GB/s between nodes, {1e6 * cluster.hop_s:.0f} us a hop, "
        f"{100 * cluster.hidden:.0f} % of the traffic hidden, {cluster.hbm_gib:.0f} GiB a GPU.",
    ]
    for name in MODELS:
        config = model_config(name)
        lines += [
            "",
            f"### {name}: {pretraining_parameters(config) / 1e6:.1f} M parameters, "
            f"{training_flops_per_image(config) / 1e9:.1f} GFLOP an image",
            "",
            "| GPUs | stage | micro-batch x accumulation | memory GiB | states GiB | sent GB | links ms | compute ms "
            "| step ms | compute / step |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for gpus in GPUS:
            for stage in STAGES:
                made = row(config, gpus, stage, batch, cluster)
                if made is None:
                    lines.append(f"| {gpus} | {stage} | does not fit | | | | | | | |")
                    continue
                lines.append(
                    f"| {gpus} | {stage} | {made.micro_batch} x {made.accumulation} | {made.memory_gib:.1f} | "
                    f"{made.states_gib:.2f} | {made.sent_gb:.2f} | {made.link_ms:.1f} | "
                    f"{made.compute_ms:.0f} | {made.step_ms:.0f} | {made.efficiency_percent:.1f} % |"
                )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--mfu", type=float, default=Cluster.mfu)
    parser.add_argument("--hbm-gib", type=float, default=Cluster.hbm_gib)
    parser.add_argument("--network-gb-per-s", type=float, default=Cluster.network_bytes_per_s / 1e9)
    given = parser.parse_args()
    cluster = Cluster(mfu=given.mfu, hbm_gib=given.hbm_gib, network_bytes_per_s=1e9 * given.network_gb_per_s)
    print(tables(given.batch, cluster))


if __name__ == "__main__":
    main()
