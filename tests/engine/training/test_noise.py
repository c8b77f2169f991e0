"""Mask noise is a function of (seed, step, position) alone."""

from __future__ import annotations

import torch

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
    noise = mask_noise(0, 0, 0, 512, 196)
    assert noise.min() >= 0 and noise.max() < 1
    # 100,352 draws: the mean of uniform noise has a standard error of 0.0009
    assert abs(noise.mean().item() - 0.5) < 0.005
    assert abs(noise.var().item() - 1 / 12) < 0.002
