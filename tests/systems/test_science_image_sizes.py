"""The experiment on growing images: equal FLOPs, a model that ends at the whole size, a table that compares pairs."""

from __future__ import annotations

import pytest
import torch

from benchmarks.science import image_sizes as science
from mirl.engine.accounting.flops import training_flops_per_image
from mirl.engine.models import ExactSkips
from mirl.engine.training.image_sizes import StepSizes


def test_every_arm_has_the_same_flops_and_growing_images_more_of_them():
    of_one = training_flops_per_image(science.MODEL, ExactSkips())
    for budget in (0.5, 2.0):
        runs = {arm: science.run_of(*settings, budget) for arm, settings in science.ARMS.items()}
        for config in runs.values():
            flops = science.BATCH * StepSizes.of(config, config.optim.steps).cost_between(0, config.optim.steps)
            assert flops == pytest.approx(budget * science.WHOLE_IMAGES, rel=0.01) and of_one > 0
        growing, plain = runs["growing, AdamW"].optim, runs[science.PLAIN].optim
        assert growing.steps > 1.5 * plain.steps and growing.warmup_steps == growing.steps // 10


def test_a_unit_trains_at_every_size_and_is_measured_at_the_whole_one(monkeypatch):
    monkeypatch.setattr(science, "WHOLE_IMAGES", 16)
    monkeypatch.setattr(science, "BATCH", 4)
    monkeypatch.setattr(science, "FITTED", 20)
    monkeypatch.setattr(science, "MEASURED", 10)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (20, 28, 28, 1), generator=generator, dtype=torch.uint8)
    data = {split: (images, torch.arange(20) % 10) for split in ("train", "test")}
    config = science.run_of(science.SIZES, "adamw", 1.5)
    seen = []
    monkeypatch.setattr(science, "mask_noise", lambda *key: seen.append(key[-1]) or torch.rand(key[-2:]))
    model, took = science.pretrain(config, images, seed=1)
    assert set(seen) == {16, 25, 49} and seen == sorted(seen) and len(seen) == took["steps"]
    assert model.config == science.MODEL and 0 <= science.probe_percent(model, data) <= 100
    assert took["flops"] == pytest.approx(24 * training_flops_per_image(science.MODEL, ExactSkips()), rel=0.2)


def test_the_table_compares_runs_of_one_seed_and_budget():
    records = [
        {"budget": 1.0, "arm": arm, "seed": seed, "probe": value + seed, "flops": 2e12, "images": 9, "cpu_seconds": 3.0}
        for arm, value in ((science.PLAIN, 70.0), ("growing, AdamW", 71.5))
        for seed in (0, 1, 2)
    ]
    plain, growing = science.table(records).splitlines()[2:]
    assert plain == "| 1 | one size, AdamW | 2.00 | 9 | 3 | 71.00 +- 1.00 |  |"
    assert growing == "| 1 | growing, AdamW | 2.00 | 9 | 3 | 72.50 +- 1.00 | +1.50 +- 0.00, higher |"
