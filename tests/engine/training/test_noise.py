"""Mask noise is a function of (seed, step, position) alone."""

from __future__ import annotations

import threading

import pytest
import torch

from mirl.engine.training import noise
from mirl.engine.training.noise import mask_noise


def test_any_split_of_the_batch_gives_the_same_noise():
    whole = mask_noise(3, 17, 0, 24, 49)
    for size in (1, 2, 8, 12):
        parts = [mask_noise(3, 17, first, size, 49) for first in range(0, 24, size)]
        assert torch.equal(torch.cat(parts), whole)


def test_images_steps_and_seeds_differ():
    rows = [mask_noise(seed, step, first, 1, 64) for seed in (0, 1) for step in (0, 1) for first in (0, 1)]
    assert len({tuple(row.flatten().tolist()) for row in rows}) == len(rows)


def test_noise_is_uniform_in_the_unit_interval():
    drawn = mask_noise(0, 0, 0, 512, 196)
    assert drawn.min() >= 0 and drawn.max() < 1
    # 100,352 draws: the mean of uniform noise has a standard error of 0.0009
    assert abs(drawn.mean().item() - 0.5) < 0.005
    assert abs(drawn.var().item() - 1 / 12) < 0.002


@pytest.mark.parametrize("accumulation", [1, 3])
def test_noise_made_ahead_is_the_same(accumulation, monkeypatch):
    makers = []
    monkeypatch.setattr(
        noise, "mask_noise", lambda *args: makers.append(threading.current_thread().name) or mask_noise(*args)
    )
    ahead = noise.NoiseAhead(3, 49, torch.device("cpu"))
    # A run, a jump as after a resume, a step that is asked for twice, and one that goes back.
    for step in (0, 1, 2, 40, 41, 41, 7, 8):
        for part in range(accumulation):
            assert torch.equal(ahead.take(step, 8 * part, 8), mask_noise(3, step, 8 * part, 8, 49))
    # Only what could not be foreseen was made by the thread that asked.
    assert makers.count(threading.current_thread().name) == 4 * accumulation
    assert len(ahead._made) <= accumulation + 1


@pytest.mark.gpu
def test_noise_of_a_gpu_comes_from_pinned_memory():
    device = torch.device("cuda")
    ahead = noise.NoiseAhead(3, 196, device)
    assert ahead._make(0, 0, 256).is_pinned()
    assert torch.equal(ahead.take(5, 0, 256).cpu(), mask_noise(3, 5, 0, 256, 196))
