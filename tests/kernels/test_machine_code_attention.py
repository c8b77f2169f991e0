"""The attention kernels compiled for Hopper in bfloat16, without a GPU: what they spill, hold and issue.

A kernel takes at least as long as its bytes, and at least as long as each pipe of a multiprocessor is busy: the four
schedulers, the exponentials, the tensor cores. What that model leaves out is waiting: nothing of it was measured.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from mirl.engine.accounting.predict import OWN_INSTRUCTIONS
from tests.kernels import test_machine_code as shared
from tests.kernels.test_machine_code import HOPPER_MULTIPROCESSORS, B, bf16, compiled, fp32, launch

__all__ = ["compiled"]
pytestmark = shared.pytestmark

CLOCK = 1.755e9
# Warp instructions a second of a pipe on the whole device: four schedulers of each multiprocessor, one a clock; sixteen
# lanes for exponentials. FLOP/s of the tensor cores in bfloat16.
ISSUED_PER_S = HOPPER_MULTIPROCESSORS * 4 * CLOCK
EXPONENTIALS_PER_S = HOPPER_MULTIPROCESSORS * 16 / 32 * CLOCK
TENSOR_PER_S = 989e12


@dataclass(frozen=True)
class Work:
    """One launch. name: of its operator. bytes: that it moves at least. tiles: of 64 x 64 weights in each program.
    turns: of its loop, 0 without. registers, occupancy: the most, the least. ratio: the longest, in times of its bytes.
    """

    run: Callable[[], None]
    name: str
    size: int
    bytes: int
    tiles: int
    turns: int
    registers: int
    occupancy: float
    ratio: float


def short(width: int, backward: bool, registers: int, occupancy: float) -> Work:
    packed, size, name = bf16(B, 50, 3 * width), width // 12, "short_attention"
    if backward:
        name += "_backward"
        arguments: tuple[Any, ...] = (packed, bf16(B, 50, width), 12, packed.dtype)
    else:
        arguments = (packed, None, 12)
    return Work(
        lambda: launch("short_attention", f"_{name}", *arguments), name, size,
        (7 if backward else 4) * B * 50 * width * 2, 1, 0, registers, occupancy, 0.8,
    )  # fmt: skip


def decoder(queries: int, keys: int, backward: bool, registers: int, occupancy: float, *, packed: bool = False) -> Work:
    width, heads, name = 512, 16, "decoder_attention"
    q = bf16(B, queries, 3 * width if packed else width)
    kv = None if packed else bf16(keys, B, 2 * width).transpose(0, 1)
    down, across = -(-queries // 64), -(-keys // 64)
    arguments: tuple[Any, ...] = (q, kv, heads, None, None)
    if backward:
        name, out = name + "_backward", bf16(B, queries, width)
        arguments = (q, kv, out, fp32(B, heads, queries), out, heads, out.dtype)
    return Work(
        lambda: launch("decoder_attention", f"_{name}", *arguments), name, 32,
        (4 if backward else 2) * B * (queries + keys) * width * 2, down * across, across if backward else down,
        registers, occupancy, 1.3,
    )  # fmt: skip


# Two programs of four warps, or one of eight, hold the gradients of 192 or 256 queries.
WORKS = {
    "short, d 64": short(768, False, 96, 0.37),
    "short backward, d 64": short(768, True, 128, 0.25),
    "short backward, d 32": short(384, True, 112, 0.31),
    "decoder 197 x 197": decoder(197, 197, False, 168, 0.18),
    "decoder 197 x 197 backward, packed": decoder(197, 197, True, 200, 0.12, packed=True),
    # It makes the gradients of two biases too, and has 224 or 226 by the environment that compiles it. Registers are
    # given out in eights: up to 232 as many programs are resident as with 224.
    "decoder 147 x 197 backward": decoder(147, 197, True, 232, 0.12),
    "decoder 197 x 300": decoder(197, 300, False, 168, 0.18),
}


def busy(kernel: Any, folder: Any, turns: int) -> Counter[str]:
    """What a warp has issued by its end: instructions, exponentials, and multiply-adds of its warpgroup's products."""
    binary = folder / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    text = subprocess.run([shared.TOOLS / "nvdisasm", "-c", binary], capture_output=True, text=True, check=True).stdout
    listed: list[Counter[str]] = []
    labels, branches = {}, []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(listed)
        elif re.match(r"\s+/\*[0-9a-f]{4,5}\*/\s+\S", line) and "NOP" not in line:
            if branch := re.search(r"\bBRA\b.*?(\.L_x_\d+)", line):
                branches.append((len(listed), branch[1]))
            product = re.search(r"\bHGMMA\.(\d+)x(\d+)x(\d+)", line)
            assert "HMMA" not in line, "a product that is too small for a warpgroup"
            sizes = [int(size) for size in product.groups()] if product else [0]
            listed.append(
                Counter(issued=1, exponentials="MUFU" in line, multiplied=sizes[0] * sizes[-1] * (sizes[1:] or [0])[0])
            )
    spans = [(labels[target], last + 1) for last, target in branches if labels.get(target, last + 1) <= last]
    first, last = max((span for span in spans if span[1] - span[0] > 40), key=lambda s: s[1] - s[0], default=(0, 0))
    assert (last > first) == (turns > 0), "a loop of which the test does not know how often it turns"
    total: Counter[str] = Counter()
    for place, one in enumerate(listed):
        times = turns if first <= place < last else 1
        total.update({key: times * value for key, value in one.items()})
    return total


@pytest.mark.parametrize("name", WORKS)
def test_spills_nothing_and_takes_no_longer_than_allowed_for_its_bytes(name, compiled, tmp_path):  # noqa: F811
    work = WORKS[name]
    work.run()
    first = shared.launches[0]
    kernel, warps = first.kernel, first.warps
    registers, _ = shared.resources(kernel, tmp_path)
    usage = subprocess.run(
        [shared.TOOLS / "cuobjdump", "-res-usage", tmp_path / "resources.cubin"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert re.search(r"STACK:0 .*LOCAL:0", usage), f"{name} spills: {usage}"
    assert registers <= work.registers
    occupancy = shared.resident_programs(kernel, tmp_path) * warps / 64
    assert occupancy >= work.occupancy and first.programs >= HOPPER_MULTIPROCESSORS
    assembly = kernel.asm["ptx"]
    assert re.search(r"(ld\.global\S*\.v4\.b32|cp\.async\.cg\S* \[.*\], \[.*\], 0x10)", assembly)
    assert re.search(r"st\.global\S*\.v4\.b32", assembly)
    seen = busy(kernel, tmp_path, work.turns)
    floor = work.bytes / shared.BYTES_PER_S
    per_warp = {
        "issue": seen["issued"] / ISSUED_PER_S, "exponentials": seen["exponentials"] / EXPONENTIALS_PER_S,
        # A product is one of four warps.
        "tensor": 2 * seen["multiplied"] / 4 / TENSOR_PER_S,
    }  # fmt: skip
    ratios = {pipe: seconds * warps * first.programs / floor for pipe, seconds in per_warp.items()}
    told = ", ".join(f"{pipe} {ratio:.2f}" for pipe, ratio in ratios.items())
    print(f"{name}: floor {1e6 * floor:.0f} us; of it {told}; {registers} registers, occupancy {occupancy:.0%}")
    assert max(ratios.values()) <= work.ratio
    counted = seen["issued"] * warps / work.tiles
    assert counted == pytest.approx(OWN_INSTRUCTIONS[work.name][work.size], rel=0.25), (
        "mirl plan goes by another number"
    )
