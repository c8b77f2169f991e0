"""Find the micro-batch that fits on the machine at hand, and on three machines that many people have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mirl.engine.accounting.memory import GIB
from mirl.engine.accounting.run_memory import Footprint, Placement, run_bytes

# A micro-batch of our choice may take this share of the free memory. On a CPU other programs need memory too, and a
# larger micro-batch is no faster there.
ROOM_ON_CPU, ROOM_ON_GPU = 0.6, 0.9


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A machine has one rank: its kind of device, the precision it computes in, and the bytes that are usually free."""

    name: str
    on_gpu: bool
    precision: str
    free: float


MACHINES = (
    Machine(name="CPU with 16 GB", on_gpu=False, precision="fp32", free=12 * GIB),
    Machine(name="GPU of 8 GB", on_gpu=True, precision="bf16", free=7.2 * GIB),
    Machine(name="GPU of 80 GB", on_gpu=True, precision="bf16", free=78 * GIB),
)


def micro_batches(share: int, group: int = 1) -> list[int]:
    """List the divisors of ``share``, a rank's images of a step, largest first: multiples of ``group``, if any."""
    divisors = [size for size in range(share, 0, -1) if share % size == 0]
    return [size for size in divisors if size % group == 0] or divisors


def largest_fitting(allowed: Sequence[int], need: Callable[[int], float], free: float, *, on_gpu: bool) -> int:
    """Return the first ``allowed`` micro-batch whose ``need`` in bytes leaves enough of ``free``, or else the last.

    If nothing fits a CPU's share of the memory, the larger share of a GPU is allowed there too.
    """
    for share in (ROOM_ON_GPU,) if on_gpu else (ROOM_ON_CPU, ROOM_ON_GPU):
        for size in allowed:
            if need(size) <= share * free:
                return size
    return allowed[-1]


def fit(machine: Machine, footprint: Footprint, share: int, zero_stage: int = 2) -> tuple[int, float]:
    """Return ``(micro_batch, bytes)`` of a step of ``share`` images on ``machine``; these may be more than it has."""
    place = Placement(zero_stage=zero_stage, ranks=1, precision=machine.precision, on_gpu=machine.on_gpu)

    def need(size: int) -> float:
        return run_bytes(footprint, place, size, share // size)

    micro = largest_fitting(micro_batches(share, footprint.group), need, machine.free, on_gpu=machine.on_gpu)
    return micro, need(micro)


def memory_by_machine(footprint_on: Callable[[Machine], Footprint], share: int) -> list[str]:
    """Say what a run takes on each of `MACHINES`, one text each: "CPU with 16 GB 6.3 GiB at micro-batch 64"."""
    texts = []
    for machine in MACHINES:
        micro, size = fit(machine, footprint_on(machine), share)
        fits = f"{size / GIB:.1f} GiB at micro-batch {micro}"
        texts.append(f"{machine.name} {fits if size <= machine.free else f'too small, {fits}'}")
    return texts
