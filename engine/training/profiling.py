"""`--profile N`: a trace of N steps for Perfetto, and a table of where their time went."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from mirl.engine.accounting.profile_classes import CLASSES, classify, is_operator
from mirl.engine.training.run_log import RunLog

# Steps of a start that are not traced, where the run is long enough: the first ones compile, allocate and fill queues.
LEAD = 4
FOLDER = "profile"


class StepProfile:
    """Traces ``steps`` steps of rank 0 of this start; 0 traces none and costs nothing.

    The trace is a gzipped JSON file in ``out``/profile, which https://ui.perfetto.dev opens. The table is written to
    the log and, as an event, to metrics.jsonl. A trace that cannot be made or written is said, and ends nothing.
    """

    def __init__(self, steps: int, *, out: Path, log: RunLog, device: torch.device) -> None:
        self.steps, self.folder, self.log, self.device = steps, out / FOLDER, log, device
        self._profile: profile | None = None
        self._first = self._traced = 0

    @contextmanager
    def over(self, first_step: int, total_steps: int) -> Iterator[None]:
        """While entered, `step_ended` counts steps from ``first_step`` on; a trace is written once it is whole."""
        steps = min(self.steps, total_steps - first_step)
        if steps <= 0 or not self.log.is_main:
            yield
            return
        lead = min(LEAD, total_steps - first_step - steps)
        self._first, self._traced = first_step + lead, -lead
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # of a machine without a GPU it tells as an error
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.device.type == "cuda" else [])]
        warmup = min(1, lead)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that a run too short to warm up has no warm-up
            plan = schedule(wait=lead - warmup, warmup=warmup, active=steps, repeat=1)
        self._profile = profile(activities=activities, schedule=plan, on_trace_ready=self._write)
        with self._profile:
            yield
        self._profile = None

    def step_ended(self) -> None:
        """A step and what follows it (log, pictures, checkpoints) is over."""
        if self._profile is not None:
            self._traced += 1
            self._profile.step()

    def _write(self, traced: profile) -> None:
        steps = max(1, self._traced)  # fewer than asked for where the run was stopped
        path = self.folder / f"rank-00000-step-{self._first + 1:08d}.trace.json.gz"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            traced.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:
            self.log.say(f"warning: the trace of {steps} steps was not written: {error}")
            return
        rows = by_class(traced, steps)
        self.log.say(f"  profile     {steps} steps from {self._first + 1} on, milliseconds of a step; {path}")
        for line in table(rows):
            self.log.say(line)
        self.log.event("profile", self._first + steps, trace=str(path), steps=steps, by_class=rows)


def by_class(traced: profile, steps: int) -> dict[str, dict[str, float]]:
    """Calls, host_ms and device_ms of a step, of each class of operators that occurs, the most time first.

    host_ms: the time of the operators' own work on the host, on a CPU what they compute. device_ms: of the kernels of a
    GPU, by their own names, so that a class may have kernels and no operators.
    """
    calls, host, device = Counter(), Counter(), Counter()
    for event in traced.key_averages():
        kind = classify(event.key)
        if event.device_type == torch.autograd.DeviceType.CUDA:
            device[kind] += event.self_device_time_total
        elif is_operator(event.key):
            host[kind] += event.self_cpu_time_total
            calls[kind] += event.count
    present = [kind for kind in CLASSES if host[kind] or device[kind]]
    present.sort(key=lambda kind: (-device[kind], -host[kind]))
    return {
        kind: {
            "calls": round(calls[kind] / steps, 1),
            "host_ms": round(host[kind] / 1e3 / steps, 3),
            "device_ms": round(device[kind] / 1e3 / steps, 3),
        }
        for kind in present
    }


def table(rows: dict[str, dict[str, Any]]) -> list[str]:
    """The rows of `by_class` as lines of text, with their sum; without the device's column where there is no device."""
    total = {name: sum(row[name] for row in rows.values()) for name in ("calls", "host_ms", "device_ms")}
    names = [name for name in total if total[name] or name != "device_ms"]
    lines = ["    " + "class".ljust(18) + "".join(name.replace("_", " ").rjust(12) for name in names)]
    for kind, row in [*rows.items(), ("all operators", total)]:
        lines.append("    " + kind.ljust(18) + "".join(f"{row[name]:>12.2f}" for name in names))
    return lines
