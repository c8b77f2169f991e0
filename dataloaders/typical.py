"""Look at a few images of a data set before it is opened: how large are they once they are decoded?"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from PIL import Image

from mirl.dataloaders.sources.kinds import IMAGE_SUFFIXES

_LOOKED_AT = 16  # images of each path


def typical_image_bytes(paths: Sequence[Path]) -> float | None:
    """Return the mean bytes of a decoded image (8 bits, three channels) among the first ones in the folders ``paths``.

    Only headers are read. None if no path is a folder, or no file in the folders has the name and the header of an
    image. Shards and lists are not looked into.
    """
    sizes = [size for root in paths if root.is_dir() for size in islice(_sizes(root), _LOOKED_AT)]
    return sum(sizes) / len(sizes) if sizes else None


def _sizes(root: Path) -> Iterator[int]:
    for folder, folders, names in os.walk(root, followlinks=True):
        folders.sort()
        found = 0
        for name in sorted(names):
            if Path(name).suffix.lower() not in IMAGE_SUFFIXES or found == 2:  # a few of each class
                continue
            try:
                with Image.open(Path(folder, name)) as image:
                    yield image.width * image.height * 3
            except (OSError, ValueError, Image.DecompressionBombError):
                continue  # the loader names it when its turn comes
            found += 1
