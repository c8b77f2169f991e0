"""The attention kernels compiled for Hopper in bfloat16, without a GPU: what they spill, hold and issue.

A kernel takes at least as long as its bytes, and at least as long as each pipe of a multiprocessor is busy: the four
schedulers, the exponentials, the tensor cores. What that model leaves out is waiting: nothing of it was measured.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest

from tests.kernels import test_machine_code as shared
from tests.kernels.test_machine_code import B, HOPPER_MULTIPROCESSORS, bf16, compiled, fp32, launch

__all__ = ["compiled"]
pytestmark = [pytest.mark.compile, *shared.pytestmark]

CLOCK = 1.755e9
# Warp instructions a second of one pipe on the whole device: four schedulers of each multiprocessor, one a clock; sixteen
# lanes of it for exponentials. FLOP/s of the tensor cores in bfloat16.
ISSUED_PER_S = HOPPER_MULTIPROCESSORS * 4 * CLOCK
EXPONENTIALS_PER_S = HOPPER_MULTIPROCESSORS * 16 / 32 * CLOCK
TENSOR_PER_S = 989e12


@dataclass(frozen=True)
class Work:
    """One launch. turns: of its loop in each program, 0 without. units: tensors of [B, tokens, D] as (count, tokens)."""

    run: Any
    width: int
    units: tuple[tuple[int, int], ...]
    turns: int
    registers: int
    occupancy: float
    ratio: float

    @property
    def bytes(self) -> int:
        return sum(count * B * tokens * self.width * 2 for count, tokens in self.units)


def short(width: int, *, backward: bool) -> Any:
    packed = bf16(B, 50, 3 * width)
    if backward:
        return lambda: launch("short_attention", "_short_attention_backward", packed, bf16(B, 50, width), 12, packed.dtype)
    return lambda: launch("short_attention", "_short_attention", packed, None, 12)


def decoder(queries: int, keys: int, width: int, *, backward: bool, packed: bool = False) -> Any:
    heads = width // 32
    q = bf16(B, queries, 3 * width if packed else width)
    kv = None if packed else bf16(keys, B, 2 * width).transpose(0, 1)
    out = bf16(B, queries, width)
    if backward:
        tail = (out, fp32(B, heads, queries), out, heads)
        return lambda: launch("decoder_attention", "_decoder_attention_backward", q, kv, *tail)
    return lambda: launch("decoder_attention", "_decoder_attention", q, kv, heads)


def decoder_work(queries: int, keys: int, width: int, registers: int, occupancy: float, *, packed: bool = False) -> Any:
    """Forward and backward: tiles of 64 queries; tiles of 64 keys."""
    both = [decoder(queries, keys, width, backward=backward, packed=packed) for backward in (False, True)]
    forward = Work(both[0], width, ((2, queries), (2, keys)), -(-queries // 64), 168, 0.18, 1.3)
    backward = Work(both[1], width, ((4, queries), (4, keys)), -(-keys // 64), registers, occupancy, 1.3)
    return forward, backward


SELF, PACKED, MASKED, CROSS_50, CROSS_300, MASKED_300 = (
    decoder_work(197, 197, 512, 200, 0.12), decoder_work(197, 197, 384, 200, 0.12, packed=True),
    decoder_work(147, 197, 512, 224, 0.12), decoder_work(197, 50, 512, 200, 0.12),
    decoder_work(197, 300, 512, 200, 0.12), decoder_work(147, 300, 384, 224, 0.12),
)  # fmt: skip
WORKS = {
    "short, d 64": Work(short(768, backward=False), 768, ((4, 50),), 0, 96, 0.37, 1.0),
    "short backward, d 64": Work(short(768, backward=True), 768, ((7, 50),), 0, 128, 0.25, 1.0),
    "short, d 32": Work(short(384, backward=False), 384, ((4, 50),), 0, 80, 0.5, 1.0),
    "short backward, d 32": Work(short(384, backward=True), 384, ((7, 50),), 0, 112, 0.31, 1.0),
    "decoder 197 x 197": SELF[0], "decoder 197 x 197 backward": SELF[1],
    "decoder 197 x 197 packed": PACKED[0], "decoder 197 x 197 packed backward": PACKED[1],
    "decoder 147 x 197": MASKED[0], "decoder 147 x 197 backward": MASKED[1],
    "decoder 197 x 50": CROSS_50[0], "decoder 197 x 50 backward": CROSS_50[1],
    "decoder 197 x 300": CROSS_300[0], "decoder 197 x 300 backward": CROSS_300[1],
    "decoder 147 x 300": MASKED_300[0], "decoder 147 x 300 backward": MASKED_300[1],
}  # fmt: skip


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
        [shared.TOOLS / "cuobjdump", "-res-usage", tmp_path / "resources.cubin"], capture_output=True, text=True, check=True
    ).stdout
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
