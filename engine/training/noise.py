"""The random numbers behind the masks: a function of (seed, step, position in the effective batch), and of nothing
else.

So an image is masked alike however many ranks share the batch, and a resumed run needs no saved generator.
"""

from __future__ import annotations

import numpy as np
import torch

from mirl.keyed import fold_seed, keyed_u64

_DEPTH_STREAM = 13  # first word of a key; others are in dataloaders/ and engine/transfer/random_state.py
_WORDS = 4  # 64-bit words that Philox makes for one count


def mask_noise(seed: int, step: int, first: int, batch: int, patches: int) -> torch.Tensor:
    """Noise in [0, 1) for images ``first`` ... ``first + batch - 1`` of the effective batch of ``step``: float32
    [batch, patches].

    One Philox stream per step; each image owns a range of its counter.
    """
    counts = -(-patches // _WORDS)
    stream = np.random.Philox(key=[fold_seed(seed), 0x4D495251], counter=[first * counts, 0, step, 0])
    words = stream.random_raw(batch * counts * _WORDS).reshape(batch, counts * _WORDS)[:, :patches]
    return torch.from_numpy((words >> np.uint64(40)).astype(np.float32) * np.float32(2**-24))


def seed_stochastic_depth(seed: int, step: int, first: int) -> None:
    """Seed torch's global generators for one micro-batch, so that a resumed run drops the same paths.

    Which paths, unlike the masks, still depends on how the effective batch is divided.
    """
    torch.manual_seed(int(keyed_u64(_DEPTH_STREAM, seed, step, first)[0] >> np.uint64(1)))
