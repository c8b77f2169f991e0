"""`--profile N`: the trace is one that Perfetto reads, the table adds up, and nothing about it ends a run."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

import mirl
from mirl.engine.training.profiling import LEAD, StepProfile, by_class, table
from mirl.errors import UserError
from tests.support.runs import events

SMALL = {
    "warmup_steps": 1, "batch_size": 4, "precision": "fp32", "image_size": 32, "depth": 4, "width": 32, "heads": 2,
    "decoder_width": 32, "decoder_heads": 2, "pictures": 0, "tensorboard": False, "loader_threads": 1,
    "watchdog_minutes": 0.0,
}  # fmt: skip


class Log:
    is_main = True

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.events: list[tuple[int, dict]] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def event(self, kind: str, step: int, **details: object) -> None:
        assert kind == "profile"
        self.events.append((step, details))


def traced(out: Path, steps: int, *, first: int, total: int, ended: int | None = None) -> Log:
    """The log of a run from step ``first`` to ``total``, stopped after ``ended`` steps of one product each."""
    log = Log()
    profile = StepProfile(steps, out=out, log=log, device=torch.device("cpu"))  # type: ignore[arg-type]
    with profile.over(first, total):
        for _ in range(total - first if ended is None else ended):
            torch.ones(64, 64) @ torch.ones(64, 64)
            profile.step_ended()
    return log


def test_a_run_leaves_a_trace_of_its_steps_and_goes_on(photographs: Path, tmp_path: Path) -> None:
    steps = LEAD + 4
    out = mirl.pretrain(
        mirl.recipe("tiny", data=str(photographs), out=str(tmp_path / "run"), steps=steps, profile=2, **SMALL)
    )
    (event,) = events(out, "profile")
    assert (event["step"], event["steps"]) == (LEAD + 2, 2)
    trace = json.loads(gzip.decompress(Path(event["trace"]).read_bytes()))["traceEvents"]
    names = {item.get("name", "") for item in trace}
    assert {f"ProfilerStep#{LEAD}", f"ProfilerStep#{LEAD + 1}"} <= names
    assert {"aten::addmm", "MultiHeadAttention", "autograd::engine::evaluate_function: AddmmBackward0"} & names
    products = event["by_class"]["gemm"]
    assert products["host_ms"] > 0 and products["calls"] > 4 * 8  # four blocks and their decoders, forward and backward
    log = (out / "log.txt").read_text()
    assert f"  profile     2 steps from {LEAD + 1} on" in log and "    all operators " in log and "finished" in log


@pytest.mark.parametrize(
    ("asked", "first", "total", "ended", "from_step", "counted"),
    [
        (2, 10, 40, 12, 10 + LEAD + 1, 2),
        (2, 0, 3, None, 2, 2),  # a short run has a shorter lead
        (9, 0, 3, None, 1, 3),  # and no more steps than it has
        (6, 0, 40, LEAD + 3, LEAD + 1, 3),  # stopped on request in the middle
    ],
)
def test_which_steps_are_traced(asked, first, total, ended, from_step, counted, tmp_path: Path) -> None:
    log = traced(tmp_path, asked, first=first, total=total, ended=ended)
    ((step, details),) = log.events
    assert (step - details["steps"] + 1, details["steps"]) == (from_step, counted)
    assert details["by_class"]["gemm"]["calls"] == 1.0
    assert [path.name for path in (tmp_path / "profile").iterdir()] == [
        f"rank-00000-step-{from_step:08d}.trace.json.gz"
    ]


def test_without_it_nothing_is_traced(tmp_path: Path) -> None:
    log = traced(tmp_path, 0, first=0, total=3)
    assert not log.lines and not log.events and not list(tmp_path.iterdir())


def test_a_trace_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("in the way")
    log = traced(tmp_path, 1, first=0, total=2)
    assert log.lines[0].startswith("warning: the trace of 1 steps was not written: ") and not log.events


def test_the_table_adds_up() -> None:
    rows = {
        "gemm": {"calls": 2, "host_ms": 1.5, "device_ms": 0},
        "other": {"calls": 1, "host_ms": 0.25, "device_ms": 0},
    }
    assert [line.split() for line in table(rows)] == [
        ["class", "calls", "host", "ms"], ["gemm", "2.00", "1.50"], ["other", "1.00", "0.25"],
        ["all", "operators", "3.00", "1.75"],
    ]  # fmt: skip


def test_kernels_of_a_gpu_have_a_column_of_their_own() -> None:
    class Event:
        def __init__(self, key: str, device: str, microseconds: float, count: int) -> None:
            self.key, self.count = key, count
            self.device_type = getattr(torch.autograd.DeviceType, device)
            self.self_device_time_total = self.self_cpu_time_total = microseconds

    class Traced:
        def key_averages(self) -> list[Event]:
            return [
                Event("aten::mm", "CPU", 400, 4), Event("nvjet_hsh_128x256", "CUDA", 9000, 4),
                Event("autograd::engine::evaluate_function: MmBackward0", "CPU", 70, 4),
                Event("ncclDevKernel_ReduceScatter_Sum_bf16", "CUDA", 1000, 2),
            ]  # fmt: skip

    rows = by_class(Traced(), 2)  # type: ignore[arg-type]
    assert rows == {
        "gemm": {"calls": 2.0, "host_ms": 0.2, "device_ms": 4.5},
        "communication": {"calls": 0.0, "host_ms": 0.0, "device_ms": 0.5},
    }
    assert table(rows)[0].split() == ["class", "calls", "host", "ms", "device", "ms"]


def test_too_many_steps_are_refused() -> None:
    with pytest.raises(UserError, match="profile is 500: .* give 100 or fewer"):
        mirl.recipe("tiny", profile=500)
