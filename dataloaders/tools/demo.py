"""Make the demo's photographs: JPEG files cut from the photographs that scikit-image carries, no download.

astronaut (NASA), chelsea, coffee, rocket (SpaceX): public domain or CC0, with colour; brick, grass, gravel: CC0
textures in grey. Each is cut into overlapping squares, scaled to 256 px, in a fixed order, so the files are the same
wherever the same versions of Pillow and scikit-image run.

There are two sets. The demo trains on some 40 large squares of the colour photographs, which it can learn in minutes.
Several hundred squares of every kind serve if the number of images counts, as for measuring a loader.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from mirl.dataloaders.sources.paths import default_cache_dir
from mirl.disk import set_mode
from mirl.errors import UserError

_COLOUR = ("astronaut", "chelsea", "coffee", "rocket")
_GREY = ("brick", "grass", "gravel")
_SIDE = 256
_QUALITY = 92
# Side of a square as a share of the photograph's shorter side, and how many steps the square moves along each axis.
_FEW = dict.fromkeys(_COLOUR, ((1.0, 3), (0.8, 3)))
_MANY = dict.fromkeys(_COLOUR, ((1.0, 3), (0.75, 4), (0.55, 5), (0.42, 6))) | dict.fromkeys(_GREY, ((0.5, 3),))
# The folders need new names whenever the values above change: an old folder is taken as it is.
_FOLDERS = {False: f"demo-few-{_SIDE}px-v2", True: f"demo-{_SIDE}px-v1"}


def prepare_demo(cache_dir: str | Path | None = None, *, many: bool = False) -> Path:
    """Return the folder of demo photographs as CLASS/NNN.jpg, made once in a few seconds and published by one rename.

    cache_dir: the folder above; default `default_cache_dir()`. many: several hundred squares, textures among them, in
    place of the few that the demo trains on. Any number of processes may call this at once. UserError if the folder
    cannot be written.
    """
    cache = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    target = cache / _FOLDERS[many]
    if target.is_dir():
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=cache, prefix=".demo-"))
    except OSError as error:
        raise UserError(
            f"demo cache folder {cache} cannot be written ({error.strerror}); set MIRL_CACHE to one that can"
        ) from None
    try:
        for name, scales in (_MANY if many else _FEW).items():
            (work / name).mkdir()
            for number, square in enumerate(_squares(name, scales)):
                square.save(work / name / f"{number:03d}.jpg", quality=_QUALITY)
        set_mode(work, 0o755)
        work.rename(target)
    except OSError:
        if not target.is_dir():  # otherwise another process was first
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _squares(name: str, scales: tuple[tuple[float, int], ...]) -> Iterator[Image.Image]:
    from skimage import data  # imported when needed: it costs half a second

    photograph = Image.fromarray(getattr(data, name)()).convert("RGB")
    short = min(photograph.size)
    boxes: dict[tuple[int, int, int, int], None] = {}  # an ordered set: if there is no room to move, steps coincide
    for share, steps in scales:
        side = int(short * share)
        for row in range(steps):
            for column in range(steps):
                left = (photograph.width - side) * column // (steps - 1)
                top = (photograph.height - side) * row // (steps - 1)
                boxes[left, top, left + side, top + side] = None
    for box in boxes:
        yield photograph.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC, box=box)


def between_squares() -> Iterator[Image.Image]:
    """Cut squares that no file of the demo shows from its photographs: between its sizes, and between its places."""
    from skimage import data

    for name in _COLOUR:
        photograph = Image.fromarray(getattr(data, name)()).convert("RGB")
        for share, places in ((0.9, 3), (0.65, 4)):
            side = int(min(photograph.size) * share)
            for row in range(places):
                for column in range(places):
                    left = round((photograph.width - side) * (column + 0.5) / places)
                    top = round((photograph.height - side) * (row + 0.5) / places)
                    yield photograph.resize(
                        (_SIDE, _SIDE), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side)
                    )
