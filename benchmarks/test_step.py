"""Training steps under `pytest benchmarks/`: the cases of the design on a GPU, a small model on a CPU.

`python -m benchmarks.bench_step` takes the same measurements with more choice.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.bench_memory import activations
from benchmarks.bench_step import StepCase, find_peak, measure_case
from benchmarks.contestants import NAMES
from benchmarks.measure import device
from mirl.engine.models import ModelConfig, model_config

PLACE = device()
ON_GPU = PLACE.type == "cuda"
# On a CPU a sixth of a ViT-S: it shows that all contestants run and agree. Compiling takes a minute there and is left
# out; figures of a CPU come from bench_step.py.
SMALL = {"depth": 4, "width": 192, "heads": 6, "decoder_width": 128, "decoder_heads": 4}
WITHOUT_COMPILER = tuple(name for name in NAMES if name not in ("compile", "ours_compiled"))


def cases() -> list[StepCase]:
    if ON_GPU:
        return [
            StepCase(config=model_config(name, variant=variant), batch=64, precision="bf16")
            for name in ("vit_b", "vit_b_24", "vit_s_54", "vit_b_48")
            for variant in ("paper", "release")
        ] + [StepCase(config=model_config("vit_b", objective="mae"), batch=64, precision="bf16")]
    configs: list[ModelConfig] = [
        model_config("vit_s", **SMALL),
        model_config("vit_s", **SMALL, variant="release"),
        model_config("vit_s", **SMALL, objective="mae", decoder_depth=2),
    ]
    return [
        StepCase(config=c, batch=4, precision="fp32", contestants=WITHOUT_COMPILER, rounds=3, warmup=1) for c in configs
    ]


@pytest.mark.parametrize("case", cases(), ids=lambda case: f"{case.name} batch {case.batch}".replace(" ", "_"))
def test_step(results, case: StepCase) -> None:
    torch._dynamo.reset()
    row = measure_case(case, PLACE, find_peak(PLACE, case.precision))
    assert set(row["all"]) | set(row["left_out"]) == set(case.contestants)
    assert row["images_per_s"] > 0 and row["device_ms"] > 0
    # What no class knows: a new kernel has to be given one in engine/accounting/profile_classes.py.
    assert row["breakdown_ms"]["other"] < 0.15 * row["device_ms"]
    results.add_step(row)


def test_recomputing_saves_memory(results) -> None:
    config = model_config("vit_b") if ON_GPU else model_config("vit_s", **SMALL, attention="sdpa")
    rows = [row for recompute in (False, True) for row in activations(config, [1, 3], recompute, PLACE)]
    for row in rows:
        results.add_memory(row)
    assert rows[3]["activations_gib"] < 0.8 * rows[1]["activations_gib"]
