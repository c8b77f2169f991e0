"""Segment one image of any size, by sliding windows or as a whole, at one or more scales.

As in mmsegmentation, the image is resized so that its shorter side is that of the crops of training. Logits of windows
that overlap are averaged, brought to the size of the image, and made probabilities. These are averaged over scales and
mirror images. Letters: h w the image, H W the resized image, K classes, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mirl.dataloaders.decoding.pair_crops import LONGEST
from mirl.engine.models.config import ModelConfig
from mirl.engine.transfer.segmentation.segmenter import Segmenter
from mirl.engine.transfer.segmentation.upernet import resized

WINDOWS_AT_ONCE = 8
# It raises this rank's number of forward passes to the largest of all ranks, which wait for each other under ZeRO-3.
Lockstep = Callable[[int], int]


@dataclass(frozen=True, kw_only=True)
class View:
    """A view says how images are looked at. crop: (H, W) of the windows. stride: pixels from one to the next."""

    crop: tuple[int, int]
    mode: str = "slide"
    stride: int = 0
    scales: Sequence[float] = (1.0,)
    flip: bool = False

    @property
    def strides(self) -> tuple[int, int]:
        """Return the strides down and across; by default two thirds of the crop (341 of 512, as in BEiT)."""
        return (self.stride, self.stride) if self.stride else (self.crop[0] * 2 // 3, self.crop[1] * 2 // 3)

    def __str__(self) -> str:
        text = f"windows of {self.crop[0]}x{self.crop[1]} every {self.strides[0]}" if self.mode == "slide" else "whole"
        if tuple(self.scales) != (1.0,):
            text += f", scales {' '.join(f'{scale:g}' for scale in self.scales)}"
        return text + (", mirrored too" if self.flip else "")


@dataclass(frozen=True)
class _Piece:
    """A piece has windows of one view of the image, to pass at once: uint8 [B, H', W', C] and the place of each."""

    view: int
    images: Tensor
    places: list[tuple[int, int]]


@torch.no_grad()
def predict(
    model: Segmenter, image_hwC: np.ndarray, view: View, device: torch.device, lockstep: Lockstep | None = None
) -> Tensor:
    """Return probabilities [K, h, w], float32 on ``device``, of a uint8 image; ``model`` is in eval mode."""
    sizes, pieces = _pieces(model.config, image_hwC, view)
    # The number is agreed on before anything is computed, so that all ranks make the same exchanges in the same order.
    spare = 0 if lockstep is None else lockstep(len(pieces)) - len(pieces)
    sums: list[Tensor | None] = [None] * len(sizes)
    counts: list[Tensor | None] = [None] * len(sizes)
    for piece in pieces:
        logits: Tensor = model(piece.images.to(device))
        height, width = sizes[piece.view][:2]
        if sums[piece.view] is None:
            sums[piece.view] = logits.new_zeros(logits.shape[1], height, width)
            counts[piece.view] = logits.new_zeros(height, width)
        total, count = sums[piece.view], counts[piece.view]
        assert total is not None and count is not None
        for one, (top, left) in zip(logits, piece.places, strict=True):
            down, across = min(one.shape[1], height - top), min(one.shape[2], width - left)
            total[:, top : top + down, left : left + across] += one[:, :down, :across]
            count[top : top + down, left : left + across] += 1
    for _ in range(spare):
        idle(model, device)
    found = None
    for (_, _, mirrored), total, count in zip(sizes, sums, counts, strict=True):
        assert total is not None and count is not None
        logits = resized((total / count)[None], image_hwC.shape[:2])
        probabilities = logits.softmax(dim=1)[0]
        probabilities = probabilities.flip(2) if mirrored else probabilities
        found = probabilities if found is None else found + probabilities
    assert found is not None
    return found / len(sizes)


@torch.no_grad()
def idle(model: Segmenter, device: torch.device) -> None:
    """Make a forward pass of nothing, for a rank that has run out while others go on under ZeRO-3."""
    config = model.config
    size = (config.image_height, config.image_width)
    model(torch.zeros(1, *size, config.channels, dtype=torch.uint8, device=device))


def _pieces(config: ModelConfig, image_hwC: np.ndarray, view: View) -> tuple[list[tuple[int, int, bool]], list[_Piece]]:
    """Return (H, W, whether mirrored) of each view, and the windows of all of them."""
    sizes: list[tuple[int, int, bool]] = []
    pieces: list[_Piece] = []
    for scale in view.scales:
        image = _resize(image_hwC, view.crop, scale)
        for mirrored in (False, True) if view.flip else (False,):
            sizes.append((image.shape[0], image.shape[1], mirrored))
            looked_at = np.ascontiguousarray(image[:, ::-1]) if mirrored else image
            pieces += _windows(len(sizes) - 1, _padded(config, looked_at, view), image.shape[:2], view)
    return sizes, pieces


def _windows(index: int, padded: np.ndarray, size: tuple[int, ...], view: View) -> Iterator[_Piece]:
    if view.mode == "whole":
        yield _Piece(index, torch.from_numpy(padded)[None], [(0, 0)])
        return
    height, width = view.crop
    # As in mmsegmentation, the last window of a row or column is moved back to end with the image.
    tops, lefts = (
        sorted({max(0, min(at, side - extent)) for at in range(0, max(side - extent, 0) + stride, stride)})
        for side, extent, stride in zip(size, view.crop, view.strides, strict=True)
    )
    places = [(top, left) for top in tops for left in lefts]
    for first in range(0, len(places), WINDOWS_AT_ONCE):
        some = places[first : first + WINDOWS_AT_ONCE]
        windows = np.stack([padded[top : top + height, left : left + width] for top, left in some])
        yield _Piece(index, torch.from_numpy(windows), some)


def _resize(image_hwC: np.ndarray, crop: tuple[int, int], scale: float) -> np.ndarray:
    """Resize the shorter side to that of the crop times ``scale``, the longer one to at most four times as much."""
    height, width = image_hwC.shape[:2]
    short = min(crop) * scale
    factor = min(short / min(height, width), LONGEST * short / max(height, width))
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    if size == (width, height):
        return image_hwC
    grey = image_hwC.shape[2] == 1
    picture = Image.fromarray(image_hwC[..., 0] if grey else image_hwC).resize(size, Image.Resampling.BILINEAR)
    return np.asarray(picture)[..., None] if grey else np.asarray(picture)


def _padded(config: ModelConfig, image: np.ndarray, view: View) -> np.ndarray:
    """Pad to the crop's size at least, or (whole) to whole patches, two at least, with the mean colour."""
    side = config.patch_size
    if view.mode == "whole":
        wanted = [max(2, -(-length // side)) * side for length in image.shape[:2]]
    else:
        wanted = [max(length, extent) for length, extent in zip(image.shape[:2], view.crop, strict=True)]
    if tuple(wanted) == image.shape[:2]:
        return np.array(image)  # writable, as torch wants it
    filled = np.empty((*wanted, image.shape[2]), np.uint8)
    filled[:] = np.rint(255 * np.asarray(config.mean))
    filled[: image.shape[0], : image.shape[1]] = image
    return filled
