"""Predict how long a listed step takes on a GPU, by a roofline with the costs of launches. Nothing here is measured.

An operator takes as long as its bytes at the reachable bandwidth or its FLOPs at the reachable rate, whichever is more,
and never less than a launch. Products fill the multiprocessors in waves of whole tiles, attention in tiles of 128 rows,
so that small ones reach less. Our own attention kernels take as long as the instructions that they issue. The host
launches while the device computes: a step is as long as the longer of the two.

The shares and costs below are assumptions, alike for every device. A run on a GPU prints the measured figures beside
the predicted ones, by which the assumptions are put right.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from mirl.engine.accounting.devices import Device
from mirl.engine.accounting.operators import CLASSES, OWN_ATTENTION, Operator

# A large product reaches this share of the data sheet's peak (about 800 TFLOP/s of an H100), a copy this share of the
# bandwidth.
GEMM_SHARE, COPY_SHARE = 0.81, 0.90
# FlashAttention reaches these shares of the data sheet's peak inside a tile, forward and backward.
ATTENTION_SHARE, ATTENTION_BACKWARD_SHARE = 0.35, 0.30
# A kernel takes at least this long on the device, and each launch adds this much to its work.
LEAST_S, LAUNCH_S = 4e-6, 1.5e-6
# Python, dispatcher and autograd take so long for one operator, forward and backward: 40 to 60 ms for 2,500 operators.
HOST_S = 18e-6
# Rows and columns of a product's tiles, and the share of the best tile's rate that each reaches.
TILES = (
    (128, 256, 1.0), (256, 128, 1.0), (128, 192, 0.97), (192, 128, 0.97), (128, 128, 0.9), (64, 256, 0.85),
    (128, 64, 0.7),
)  # fmt: skip
SPLITS = (1, 2, 3, 4, 6, 8)  # the inner size is split among so many programs
LEAST_INNER = 512
TILE_S = 0.8e-6  # prologue and epilogue of a tile
# FlashAttention: the rows of a tile and of a turn of the backward pass; the time of a turn and of a program's start.
ATTENTION_ROWS, BACKWARD_TURN_ROWS = 128, 64
TURN_S, START_S, BACKWARD_START_S = 1.2e-6, 3.0e-6, 3.5e-6
# Our attention kernels: warp instructions for each 64 x 64 tile of weights, by head size, counted in their machine code
# for sm_90 (tests/kernels/test_machine_code_attention.py); the instructions that the schedulers of a multiprocessor
# issue in a second; the share of these that a kernel reaches, as it waits for exponentials, products and memory, too.
OWN_TILE = 64
OWN_INSTRUCTIONS = {
    "short_attention": {32: 1900, 64: 2450}, "short_attention_backward": {32: 5000, 64: 7050},
    "decoder_attention": {32: 1200}, "decoder_attention_backward": {32: 2050},
}  # fmt: skip
ISSUED_PER_S, OWN_SHARE = 4 * 1.7e9, 0.5


def seconds(operator: Operator, device: Device) -> float:
    """Predict the device time of one call of ``operator``, its further launches included."""
    moved = operator.bytes / (COPY_SHARE * device.bandwidth)
    if operator.kind == "gemm" and operator.shape:
        return max(_product_seconds(*operator.shape, device) + LAUNCH_S, moved, LEAST_S)
    if operator.name in OWN_ATTENTION:
        return _own_attention_seconds(operator, device)
    if operator.kind == "attention":
        return _attention_seconds(operator, device)
    return max(LEAST_S, LAUNCH_S + moved) + (operator.launches - 1) * LEAST_S


@lru_cache(maxsize=4096)
def _product_seconds(rows: int, columns: int, inner: int, device: Device) -> float:
    """Predict a product by its best tile and split of the inner size: waves of tiles, the last of them partly idle."""
    rate = GEMM_SHARE * device.peak_flops / device.multiprocessors
    best = math.inf
    for tile_rows, tile_columns, share in TILES:
        tiles = math.ceil(rows / tile_rows) * math.ceil(columns / tile_columns)
        for split in SPLITS:
            if split > 1 and inner // split < LEAST_INNER:
                break
            waves = math.ceil(tiles * split / device.multiprocessors)
            tile_s = 2 * tile_rows * tile_columns * inner / split / (rate * share) + TILE_S
            # Partial results in float32 are written and read again by a second kernel.
            again = 0.0 if split == 1 else split * rows * columns * 8 / (COPY_SHARE * device.bandwidth) + LAUNCH_S
            best = min(best, waves * tile_s + again)
    return best


def _attention_seconds(operator: Operator, device: Device) -> float:
    """Predict FlashAttention with tiles of 128 rows, which short sequences fill badly.

    Its backward pass adds the gradient of q up in float32, padded to whole tiles: the sum is cleared, added to,
    converted.
    """
    batch, heads, queries, keys, size = operator.shape
    backward = operator.launches > 1
    moved, width = operator.bytes, max(size, 32)
    if backward:
        programs = batch * heads * math.ceil(keys / ATTENTION_ROWS)
        turns = math.ceil(queries / BACKWARD_TURN_ROWS)
        work = programs * turns * 10 * BACKWARD_TURN_ROWS * ATTENTION_ROWS * width
        share, start, resident = ATTENTION_BACKWARD_SHARE, BACKWARD_START_S, 1
        moved += 3 * 4 * batch * heads * math.ceil(queries / ATTENTION_ROWS) * ATTENTION_ROWS * size
    else:
        programs = batch * heads * math.ceil(queries / ATTENTION_ROWS)
        turns = math.ceil(keys / ATTENTION_ROWS)
        work = programs * turns * 4 * ATTENTION_ROWS**2 * width
        share, start, resident = ATTENTION_SHARE, START_S, 2
    waves = math.ceil(programs / (resident * device.multiprocessors))
    busy = max(
        moved / (COPY_SHARE * device.bandwidth), work / (share * device.peak_flops), waves * (start + turns * TURN_S)
    )
    return busy + operator.launches * LAUNCH_S


def _own_attention_seconds(operator: Operator, device: Device) -> float:
    """Predict our attention: each tensor goes once through memory, or the instructions take longer."""
    batch, heads, queries, keys, size = operator.shape
    tiles = batch * heads * math.ceil(queries / OWN_TILE) * math.ceil(keys / OWN_TILE)
    issued = tiles * OWN_INSTRUCTIONS[operator.name][size]
    busy = issued / (OWN_SHARE * ISSUED_PER_S * device.multiprocessors)
    moved = operator.bytes / (COPY_SHARE * device.bandwidth)
    return max(LEAST_S, LAUNCH_S + max(moved, busy)) + (operator.launches - 1) * LEAST_S


@dataclass(frozen=True)
class Times:
    """The fields are times and costs of one optimiser step on one GPU.

    ``shares``: of each class of operators in the device's time, sum 1. ``optimiser_bytes``: the part of ``bytes`` that
    comes after the backward passes.
    """

    device_s: float
    host_s: float
    launches: int
    bytes: float
    optimiser_bytes: float
    shares: Mapping[str, float]

    @property
    def compute_s(self) -> float:
        return max(self.device_s, self.host_s)


def times(operators: Counter[Operator], device: Device, *, accumulation: int = 1, step: Counter[Operator]) -> Times:
    """Add up ``operators`` of a forward and backward pass ``accumulation`` times, and those of ``step`` once."""
    everything = Counter({operator: count * accumulation for operator, count in operators.items()}) + step
    by_class: dict[str, float] = dict.fromkeys(CLASSES, 0.0)
    for operator, count in everything.items():
        by_class[operator.kind] += count * seconds(operator, device)
    total = sum(by_class.values())
    return Times(
        device_s=total,
        host_s=HOST_S * sum(everything.values()),
        launches=sum(count * operator.launches for operator, count in everything.items()),
        bytes=sum(count * operator.bytes for operator, count in everything.items()),
        optimiser_bytes=sum(count * operator.bytes for operator, count in step.items()),
        shares={kind: part / total for kind, part in by_class.items()},
    )
