"""Map the numbers in label images: each raw value is one class, or is ignored. This module needs no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mirl.dataloaders.sources.paths import shown
from mirl.errors import UserError

IGNORED = -1  # the class of a pixel that belongs to none: it is in no loss and in no count
UNKNOWN = -2
LARGEST = 65535  # the largest raw value of a 16-bit image
NAMED = ("ade20k", "cityscapes", "cityscapes_train_ids", "voc")
FILE_NAMES = ("label-map.txt", "label-map.json")  # names of a map's file beside the images
_WORD = "ignore"
_ADE_NAMES = "objectInfo150.txt"

# Raw values of gtFine_labelIds that are evaluated, in the order of their train ids (cityscapesScripts, labels.py).
_CITYSCAPES = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light",
    20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car", 27: "truck",
    28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle",
}  # fmt: skip
_VOC = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "dining table",
    "dog", "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv monitor",
)  # fmt: skip


@dataclass(frozen=True)
class LabelMap:
    """The raw value ``values[i]`` is class ``classes[i]``, or is ignored if that is -1. ``names``: of the classes."""

    values: tuple[int, ...]
    classes: tuple[int, ...]
    names: tuple[str, ...]

    @classmethod
    def of(cls, meanings: Mapping[int, str | None]) -> LabelMap:
        """Make a map from the name of each raw value, None for an ignored value.

        Values of one name are one class. Classes are numbered in the order in which they come.
        """
        names = list(dict.fromkeys(name for name in meanings.values() if name is not None))
        number = {name: index for index, name in enumerate(names)}
        return cls(
            tuple(meanings), tuple(IGNORED if name is None else number[name] for name in meanings.values()),
            tuple(names),
        )  # fmt: skip

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LabelMap:
        """Make a map from what ``dataclasses.asdict`` gave."""
        return cls(*(tuple(values[name]) for name in ("values", "classes", "names")))

    def meanings(self) -> dict[int, str | None]:
        """Return the name of each raw value, None for an ignored value."""
        return {
            value: None if index == IGNORED else self.names[index]
            for value, index in zip(self.values, self.classes, strict=True)
        }

    def with_ignored(self, values: Sequence[int]) -> LabelMap:
        """Return the same map with further raw values ignored. A class of which no value is left is gone."""
        return LabelMap.of(self.meanings() | dict.fromkeys(values))

    def table(self) -> np.ndarray:
        """Return int16 [65536]: the class of each raw value, IGNORED or UNKNOWN."""
        table = np.full(LARGEST + 1, UNKNOWN, np.int16)
        table[list(self.values)] = self.classes
        return table

    def __str__(self) -> str:
        ignored = [value for value, index in zip(self.values, self.classes, strict=True) if index == IGNORED]
        text = f"{len(self.names)} classes ({_some(self.names)})"
        return text + (f", ignored {_some([str(value) for value in ignored])}" if ignored else ", nothing ignored")


def named_map(name: str, root: Path | None = None) -> LabelMap:
    """Return one of `NAMED`. root: the folder of the data; ADE20K has a file there with the names of its classes."""
    if name == "voc":
        return LabelMap.of(dict(enumerate(_VOC)) | {255: None})
    if name == "cityscapes":
        ignored: dict[int, str | None] = dict.fromkeys([*range(35), 255])
        return _in_order(ignored | _CITYSCAPES)
    if name == "cityscapes_train_ids":
        return LabelMap.of(dict(enumerate(_CITYSCAPES.values())) | {255: None})
    assert name == "ade20k", name
    known = _ade_names(root / _ADE_NAMES) if root is not None and (root / _ADE_NAMES).is_file() else {}
    return LabelMap.of({0: None} | {value: known.get(value, str(value)) for value in range(1, 151)})


def read_label_map(given: str, root: Path | None = None) -> LabelMap:
    """Read the map of a file, or return one of `NAMED`.

    A file is text of lines ``VALUE NAME``, or JSON of one object {"VALUE": "NAME"}. The name ``ignore``, or null in
    JSON, ignores a value. UserError names the line or entry.
    """
    if given in NAMED:
        return named_map(given, root)
    path = Path(given).expanduser()
    if not path.is_file():
        raise UserError(f"label_map is {given!r}: no such file; give one, or {', '.join(NAMED)}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"label_map {shown(path)} cannot be read ({error}): give a text file in UTF-8") from None
    pairs = _json_pairs(text, path) if text.lstrip().startswith(("{", "[")) else _text_pairs(text, path)
    meanings: dict[int, str | None] = {}
    for where, value, name in pairs:
        if not (value.isascii() and value.isdigit()) or int(value) > LARGEST:
            raise UserError(f"label_map {shown(path)}: {where} has the value {value!r}: give a number from 0 to 65535")
        if int(value) in meanings:
            raise UserError(f"label_map {shown(path)}: {where} has the value {value} a second time: give it once")
        if name == "":
            raise UserError(f"label_map {shown(path)}: {where} has no name: give VALUE NAME, or VALUE {_WORD}")
        meanings[int(value)] = None if name in (None, _WORD) else name
    made = LabelMap.of(meanings)
    if len(made.names) < 2:
        raise UserError(f"label_map {shown(path)} names {len(made.names)} classes: segmentation needs two or more")
    return made


def map_beside(root: Path) -> Path | None:
    """Return the file of a map in a folder of data, if the folder has one."""
    return next((root / name for name in FILE_NAMES if (root / name).is_file()), None)


def map_of_values(values: Sequence[int], ignored: Sequence[int]) -> LabelMap:
    """Make each of the raw ``values`` that is not ignored a class, called by its number."""
    found: dict[int, str | None] = {value: str(value) for value in sorted(values)}
    return LabelMap.of(found | dict.fromkeys(ignored))


def require_same_names(ours: LabelMap, theirs: LabelMap, *, train: str, val: str) -> None:
    """Raise UserError if one raw value has two meanings, or one set has a class that the other lacks."""
    if ours == theirs:
        return
    for value, name in theirs.meanings().items():
        known = ours.meanings()
        if value in known and known[value] != name:
            raise UserError(
                f"label value {value} is {known[value] or _WORD!r} in {train} and {name or _WORD!r} in {val}: give "
                "sets of the same classes, or one --label-map for both"
            )
    extra, missing = sorted(set(theirs.names) - set(ours.names)), sorted(set(ours.names) - set(theirs.names))
    if extra or missing:
        what = f"has {_some(extra)}, which {train} lacks" if extra else f"lacks {_some(missing)} of {train}"
        raise UserError(f"the classes of {train} and {val} differ: {val} {what}; give sets of the same classes")


def _in_order(meanings: Mapping[int, str | None]) -> LabelMap:
    return LabelMap.of(dict(sorted(meanings.items())))


def _text_pairs(text: str, path: Path) -> list[tuple[str, str, str | None]]:
    pairs: list[tuple[str, str, str | None]] = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            value, _, name = line.strip().replace("\t", " ").partition(" ")
            pairs.append((f"line {number}", value, name.strip()))
    if not pairs:
        raise UserError(f"label_map {shown(path)} is empty: give lines VALUE NAME")
    return pairs


def _json_pairs(text: str, path: Path) -> list[tuple[str, str, str | None]]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"label_map {shown(path)} is not JSON: {error}") from None
    if not isinstance(values, dict) or not all(isinstance(name, str | None) for name in values.values()):
        raise UserError(f'label_map {shown(path)} is not one object of names: give {{"VALUE": "NAME", ...}}')
    return [(f"entry {value!r}", value, name) for value, name in values.items()]


def _ade_names(path: Path) -> dict[int, str]:
    """Read index and first name from each line of ADE20K's objectInfo150.txt, whose columns are divided by tabs."""
    found = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        cells = line.split("\t")
        if len(cells) > 1 and cells[0].strip().isdigit():
            found[int(cells[0])] = cells[-1].split(",")[0].strip()
    return found


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
