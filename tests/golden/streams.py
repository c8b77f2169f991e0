"""Every random stream of the engine as a hash of its numbers, with the first few beside it for the reader.

None of these depends on a decoder, a compiler or the width of a vector unit, so they are equal on every machine.
"""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import torch

from mirl.dataloaders.decoding.crops import Augmentation
from mirl.dataloaders.order import StepPlan, epoch_permutation
from mirl.engine.training.noise import mask_noise, seed_stochastic_depth
from mirl.engine.transfer.random_state import BATCH_STREAM, RAND_AUGMENT_STREAM, keys_of, seeded
from mirl.keyed import keyed_u64, keyed_uniform

SHOWN = 6


def _recorded(numbers: np.ndarray) -> dict[str, Any]:
    numbers = np.ascontiguousarray(numbers)
    digest = hashlib.sha256(numbers.astype(numbers.dtype.newbyteorder("<")).tobytes()).hexdigest()
    return {"sha256": digest, "shape": list(numbers.shape), "first": numbers.reshape(-1)[:SHOWN].tolist()}


def _windows() -> np.ndarray:
    sizes = np.array([[375, 500], [500, 375], [64, 64], [1, 900], [900, 1], [33, 77]] * 50)
    windows, mirrored = Augmentation(image_size=(224, 192)).windows(sizes, 5, 2, np.arange(1000, 1000 + len(sizes)))
    return np.concatenate([windows, mirrored[:, None].astype(np.int32)], axis=1)


def _positions_of_ranks() -> np.ndarray:
    plans = [StepPlan(num_images=1003, micro_batch=4, accumulation=3, rank=rank, world_size=2) for rank in range(2)]
    return np.stack([np.append(plan.locate(step)[1], plan.locate(step)[0]) for plan in plans for step in range(150)])


def _draws(stream: int) -> np.ndarray:
    """What timm's transforms draw from: Python's, numpy's and torch's generator under each key."""
    rows = []
    for key in keys_of(stream, 3, 1, np.arange(20)):
        with seeded(key, torch.device("cpu")):
            rows.append([random.random(), np.random.rand(), float(torch.rand((), dtype=torch.float64))])
    return np.array(rows)


def _dropped_paths() -> np.ndarray:
    rows = []
    for step in range(4):
        seed_stochastic_depth(9, step, 16)
        rows.append(torch.rand(32, dtype=torch.float64).numpy())
    return np.array(rows)


def record_streams() -> dict[str, dict[str, Any]]:
    """The record of each stream: sha256 of its numbers in little-endian order, their shape, and the first few."""
    state = torch.get_rng_state()
    try:
        return {
            "keyed_u64": _recorded(keyed_u64(7, 11, np.arange(1000))),
            "keyed_uniform": _recorded(keyed_uniform(7, 11, np.arange(1000))),
            "mask_noise": _recorded(mask_noise(3, 17, 5, 9, 197).numpy()),
            "epoch_permutation": _recorded(epoch_permutation(5000, 3, 2)),
            "positions_of_ranks": _recorded(_positions_of_ranks()),
            "crop_windows_and_flips": _recorded(_windows()),
            "rand_augment_draws": _recorded(_draws(RAND_AUGMENT_STREAM)),
            "erase_mixup_cutmix_draws": _recorded(_draws(BATCH_STREAM)),
            "stochastic_depth_draws": _recorded(_dropped_paths()),
        }
    finally:
        torch.set_rng_state(state)
