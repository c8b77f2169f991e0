"""The random numbers behind the masks: a function of (seed, step, position in the effective batch), and of nothing
else.

So an image is masked alike however many ranks share the batch, and a resumed run needs no saved generator.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

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


class NoiseAhead:
    """`mask_noise` on a device, made one step ahead by a thread of its own.

    Philox would cost the launching thread 0.4 ms for 256 images. The copy to a GPU starts from pinned memory: from
    pageable memory the host would wait for what the GPU still does of the step before.
    """

    def __init__(self, seed: int, patches: int | Callable[[int], int], device: torch.device) -> None:
        """patches: of an image, or a function that gives them for a step."""
        self._patches_at = patches if callable(patches) else lambda _: patches
        self._seed, self._device = seed, device
        # A thread starts on GPU 0, where pinning memory would open a context: half a GiB for every other rank.
        begin = partial(torch.cuda.set_device, device) if device.type == "cuda" and device.index is not None else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mirl-noise", initializer=begin)
        self._made: dict[tuple[int, int, int], Future[torch.Tensor]] = {}

    def take(self, step: int, first: int, batch: int) -> torch.Tensor:
        """The noise of this micro-batch, float32 [batch, patches]; that of the same place in the next step is begun."""
        begun = self._made.pop((step, first, batch), None)
        noise = self._make(step, first, batch) if begun is None else begun.result()
        self._made = {place: made for place, made in self._made.items() if place[0] in (step, step + 1)}
        self._made[step + 1, first, batch] = self._thread.submit(self._make, step + 1, first, batch)
        return noise.to(self._device, non_blocking=True)

    def _make(self, step: int, first: int, batch: int) -> torch.Tensor:
        noise = mask_noise(self._seed, step, first, batch, self._patches_at(step))
        return noise.pin_memory() if self._device.type == "cuda" else noise


def seed_stochastic_depth(seed: int, step: int, first: int) -> None:
    """Seed torch's global generators for one micro-batch, so that a resumed run drops the same paths.

    Which paths, unlike the masks, still depends on how the effective batch is divided.
    """
    torch.manual_seed(int(keyed_u64(_DEPTH_STREAM, seed, step, first)[0] >> np.uint64(1)))
