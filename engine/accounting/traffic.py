"""Count the bytes that ZeRO sends in a step, and the time that they take beyond the computation that hides them.

One rank sends these bytes, for P parameters and R ranks, by ring collectives of (R - 1) / R each. Weights travel in
bf16 (2 bytes). Gradients travel in bf16, but in float32 if stages 1 and 2 add up several micro-batches before they
send:

| stage | collectives                                                  | bytes, times P (R - 1) / R           |
|-------|--------------------------------------------------------------|--------------------------------------|
| 1, 2  | reduction of gradients to their owners, all-gather of weights | 2 + 2, with micro-batches 4 + 2      |
| 3     | reduce-scatter, weights gathered in forward and backward pass | 2 + 2 x 2, all for every micro-batch |

A ring over nodes leaves each node once, so a node's network ports together carry what one rank sends. Each collective
of a ring takes R - 1 hops; gradients go in pieces of at most 2e8 values, the gathers of stage 3 in 5e7 (ds_configs/).
"""

from __future__ import annotations

from dataclasses import dataclass

NODE = 8
BUCKET, PREFETCH = 200_000_000, 50_000_000


@dataclass(frozen=True, kw_only=True)
class Links:
    """The figures of the links are assumptions, none of them measured.

    node_bytes_per_s: between GPUs of a node; two thirds of an H100's NVLink, 450 GB/s a direction. network_bytes_per_s:
    of a node; eight ports of 400 Gbit/s are 400 GB/s, four fifths of which are reached. hidden: the share of gradient
    and weight traffic behind computation.
    """

    node_bytes_per_s: float = 300e9
    network_bytes_per_s: float = 320e9
    hop_s: float = 4e-6
    hidden: float = 0.7


def sent_bytes(parameters: int, stage: int, ranks: int, accumulation: int) -> float:
    """Count the bytes that one rank sends in an optimiser step."""
    reduced = 2 * accumulation if stage == 3 else 2 if accumulation == 1 else 4
    gathered = 2 * 2 * accumulation if stage == 3 else 2
    return (reduced + gathered) * parameters * (ranks - 1) / ranks


def hops(parameters: int, stage: int, ranks: int, accumulation: int) -> float:
    """Count the steps of all rings, one after another."""
    buckets, prefetches = -(-parameters // BUCKET), -(-parameters // PREFETCH)
    reductions = buckets * (accumulation if stage == 3 else 1)
    gathers = 2 * accumulation * prefetches if stage == 3 else buckets
    return (reductions + gathers) * (ranks - 1)


def link_seconds(parameters: int, stage: int, ranks: int, accumulation: int, links: Links) -> float:
    """Count the seconds that the traffic of an optimiser step takes on the slowest link."""
    slowest = min(links.node_bytes_per_s, links.network_bytes_per_s if ranks > NODE else float("inf"))
    sent = sent_bytes(parameters, stage, ranks, accumulation)
    return sent / slowest + links.hop_s * hops(parameters, stage, ranks, accumulation)


def shown_seconds(link_s: float, compute_s: float, links: Links) -> float:
    """Return the part of ``link_s`` that adds to the step. The rest hides behind computation, ``compute_s`` at most."""
    return link_s - min(links.hidden * link_s, compute_s)
