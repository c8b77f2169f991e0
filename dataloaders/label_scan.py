"""Look at every label image before training: check its size, and that each of its values has a meaning."""

from __future__ import annotations

from functools import partial

import numpy as np

from mirl.dataloaders.decoding.label_images import read_label_image, upright_size
from mirl.dataloaders.errors import ImageError
from mirl.dataloaders.parallel import parallel_map
from mirl.dataloaders.sources.label_map import LARGEST, UNKNOWN, LabelMap
from mirl.dataloaders.sources.label_pairs import PairSource
from mirl.dataloaders.sources.paths import shown
from mirl.errors import UserError


def scan_labels(
    source: PairSource, known: LabelMap | None, *, threads: int, rank: int = 0, world_size: int = 1
) -> np.ndarray:
    """Count the pixels of each raw value, int64 [65536], in the label images of rank ``rank`` of ``world_size``.

    known: the meanings of the values; None: any value will do. UserError names the first file that has another size
    than its image, that cannot be read, or that has a value without a meaning, and the value.
    """
    counts = np.zeros(LARGEST + 1, np.int64)
    table = None if known is None else known.table()
    mine = range(rank, source.num_images, world_size)
    look = partial(_look, source, table)
    for found in parallel_map(look, mine, total=len(mine), workers=threads, unit="label image", progress=False):
        if isinstance(found, str):
            raise UserError(found)
        values, pixels = found
        counts[values] += pixels
    return counts


def _look(source: PairSource, table: np.ndarray | None, index: int) -> str | tuple[np.ndarray, np.ndarray]:
    """Return the values of a label image and their pixel counts, or a message that says what is wrong."""
    path = source.label_path(index)
    name = f"label image {shown(path)}"
    try:
        labels_HW = read_label_image(source.read_label(index))
    except ImageError as error:
        return f"{name} cannot be used: {error}"
    try:
        size = upright_size(source.path(index))
    except ImageError:
        size = labels_HW.shape  # the loader replaces and counts a broken image when it meets it
    if size != labels_HW.shape:
        height, width = labels_HW.shape
        return (
            f"{name} is {height}x{width} and its image {shown(source.path(index))} is {size[0]}x{size[1]}: give label "
            "images of the size of their images"
        )
    pixels = np.bincount(labels_HW.ravel())
    values = np.flatnonzero(pixels)
    if table is not None:
        unknown = values[table[values] == UNKNOWN]
        if len(unknown):
            value = int(unknown[0])
            return (
                f"{name} has value {value} in {pixels[value]} pixels, which the label map does not know: name it in "
                f"--label-map, or give --ignore {value}"
            )
    return values, pixels[values]
