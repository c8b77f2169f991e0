"""Timing of one function over inputs that are too many for the cache, through pytest-benchmark.

On a GPU a round is the replay of a CUDA graph of many calls, so launch gaps and Python do not count; on a CPU a loop.
Every call takes the next of several input sets, together more than twice the last-level cache, and keeps its outputs as
long as that set rests, so that neither reads nor writes find their lines in the cache.
"""

import importlib.metadata
import platform
import subprocess
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CHECKOUT = Path(__file__).resolve().parents[1]
CPU_CACHE_BYTES = 32 << 20  # of one core's reach; a server's whole last-level cache is shared by many
ROUND_BYTES = {"cuda": 10 << 30, "cpu": 64 << 20}  # about 3 ms of an H100, 20 ms of a core
GPU_ROUNDS, CPU_ROUNDS = 30, 7
MOST_SETS, MOST_CALLS = 64, 256


@dataclass(frozen=True)
class Timing:
    """Median over rounds of the time of one call, and the interquartile range relative to it."""

    ms: float
    spread_percent: float


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def cache_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).L2_cache_size
    return CPU_CACHE_BYTES


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`value` with `function` applied to every tensor in its lists and tuples."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(item, function) for item in value)
    return value


def tensor_bytes(value: Any) -> int:
    sizes: list[int] = []
    map_tensors(value, lambda tensor: sizes.append(tensor.nbytes) or tensor)
    return sum(sizes)


def rotated(arguments: Sequence[Any]) -> list[Sequence[Any]]:
    """The argument set and as many copies as exceed the cache twice."""
    copies = min(MOST_SETS, max(2, 1 + 2 * cache_bytes() // max(1, tensor_bytes(arguments))))

    def copy(tensor: Tensor) -> Tensor:
        return tensor.detach().clone().requires_grad_(tensor.requires_grad)

    return [arguments, *(map_tensors(arguments, copy) for _ in range(copies - 1))]


def time_calls(benchmark: Any, function: Callable[..., Any], sets: list[Sequence[Any]], moved: int) -> Timing:
    """Median time of `function(*arguments)`; `benchmark` is pytest-benchmark's fixture and keeps its own statistics.

    The number of calls in a round follows from the `moved` bytes alone, so that pytest-benchmark's table compares like
    with like: its times are of one call on a CPU, of one graph (the same number of calls in a group) on a GPU.
    """
    on_gpu = device().type == "cuda"
    calls = max(1, min(MOST_CALLS, round(ROUND_BYTES[device().type] / moved)))
    kept: deque[Any] = deque(maxlen=len(sets))
    for arguments in sets[:2]:  # compiles, allocates, warms up
        kept.append(function(*arguments))
    if on_gpu:
        graph = _capture(function, sets, calls, kept)

        def one_round() -> None:
            graph.replay()
            torch.cuda.synchronize()

        benchmark.pedantic(one_round, rounds=GPU_ROUNDS, warmup_rounds=2, iterations=1)
    else:
        position = count()

        def one_call() -> None:
            kept.append(function(*sets[next(position) % len(sets)]))

        benchmark.pedantic(one_call, rounds=CPU_ROUNDS, warmup_rounds=1, iterations=calls)
    stats = benchmark.stats.stats
    per_call = 1e3 / calls if on_gpu else 1e3  # pytest-benchmark divides by its iterations
    return Timing(ms=per_call * stats.median, spread_percent=100 * stats.iqr / stats.median)


def _capture(
    function: Callable[..., Any], sets: list[Sequence[Any]], calls: int, kept: deque[Any]
) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for arguments in sets[:3]:
            kept.append(function(*arguments))
    torch.cuda.current_stream().wait_stream(side)
    kept.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in range(calls):
            kept.append(function(*sets[call % len(sets)]))
    return graph


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    cpuinfo = Path("/proc/cpuinfo")
    names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "xformers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    if torch.cuda.is_available():
        found["cuda"] = str(torch.version.cuda)
    return found


def commit() -> str:
    """The checkout's commit, with "-dirty" when tracked files differ from it; "unknown" outside a git checkout."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=CHECKOUT, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    head = git("rev-parse", "HEAD")
    if not head:
        return "unknown"
    return head + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
