"""Views of places in colour photographs, labelled with the place: natural images with many classes and no download.

The eight colour photographs inside scikit-image's wheel are cut into cells; a class is a cell. A view of it is a square
with its centre in the cell, of random size, mirrored at even odds, with its contrast and the gain and offset of each
channel changed. The centres of held-out views lie in a strip of each cell where no training view has its centre; the
squares of both may overlap. So the label asks for recognition across shifts, sizes and colours, not across places.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from PIL import Image
from torch import Tensor

PHOTOGRAPHS = (
    "astronaut", "chelsea", "coffee", "rocket", "stereo_motorcycle", "hubble_deep_field", "immunohistochemistry",
    "retina",
)  # fmt: skip
CELLS = 3  # along each side
CLASSES = len(PHOTOGRAPHS) * CELLS**2
SIZES = (0.15, 0.3)  # side of a square, as shares of the photograph's shorter side
TRAINING, HELD_OUT = (0.0, 0.65), (0.7, 1.0)  # where centres lie across a cell, as shares of its width
CONTRAST, GAIN, OFFSET = (0.7, 1.3), (0.8, 1.2), (-20.0, 20.0)  # offset in levels of 0 .. 255


@functools.cache
def photographs() -> tuple[np.ndarray, ...]:
    """Each uint8 [height, width, 3], in the order of `PHOTOGRAPHS`."""
    from skimage import data  # imported when needed: it costs half a second

    found = [getattr(data, name)() for name in PHOTOGRAPHS]
    return tuple(one[0] if isinstance(one, tuple) else one for one in found)  # of a stereo pair the left one


@functools.lru_cache(maxsize=2)
def views(count: int, side: int, *, held_out: bool) -> tuple[Tensor, Tensor]:
    """uint8 [count, side, side, 3] and their classes, int64 [count]: the same ones on every call, each class as often
    as another, give or take one. Class = number of the photograph x CELLS^2 + number of the cell along the rows."""
    rng = np.random.default_rng([2026, held_out])
    labels = np.arange(count) % CLASSES
    rng.shuffle(labels)
    found = np.empty((count, side, side, 3), np.uint8)
    for place, label in enumerate(labels):
        found[place] = _view(int(label), side, HELD_OUT if held_out else TRAINING, rng)
    return torch.from_numpy(found), torch.from_numpy(labels)


def square(label: int, across: tuple[float, float], rng: np.random.Generator) -> tuple[int, int, int]:
    """(left, top, length) of a random square of class ``label``; across: where its centre lies in the cell's width."""
    number, cell = divmod(label, CELLS**2)
    height, width = photographs()[number].shape[:2]
    row, column = divmod(cell, CELLS)
    length = int(min(height, width) * rng.uniform(*SIZES))
    # Cells divide the area that the square's upper left corner can be in, which has its centres inside the photograph.
    left = (column + rng.uniform(*across)) / CELLS * (width - length)
    top = (row + rng.uniform()) / CELLS * (height - length)
    return int(left), int(top), length


def _view(label: int, side: int, across: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    left, top, length = square(label, across, rng)
    part = photographs()[label // CELLS**2][top : top + length, left : left + length]
    seen = Image.fromarray(part).resize((side, side), Image.Resampling.BICUBIC)
    pixels = np.asarray(seen, np.float32)
    if rng.uniform() < 0.5:
        pixels = pixels[:, ::-1]
    mean = pixels.mean()
    pixels = (mean + (pixels - mean) * rng.uniform(*CONTRAST)) * rng.uniform(*GAIN, 3) + rng.uniform(*OFFSET, 3)
    return pixels.clip(0, 255).astype(np.uint8)
