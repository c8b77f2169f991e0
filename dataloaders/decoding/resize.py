"""Resize, cut and mirror on the CPU, with torch's antialiased bicubic resize of uint8 images.

DALI's CPU resize takes 3.4 ms for a crop of a 500 x 375 photograph, torch's 0.3 ms with the arithmetic of Pillow (they
differ by at most a level or two). So on a machine without a GPU DALI decodes and this module resizes. On a GPU DALI
does both.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch.nn import functional

_CHUNK = 4


def resize_bicubic(pixels_HWC: np.ndarray, size: tuple[int, int]) -> torch.Tensor:
    """Resize to [*size, C] of the same type (uint8 or float32), bicubic (a = -0.5), antialiased when shrinking."""
    if pixels_HWC.shape[:2] == tuple(size):
        return torch.from_numpy(pixels_HWC)
    # Permuting after the batch axis is added marks the tensor as channels-last, which selects the vectorised kernel.
    x_1CHW = torch.from_numpy(pixels_HWC).unsqueeze(0).permute(0, 3, 1, 2)
    out_1CHW = functional.interpolate(x_1CHW, size=size, mode="bicubic", antialias=True, align_corners=False)
    return out_1CHW[0].permute(1, 2, 0)


class CpuResizer:
    """The resizer fills a batch from decoded crops, several at a time in threads; torch frees the interpreter lock."""

    def __init__(self, image_size: tuple[int, int], threads: int) -> None:
        self.image_size = image_size
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="mirl-resize")

    def __call__(
        self,
        crops: list[np.ndarray],
        mirrored_B: np.ndarray,
        sizes_B2: np.ndarray | None = None,
        offsets_B2: np.ndarray | None = None,
        image_size: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """Return [B, H, W, C] of the crops' type.

        sizes_B2, offsets_B2: resize crop i to sizes[i], then cut the output at (top, left) = offsets[i]; default:
        resize straight to the output size. image_size: of this batch, default that of the resizer.
        """
        height, width = whole = image_size or self.image_size
        dtype = torch.from_numpy(crops[0][:0]).dtype
        out_BHWC = torch.empty(len(crops), height, width, crops[0].shape[2], dtype=dtype)

        def fill(first: int) -> None:
            with torch.no_grad():
                for i in range(first, min(first + _CHUNK, len(crops))):
                    size = whole if sizes_B2 is None else (int(sizes_B2[i, 0]), int(sizes_B2[i, 1]))
                    image_HWC = resize_bicubic(crops[i], size)
                    if offsets_B2 is not None:
                        top, left = offsets_B2[i].tolist()
                        image_HWC = image_HWC[top : top + height, left : left + width]
                    out_BHWC[i].copy_(image_HWC.flip(1) if mirrored_B[i] else image_HWC)

        for done in [self._pool.submit(fill, first) for first in range(0, len(crops), _CHUNK)]:
            done.result()
        return out_BHWC

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
