"""Durations and learning-rate curves."""

from __future__ import annotations

import math

import pytest

from mirl.engine.configuration.config import LogConfig, OptimConfig, RunConfig
from mirl.engine.training.schedule import Durations, Schedule
from mirl.errors import UserError


def durations(steps_per_epoch: int = 10, **optim) -> Durations:
    return Durations.resolve(OptimConfig(**optim), RunConfig(), LogConfig(), steps_per_epoch=steps_per_epoch)


def test_epochs_and_steps_are_converted_once():
    by_epochs = durations(epochs=300, warmup_epochs=40, steps_per_epoch=312)
    assert (by_epochs.total_steps, by_epochs.warmup_steps) == (300 * 312, 40 * 312)
    assert durations(steps=77, warmup_steps=7).total_steps == 77
    assert durations(epochs=0.25, steps_per_epoch=10).total_steps == 3  # a started step is a whole one


def test_warmup_longer_than_the_run_is_refused():
    with pytest.raises(UserError, match="warm-up takes 40 of 30 steps"):
        durations(epochs=3, warmup_epochs=4)


def test_warmup_is_linear_and_reaches_the_peak():
    schedule = Schedule(peak_lr=1.0, min_lr=0.0, warmup_steps=10, total_steps=100, shape="cosine")
    assert [schedule.lr(step) for step in range(10)] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert schedule.lr(10) == pytest.approx(1.0)


def test_cosine_is_half_a_cosine_and_ends_at_min_lr():
    schedule = Schedule(peak_lr=2.0, min_lr=0.5, warmup_steps=0, total_steps=100, shape="cosine")
    assert schedule.lr(50) == pytest.approx(1.25)
    assert schedule.lr(25) == pytest.approx(0.5 + 1.5 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert schedule.lr(100) == pytest.approx(0.5)
    assert schedule.lr(1000) == pytest.approx(0.5)


def test_step_schedule_drops_at_90_and_95_percent():
    schedule = Schedule(peak_lr=1.0, min_lr=0.0, warmup_steps=5, total_steps=200, shape="step")
    assert schedule.lr(179) == pytest.approx(1.0)
    assert schedule.lr(180) == pytest.approx(0.1)
    assert schedule.lr(189) == pytest.approx(0.1)
    assert schedule.lr(190) == pytest.approx(0.01)
    assert schedule.lr(199) == pytest.approx(0.01)


def test_step_schedule_drops_where_it_is_told_to():
    # 12 epochs of 100 steps, a tenth of the rate from the ninth and from the eleventh on.
    optim = OptimConfig(epochs=12, schedule="step", step_at=(9 / 12, 11 / 12), lr=1.0)
    schedule = Durations.resolve(optim, RunConfig(), LogConfig(), steps_per_epoch=100).schedule(optim)
    rates = [schedule.lr(step) for step in (899, 900, 1099, 1100, 1199)]
    assert rates == pytest.approx([1.0, 0.1, 0.1, 0.01, 0.01])
    for wrong in ((0.9, 0.5), (0.0, 0.5), (0.5, 1.0)):
        with pytest.raises(UserError, match="step_at is"):
            OptimConfig(epochs=1, step_at=wrong)
