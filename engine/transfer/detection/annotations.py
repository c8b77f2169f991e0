"""Read a COCO annotation file and its pictures, check it whole before training, and give masks. This needs no torch.

COCO's own code (pycocotools) decodes the masks: polygons, run lengths as lists and as text.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from mirl.dataloaders.errors import ImageError
from mirl.errors import UserError

INSTALL = "pip install 'pycocotools>=2.0.8' (the extra detect)"
PARTS = ("images", "annotations", "categories")
LEAST_POINTS = 6  # values of a polygon
DEGENERATE = ("refuse", "drop")


@dataclass(frozen=True)
class Objects:
    """A picture holds these objects, crowds left out.

    boxes: float32 [n, 4] as x1 y1 x2 y2. labels: int64 [n] from 1. masks: uint8 [n, H, W].
    """

    boxes: np.ndarray
    labels: np.ndarray
    masks: np.ndarray


def coco_tools() -> tuple[Any, ModuleType]:
    """Return pycocotools' COCO and its module ``mask``. UserError that names what to install if it is missing."""
    try:
        from pycocotools import mask
        from pycocotools.coco import COCO
    except ImportError as error:
        raise UserError(f"pycocotools is not installed ({error}): {INSTALL}") from None
    return COCO, mask


class CocoSet:
    """The set is one annotation file with the folder of its pictures.

    names: of the classes, by ascending id; label n of `objects` is the n-th name. category_ids: their ids. num_images,
    fingerprint: of the pictures and their objects. dropped: annotations without area that were left out.
    """

    def __init__(self, annotations: str | Path, folder: str | Path, *, degenerate: str = "refuse") -> None:
        """Read and check the file. degenerate: "refuse" or "drop" annotations that have no area.

        Raises:
            UserError: the file is no COCO file with masks or names missing files, or pycocotools is not installed.
        """
        self.path, self.folder = Path(annotations), Path(folder).expanduser()
        coco_class, self._mask = coco_tools()
        values = _read(self.path)
        self._check_categories(values["categories"])
        images = _by_id(values["images"], self.path, "image")
        self._check_files(images)
        kept, self.dropped = self._checked(values["annotations"], images, degenerate)
        self.coco = coco_class()
        self.coco.dataset = dict(values, annotations=kept)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints how long it took
            self.coco.createIndex()
        self.image_ids = sorted(images)
        self.num_images = len(self.image_ids)
        self.objects_in_all, self.crowds = len(kept), sum(bool(item.get("iscrowd")) for item in kept)
        self.empty = self.num_images - len({item["image_id"] for item in kept})

    @property
    def fingerprint(self) -> str:
        """Hash file names, sizes, boxes and classes, whatever the folder."""
        digest = hashlib.sha256()
        for image_id in self.image_ids:
            image = self.coco.imgs[image_id]
            found = [(item["bbox"], item["category_id"], item.get("iscrowd", 0)) for item in self.of_image(image_id)]
            digest.update(json.dumps([image["file_name"], image["height"], image["width"], found]).encode())
        return digest.hexdigest()[:32]

    def __str__(self) -> str:
        notes = [f"{self.objects_in_all} objects of {len(self.names)} classes"]
        notes += [f"{self.crowds} of them crowds"] if self.crowds else []
        notes += [f"{self.empty} images without objects"] if self.empty else []
        notes += [f"{self.dropped} annotations without area left out"] if self.dropped else []
        return f"{self.num_images} images, {', '.join(notes)}"

    def file(self, index: int) -> str:
        """Return the path of picture ``index``."""
        return str(self.folder / self.coco.imgs[self.image_ids[index]]["file_name"])

    def size(self, index: int) -> tuple[int, int]:
        """Return height and width of picture ``index``, as the file of annotations says."""
        image = self.coco.imgs[self.image_ids[index]]
        return int(image["height"]), int(image["width"])

    def of_image(self, image_id: int) -> list[dict[str, Any]]:
        """Return the annotations of an image, crowds among them."""
        return self.coco.imgToAnns.get(image_id, [])

    def picture(self, index: int, channels: int = 3) -> np.ndarray:
        """Read uint8 [H, W, C]; ImageError if it cannot be read, or its size is not that of the annotations."""
        path = self.file(index)
        try:
            with Image.open(path) as image:
                pixels = np.array(image.convert("RGB" if channels == 3 else "L"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ImageError(f"{path}: {error}") from error
        if pixels.shape[:2] != self.size(index):
            found, said = (f"{height}x{width}" for height, width in (pixels.shape[:2], self.size(index)))
            raise ImageError(f"{path} is {found} pixels and {self.path} says {said}")
        return pixels if channels == 3 else pixels[..., None]

    def objects(self, index: int) -> Objects:
        """Return the objects to find in picture ``index``: its annotations but for crowds, boxes cut at the borders."""
        height, width = self.size(index)
        found = [item for item in self.of_image(self.image_ids[index]) if not item.get("iscrowd")]
        boxes = np.array([item["bbox"] for item in found], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes = boxes.clip(0, np.array([width, height, width, height], np.float32))
        masks = [self.coco.annToMask(item) for item in found]
        return Objects(
            boxes=boxes,
            labels=np.array([self.label_of[item["category_id"]] for item in found], np.int64),
            masks=np.stack(masks) if masks else np.zeros((0, height, width), np.uint8),
        )

    def _check_categories(self, categories: Sequence[dict[str, Any]]) -> None:
        if not categories:
            raise UserError(f"annotations is {self.path}, whose list of categories is empty: give one with the classes")
        by_id = _by_id(categories, self.path, "category")
        names = [str(by_id[key].get("name", key)) for key in sorted(by_id)]
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise UserError(f"annotations is {self.path}, where two categories are called {twice[0]!r}: rename one")
        self.names, self.category_ids = tuple(names), tuple(sorted(by_id))
        self.label_of = {key: label for label, key in enumerate(self.category_ids, start=1)}

    def _check_files(self, images: dict[int, dict[str, Any]]) -> None:
        if not images:
            raise UserError(f"annotations is {self.path}, which lists no image: give another file")
        for image_id, image in images.items():
            sides = [image.get("height"), image.get("width")]
            if not isinstance(image.get("file_name"), str) or not all(isinstance(x, int) and x > 0 for x in sides):
                raise UserError(
                    f"annotations is {self.path}, where image {image_id} has no file_name, height and width: add them"
                )
        missing = [
            image["file_name"] for image in images.values() if not os.path.isfile(self.folder / image["file_name"])
        ]
        if missing:
            raise UserError(
                f"annotations is {self.path}, which names {len(missing)} of {len(images)} images that are not in "
                f"{self.folder} (the first is {missing[0]}): give the folder that file_name starts from, as --data"
            )

    def _checked(
        self, annotations: Sequence[dict[str, Any]], images: dict[int, dict[str, Any]], degenerate: str
    ) -> tuple[list[dict[str, Any]], int]:
        """Return the annotations to keep, and how many have no area."""
        kept, bad = [], []
        for number, item in enumerate(annotations):
            name = f"annotation {item.get('id', f'number {number}')}"
            for key, known in (("image_id", images), ("category_id", self.label_of)):
                if item.get(key) not in known:
                    kind = key.removesuffix("_id")
                    raise UserError(
                        f"annotations is {self.path}, where {name} has {key} {item.get(key)!r}, which no {kind} has: "
                        f"add the {kind}, or leave the annotation out"
                    )
            if (problem := _problem(item, images[item["image_id"]])) is None:
                # COCOeval reads both, and files of one's own often lack them.
                kept.append(item | {"iscrowd": int(item.get("iscrowd") or 0), "area": self._area(item, images)})
            elif problem.startswith("segmentation"):
                raise UserError(
                    f"annotations is {self.path}, where {name} has {problem}: give a polygon or run lengths (RLE); "
                    "detect trains masks too"
                )
            else:
                bad.append(f"{name} has {problem}")
        if bad and degenerate == "refuse":
            raise UserError(
                f"annotations is {self.path}, where {len(bad)} of {len(annotations)} boxes are degenerate (the first: "
                f"{bad[0]}): mend the file, or leave them out by --degenerate drop"
            )
        return [item if "id" in item else item | {"id": 1 + number} for number, item in enumerate(kept)], len(bad)

    def _area(self, item: dict[str, Any], images: dict[int, dict[str, Any]]) -> float:
        if item.get("area") is not None:
            return float(item["area"])
        image, shape = images[item["image_id"]], item["segmentation"]
        if isinstance(shape, list):
            shape = self._mask.merge(self._mask.frPyObjects(shape, image["height"], image["width"]))
        elif isinstance(shape["counts"], list):
            shape = self._mask.frPyObjects(shape, image["height"], image["width"])
        return float(self._mask.area(shape))


def _read(path: Path) -> dict[str, Any]:
    """Read the parts of a COCO file. UserError if it is none."""
    if path.is_dir():
        raise UserError(
            f"annotations is {path}, a folder: give a COCO file (JSON) for detection; a folder of label images is for "
            "mirl segment"
        )
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"annotations is {path}, which does not exist: give a COCO file (JSON)") from None
    except (OSError, ValueError) as error:
        raise UserError(f"annotations is {path}, which cannot be read as JSON ({error}): give a COCO file") from None
    lacking = [part for part in PARTS if not isinstance(values, dict) or not isinstance(values.get(part), list)]
    if lacking:
        raise UserError(f"annotations is {path}, which has no list {lacking[0]!r}: give a COCO file of instances")
    return values


def _by_id(items: Sequence[Any], path: Path, kind: str) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for item in items:
        key = item.get("id") if isinstance(item, dict) else None
        if not isinstance(key, int):
            raise UserError(f"annotations is {path}, where a {kind} has the id {key!r}: give whole numbers")
        if key in found:
            raise UserError(f"annotations is {path}, where two of kind {kind} have the id {key}: give each its own")
        found[key] = item
    return found


def _problem(item: dict[str, Any], image: dict[str, Any]) -> str | None:
    """Say what is wrong with the box or the mask of an annotation."""
    box, shape = item.get("bbox"), item.get("segmentation")
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(x, int | float) for x in box):
        return f"the box {box}"
    x, y, width, height = box
    inside_x = min(x + width, image["width"]) - max(x, 0)
    inside_y = min(y + height, image["height"]) - max(y, 0)
    if not all(map(math.isfinite, box)) or width <= 0 or height <= 0 or inside_x <= 0 or inside_y <= 0:
        return f"the box {box} in an image of {image['height']}x{image['width']}"
    if isinstance(shape, list):
        if not shape or not all(isinstance(part, list) and len(part) >= LEAST_POINTS for part in shape):
            return "segmentation without a polygon of three points" if shape else "segmentation that is empty"
    elif not (isinstance(shape, dict) and {"size", "counts"} <= set(shape)):
        return "segmentation that is neither polygons nor run lengths" if shape else "segmentation that is missing"
    elif list(shape["size"]) != [image["height"], image["width"]]:
        return f"segmentation of size {shape['size']} in an image of {image['height']}x{image['width']}"
    return None


def require_same_classes(train: CocoSet, val: CocoSet) -> None:
    """Raise UserError if the classes of two sets have other names; ids may differ."""
    extra, missing = sorted(set(val.names) - set(train.names)), sorted(set(train.names) - set(val.names))
    if extra or missing:
        parts = [f"val has {', '.join(map(repr, extra[:3]))}, which data lacks"] if extra else []
        parts += [f"val lacks {', '.join(map(repr, missing[:3]))}"] if missing else []
        raise UserError(
            f"val_annotations is {val.path}, whose categories are not those of {train.path}: {'; '.join(parts)}; give "
            "files with the same categories"
        )
