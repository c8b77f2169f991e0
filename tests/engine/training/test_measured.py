"""Measured beside predicted: the line that a run on a GPU closes with. The GPU is a stand-in, the run is real."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mirl
from mirl.engine.accounting.devices import device_named
from mirl.engine.configuration.config import RunConfig
from mirl.engine.training import measured
from mirl.engine.training.computing import bare_model
from mirl.engine.training.measured import Measured, compare_with_prediction
from tests.engine.models.helpers import tiny_config
from tests.support.runs import events, records

LINES = [{"step_ms": 90.0, "images_per_s": 1.0, "memory_gib": 9.0}] + [
    {"step_ms": ms, "images_per_s": 1000.0 / ms, "memory_gib": 3.0} for ms in (30.0, 10.0, 20.0)
]


class Log:
    def __init__(self) -> None:
        self.events: list[tuple[str, int, dict[str, Any]]] = []

    def event(self, kind: str, step: int, **details: Any) -> None:
        self.events.append((kind, step, details))


def plan_of(**changes: Any) -> Any:
    ranks = SimpleNamespace(device=torch.device("cuda", 0), is_main=True, world_size=2)
    values = {
        "ranks": ranks, "micro_batch": 4, "accumulation": 1, "precision": "bf16",
        "ds_config": {"zero_optimization": {"stage": 2}},
    }  # fmt: skip
    return SimpleNamespace(**(values | changes))


@pytest.fixture
def on_h100(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")


def compare(plan: Any, lines: list[dict[str, float]] = LINES, build: Any = None) -> tuple[list[str], Log]:
    log = Log()
    build = build or partial(bare_model, tiny_config(), RunConfig())
    return compare_with_prediction(plan, build, Measured(list(lines)), log, 40), log


def test_the_line_has_both_and_their_ratio(on_h100):
    (line,), log = compare(plan_of())
    ((kind, step, details),) = log.events
    assert (kind, step, details["gpu"]) == ("prediction", 40, "H100")
    # Medians of all lines but the first.
    assert details["measured"] == {"step_ms": 20.0, "images_per_s": 50.0, "memory_gib": 3.0}
    predicted = details["predicted"]["step_ms"]
    assert predicted > 0 and details["predicted"]["images_per_s"] == pytest.approx(8 / predicted * 1e3)
    assert line.startswith("  measured    step 20.0 ms, 50 images/s; predicted for 2 x H100: ")
    assert line.endswith(f"measured / predicted {20 / predicted:.2f}")


@pytest.mark.parametrize(
    "changes, lines",
    [
        ({"precision": "fp32"}, LINES),
        ({}, LINES[:1]),
        ({"ranks": SimpleNamespace(device=torch.device("cpu"), is_main=True, world_size=1)}, LINES),
        ({"ranks": SimpleNamespace(device=torch.device("cuda", 0), is_main=False, world_size=2)}, LINES),
    ],
)
def test_there_is_none_where_nothing_can_be_compared(changes, lines, on_h100):
    said, log = compare(plan_of(**changes), lines)
    assert said == [] and log.events == []


def test_an_unknown_gpu_and_a_kind_without_a_model_have_none(monkeypatch, on_h100):
    assert compare_with_prediction(plan_of(), None, Measured(list(LINES)), Log(), 40) == []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Something Else")
    assert compare(plan_of())[0] == []


def test_a_prediction_that_fails_is_said_and_ends_nothing(on_h100):
    def build():
        raise RuntimeError("no such thing\nand more")

    said, log = compare(plan_of(), build=build)
    assert said == ["  predicted   not to be had: RuntimeError: no such thing"] and log.events == []


def test_a_run_closes_with_it(monkeypatch, photographs: Path, tmp_path: Path):
    monkeypatch.setattr(measured, "device_of", lambda plan: device_named("H100"))
    config = mirl.recipe(
        "tiny", data=str(photographs), out=str(tmp_path / "run"), steps=3, warmup_steps=1, batch_size=4,
        precision="bf16",
        image_size=32, depth=4, width=32, heads=2, decoder_width=32, decoder_heads=2, log_every=1, pictures=0,
        tensorboard=False, loader_threads=1, watchdog_minutes=0.0,
    )  # fmt: skip
    out = mirl.pretrain(config)
    (event,) = events(out, "prediction")
    assert event["step"] == 3 and event["predicted"]["step_ms"] > 0
    speeds = sorted(record["step_ms"] for record in records(out) if "step_ms" in record and record["step"] > 1)
    assert event["measured"]["step_ms"] == pytest.approx(sum(speeds) / 2)
    lines = (out / "log.txt").read_text().splitlines()
    (line,) = [line for line in lines if "predicted for 1 x H100" in line]
    assert line.startswith("  measured    step ") and lines.index(line) > lines.index(f"finished: {out}")
