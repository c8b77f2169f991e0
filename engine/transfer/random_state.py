"""Libraries that know only global random numbers get them here as a function of a key and of nothing else."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from mirl.keyed import keyed_u64

# These are first words of keys; those of dataloaders/ are below 10.
RAND_AUGMENT_STREAM = 11
BATCH_STREAM = 12

_lock = threading.Lock()  # the states are the whole process's, and the loader has a thread of its own


def keys_of(stream: int, seed: int, epoch: int, positions_B: np.ndarray) -> list[int]:
    """Return one key, 0 ... 2^63 - 1, for each position in the order of an epoch."""
    return [int(key >> np.uint64(1)) for key in keyed_u64(stream, seed, epoch, positions_B)]


@contextmanager
def seeded(key: int, device: torch.device | None = None) -> Iterator[None]:
    """Let ``random`` and numpy's global generator begin at ``key`` inside, and torch's too if a ``device`` is given.

    torch's generators are those of the CPU and of that device. Afterwards all generators are as they were.
    """
    generators = [] if device is None else [torch.default_generator]
    if device is not None and device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index or 0])
    with _lock:
        python, numpy, torches = random.getstate(), np.random.get_state(), [one.get_state() for one in generators]
        try:
            random.seed(key)
            np.random.seed(key % 2**32)
            for generator in generators:
                generator.manual_seed(key)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            for generator, state in zip(generators, torches, strict=True):
                generator.set_state(state)
