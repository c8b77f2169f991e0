"""Where the time of a step goes: host against device, and by class of operation, from torch's profiler.

On a GPU every kernel has a device time of its own and a name. On a CPU the operators are the device: their own time,
without that of the operators they call, is device time, and the rest of the step (Python, dispatch) host time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from mirl.engine.accounting.profile_classes import CLASSES, classify, is_operator


def profile_step(step: Callable[[], Any], device: torch.device, steps: int = 2) -> dict[str, Any]:
    """``host_ms``, ``device_ms`` and ``breakdown_ms`` (class -> milliseconds) of one call of ``step``.

    host_ms, on a GPU: from the call to its return, with an empty queue: what Python needs to enqueue a step. If that
    exceeds device_ms, the GPU waits for Python.
    """
    on_gpu = device.type == "cuda"
    host_ms = _enqueue_ms(step, steps) if on_gpu else 0.0
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    started = time.perf_counter()
    with profile(activities=activities) as profiler:
        started = time.perf_counter()
        for _ in range(steps):
            step()
        if on_gpu:
            torch.cuda.synchronize()
        wall_ms = 1e3 * (time.perf_counter() - started) / steps
    by_class = dict.fromkeys(CLASSES, 0.0)
    for event in profiler.key_averages():
        if on_gpu:
            # Kernels only: an operator's row repeats the time of the kernels it launched.
            if event.device_type != torch.autograd.DeviceType.CUDA:
                continue
            microseconds = event.self_device_time_total
        else:
            microseconds = event.self_cpu_time_total if is_operator(event.key) else 0
        by_class[classify(event.key)] += microseconds / 1e3 / steps
    device_ms = sum(by_class.values())
    if not on_gpu:
        host_ms = max(0.0, wall_ms - device_ms)
    return {
        "host_ms": round(host_ms, 3),
        "device_ms": round(device_ms, 3),
        "breakdown_ms": {kind: round(value, 3) for kind, value in by_class.items()},
    }


def _enqueue_ms(step: Callable[[], Any], steps: int) -> float:
    times = []
    for _ in range(steps):
        torch.cuda.synchronize()
        started = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - started))
    torch.cuda.synchronize()
    return min(times)
