"""Tell how much memory this process can still get, whatever bounds it: the machine, a container, a limit, a GPU."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

# Control groups write "no limit" as a number near 2**63.
_NO_LIMIT = 2**60
# From here on a run reserves address space that it never touches, mostly for stacks and heaps of threads: 1.4 GiB were
# measured on two cores (VmPeak less VmHWM, at the end and when a run asks).
RESERVED_ADDRESSES = 1.5 * 2**30


@dataclass(frozen=True, order=True)
class FreeMemory:
    """One rank may hold ``bytes`` in all, what it holds now included; ``bound`` names the limit, for a message."""

    bytes: float
    bound: str


def free_memory(device: torch.device, local_ranks: int) -> FreeMemory:
    """Tell the memory that a rank on ``device`` may hold, one of ``local_ranks`` on this host.

    On a CPU it is host memory, which the ranks of a host share.
    """
    return _free_on_gpu(device) if device.type == "cuda" else free_host_memory(local_ranks)


def free_host_memory(local_ranks: int = 1, *, of_limits: bool = True) -> FreeMemory:
    """Tell the least that the machine, the control groups or the limits of this process leave to each rank.

    of_limits: False leaves out the limits of the process. Past a limit an allocation fails; past the others the kernel
    ends a process.
    """
    held, machine = psutil.Process().memory_info().rss, psutil.virtual_memory()
    rooms = [_Room(machine.available, machine.total, "free on this machine"), *_of_control_groups()]
    limits = _of_limits(held) if of_limits else ()
    return min([*(room.of_a_rank(held, local_ranks) for room in rooms), *limits])


def peak_host_memory() -> int:
    """Return the most bytes of memory that this process held at a time.

    The kernel's ``ru_maxrss`` begins with what the parent held when it started this process (Linux, ``exec_mmap`` of
    fs/exec.c), gigabytes under a notebook or a test runner. ``VmHWM`` begins with the program.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # no Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1])


@dataclass(frozen=True)
class _Room:
    """The ranks of this host share memory: bytes ``left`` of ``limit``."""

    left: float
    limit: float
    bound: str

    def of_a_rank(self, held: int, ranks: int) -> FreeMemory:
        # Pages of libraries that a rank holds may be counted elsewhere, so left and held together can exceed the limit.
        return FreeMemory(min(held + max(0, self.left) / ranks, self.limit / ranks), self.bound)


def _free_on_gpu(device: torch.device) -> FreeMemory:
    free, _ = torch.cuda.mem_get_info(device)
    return FreeMemory(free + torch.cuda.memory_reserved(device), f"free on {torch.cuda.get_device_name(device)}")


def _of_limits(held: int) -> Iterator[FreeMemory]:
    """Yield what ``ulimit -v`` and ``ulimit -d`` leave to this process."""
    sizes = _sizes_of_process()
    for kind, flag, used, reserved in (
        (resource.RLIMIT_AS, "v", sizes.get("VmSize", 0), RESERVED_ADDRESSES),
        (resource.RLIMIT_DATA, "d", sizes.get("VmData", 0), 0),
    ):
        limit, _ = resource.getrlimit(kind)
        if limit != resource.RLIM_INFINITY:
            left = max(0, held + limit - used - reserved)
            yield FreeMemory(left, f"left by ulimit -{flag} {limit // 1024}")


def addresses_are_limited() -> bool:
    """Say whether ``ulimit -v`` or ``ulimit -d`` bounds this process."""
    limits = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    return any(limit != resource.RLIM_INFINITY for limit in limits)


@contextmanager
def bounded_by(free: FreeMemory) -> Iterator[None]:
    """Let allocations of this process fail past ``free``, in place of the kernel, which would end the process.

    A machine or a control group that runs out kills without an exception. Without /proc, which tells what is in use,
    nothing is bounded.
    """
    in_use, limits = _sizes_of_process().get("VmData"), resource.getrlimit(resource.RLIMIT_DATA)
    if in_use is None:
        yield
        return
    bound = int(in_use + max(0, free.bytes - psutil.Process().memory_info().rss))
    bound = min([bound, *(limit for limit in limits if limit != resource.RLIM_INFINITY)])
    resource.setrlimit(resource.RLIMIT_DATA, (bound, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)


def _sizes_of_process() -> dict[str, int]:
    """Return the sizes in /proc/self/status, in bytes; none if the file is missing."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return {}
    return {
        parts[0].rstrip(":"): int(parts[1]) * 1024
        for line in lines
        if line.startswith("Vm") and len(parts := line.split()) == 3
    }


# --- control groups


def _of_control_groups(proc: Path = Path("/proc/self")) -> Iterator[_Room]:
    """Yield the rest of the limit of each control group of this process, version 1 or 2, from its own upwards."""
    for folder, root, read in _folders(proc):
        while True:
            try:
                left = read(folder)
            except (OSError, ValueError, KeyError):
                left = None  # the root of a hierarchy has no such file
            if left is not None:
                yield left
            if folder == root or root not in folder.parents:
                break
            folder = folder.parent


def _folders(proc: Path) -> Iterator[tuple[Path, Path, Callable[[Path], _Room | None]]]:
    """Yield ``(folder of the process's group, mount point, reader)`` of each hierarchy that counts memory."""
    try:
        groups = [line.split(":", 2) for line in (proc / "cgroup").read_text().splitlines()]
        mounts = [line.split(" ") for line in (proc / "mountinfo").read_text().splitlines()]
    except OSError:
        return
    for fields in mounts:
        kind, options = fields[fields.index("-") + 1], fields[-1].split(",")
        if kind == "cgroup2":
            name, read = "", _left_of_version_2
        elif kind == "cgroup" and "memory" in options:
            name, read = "memory", _left_of_version_1
        else:
            continue
        root = Path(fields[4])
        for _, controllers, path in groups:
            if name in controllers.split(","):
                inside = os.path.relpath(path, fields[3])
                folder = root / inside if not inside.startswith("..") else root
                yield (folder if folder.is_dir() else root), root, read


def _left_of_version_2(folder: Path) -> _Room | None:
    text = (folder / "memory.max").read_text().strip()
    return None if text == "max" else _left(folder, int(text), int((folder / "memory.current").read_text()), "")


def _left_of_version_1(folder: Path) -> _Room | None:
    limit = int((folder / "memory.limit_in_bytes").read_text())
    if limit >= _NO_LIMIT:
        return None
    return _left(folder, limit, int((folder / "memory.usage_in_bytes").read_text()), "total_")


def _left(folder: Path, limit: int, used: int, prefix: str) -> _Room:
    """Return the rest of a group's limit, with the pages of files that count as used.

    The kernel drops these pages when a process needs the memory.
    """
    counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    files = sum(int(counts.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
    bound = f"free in control group {folder.name}, limited to {limit / 2**30:.1f} GiB"
    return _Room(limit - used + files, limit, bound)
