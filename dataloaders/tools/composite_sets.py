"""Write folders of composites: COCO annotations for detection, label images for semantic segmentation."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mirl.dataloaders.tools.composites import FASHION_FOLDER, UNLABELLED, Composer, cases_of
from mirl.dataloaders.tools.demo import default_cache_dir
from mirl.disk import set_mode
from mirl.errors import UserError

CATEGORY_IDS = (1, 2, 4, 7, 13, 18, 21, 44, 62, 90)
"""The ten classes have these ids, with gaps, as COCO's own have."""
IMAGE_IDS_STEP = 7  # ids of images have gaps too
DEMO_CLASSES = {
    "fashion": ("trouser", "pullover", "sandal", "bag", "boot"),
    "glyphs": ("star", "heart", "telephone", "umbrella", "notes"),
}
FORMS = ("polygon", "rle", "compressed")


def write_coco(
    folder: Path, split: str, count: int, composer: Composer, *, cases: Sequence[str] = (), forms: Sequence[str] = FORMS
) -> Path:
    """Write ``count`` composites to ``folder/split`` and their annotations to ``folder/split.json``.

    Returns the path of the JSON file. The mask of object n has the form ``forms[n % len(forms)]``, but a mask with a
    hole, and a crowd, is never a polygon.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (name, composite) in enumerate(_write_pictures(folder / split, split, count, composer, cases)):
        height, width = composite.labels.shape
        image_id = 1 + IMAGE_IDS_STEP * number
        images.append({"id": image_id, "file_name": name, "height": height, "width": width})
        for instance in composite.instances:
            form = forms[len(annotations) % len(forms)]
            annotations.append(
                {
                    "id": 1 + 3 * len(annotations),
                    "image_id": image_id,
                    "category_id": CATEGORY_IDS[instance.category],
                    "bbox": list(instance.box),
                    "area": int(instance.mask.sum()),
                    "iscrowd": int(instance.crowd),
                    "segmentation": encode(instance.mask, "rle" if instance.crowd else form),
                }
            )
    categories = [{"id": key, "name": name} for key, name in zip(CATEGORY_IDS, composer.names, strict=False)]
    path = folder / f"{split}.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def write_labels(
    folder: Path, split: str, count: int, composer: Composer, *, cases: Sequence[str] = (), unlabelled: int = 0
) -> tuple[Path, Path]:
    """Write ``count`` composites to ``folder/images/split``, and label images to ``folder/annotations/split``.

    Returns both folders. An image and its label image have the same name. Values are as ADE20K's: classes from 1;
    ``unlabelled`` is 0 or 255.
    """
    labels_folder = folder / "annotations" / split
    labels_folder.mkdir(parents=True, exist_ok=True)
    for name, composite in _write_pictures(folder / "images" / split, split, count, composer, cases):
        labels = np.where(composite.labels == UNLABELLED, np.uint8(unlabelled), composite.labels)
        Image.fromarray(labels).save(labels_folder / name)
    return folder / "images" / split, labels_folder


def _write_pictures(folder: Path, split: str, count: int, composer: Composer, cases: Sequence[str]):
    folder.mkdir(parents=True, exist_ok=True)
    for number, case in enumerate(cases_of(count, cases)):
        composite, name = composer.make(split, number, case), f"{number:05d}.png"
        Image.fromarray(composite.image).save(folder / name)
        yield name, composite


def encode(mask: np.ndarray, form: str) -> Any:
    """Return the ``segmentation`` of a bool mask [H, W] in one of `FORMS`, exact when pycocotools decodes it.

    A mask with holes, or with pixels that touch at a corner alone, has no exact polygon and is run-length encoded.
    """
    if form == "polygon" and (polygons := outlines(mask)) is not None:
        return polygons
    counts = run_lengths(mask)
    return {"size": list(mask.shape), "counts": compress(counts) if form == "compressed" else counts}


def run_lengths(mask: np.ndarray) -> list[int]:
    """Return the lengths of runs of equal pixels down one column after another; the first is of zeros and may be 0."""
    flat = mask.astype(np.int8).ravel(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    lengths = np.diff([0, *edges.tolist(), flat.size]).tolist()
    return [0, *lengths] if flat[0] else lengths


def compress(counts: Sequence[int]) -> str:
    """Write run lengths as COCO's text: differences to the one before the last, five bits a character, lowest first."""
    text = []
    for index, count in enumerate(counts):
        value, more = count - (counts[index - 2] if index > 2 else 0), True
        while more:
            bits, value = value & 31, value >> 5
            more = value != (-1 if bits & 16 else 0)
            text.append(chr(bits + 32 * more + 48))
    return "".join(text)


def outlines(mask: np.ndarray) -> list[list[int]] | None:
    """Return polygons along the edges of the pixels, x and y in turn, one for each part of the mask.

    None if a part has a hole or touches itself at a corner.
    """
    from skimage.measure import label

    parts, count = label(mask, connectivity=1, return_num=True)
    found = []
    for number in range(1, int(count) + 1):
        part = parts == number
        polygon = _outline(part)
        if polygon is None:
            return None
        found.append(polygon)
    return found


def _outline(part: np.ndarray) -> list[int] | None:
    padded = np.pad(part, 1)
    # Edges are directed, with the inside on the right: start -> end, both (x, y) of corners.
    following: dict[tuple[int, int], tuple[int, int]] = {}
    for dy, dx, start, end in (
        (-1, 0, (0, 0), (1, 0)), (0, 1, (1, 0), (1, 1)), (1, 0, (1, 1), (0, 1)), (0, -1, (0, 1), (0, 0)),
    ):  # fmt: skip
        border = padded & ~np.roll(padded, (-dy, -dx), axis=(0, 1))
        for y, x in np.argwhere(border) - 1:
            key = int(x + start[0]), int(y + start[1])
            if key in following:
                return None  # two edges leave one corner
            following[key] = int(x + end[0]), int(y + end[1])
    first = next(iter(following))
    corners, point, before = [], first, None
    for _ in range(len(following)):
        step = following[point]
        direction = step[0] - point[0], step[1] - point[1]
        if direction != before:
            corners.append(point)
        before, point = direction, step
        if point == first:
            break
    if sum(1 for _ in following) != _length(corners, first):
        return None  # a hole has an outline of its own
    return [value for corner in corners for value in corner]


def _length(corners: list[tuple[int, int]], first: tuple[int, int]) -> int:
    closed = [*corners, corners[0]]
    return sum(abs(a[0] - b[0]) + abs(a[1] - b[1]) for a, b in zip(closed, closed[1:], strict=False))


def prepare_composites(
    cache_dir: str | Path | None = None, *, train: int = 2000, val: int = 150, side: int = 96
) -> Path:
    """Return the folder of composites for demos: ``train``, ``val`` with COCO files beside them.

    The folder is made once and published by one rename. Any number of processes may call this at once. UserError if the
    folder cannot be written.
    """
    cache = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    kind = "fashion" if FASHION_FOLDER.is_dir() else "glyphs"
    composer = Composer(size=(side, side), objects=(1, 3), share=(0.35, 0.6), classes=DEMO_CLASSES[kind])
    target = cache / f"composites-{side}px-{kind}-{train}-{val}-v1"
    if target.is_dir():
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=cache, prefix=".composites-"))
    except OSError as error:
        raise UserError(
            f"demo cache folder {cache} cannot be written ({error.strerror}); set MIRL_CACHE to one that can"
        ) from None
    try:
        write_coco(work, "train", train, composer)
        write_coco(work, "val", val, composer)
        set_mode(work, 0o755)
        work.rename(target)
    except OSError:
        if not target.is_dir():  # otherwise another process was first
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target
