"""Files that hold several images each, told by name: which they are, what reads them, and what package that needs.

Beside pictures or tar shards such a file is no image of the data set, as a table of features is none: it is left out
and counted. Where a folder holds nothing else, or one is named by itself, its members are the images. What follows the
last colon of a place that does not exist itself chooses among what the file holds: FILE:KEY.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Protocol

from mirl.dataloaders.sources.kinds import DICOM, kind_by_name, kind_of_file
from mirl.dataloaders.sources.paths import chosen_in, shown
from mirl.errors import UserError

PARQUET, HDF5, NIFTI = "parquet", "HDF5", "NIfTI"
AXES = ("sagittal", "coronal", "axial")  # to the right, anterior, superior
_SUFFIXES = {
    PARQUET: (".parquet",),
    HDF5: (".h5", ".hdf5"),
    DICOM: (".dcm", ".dicom"),
    NIFTI: (".nii", ".nii.gz"),
}
_UNITS = {
    PARQUET: ("rows", "parquet file"),
    HDF5: ("arrays", "HDF5 file"),
    DICOM: ("frames", "DICOM file"),
    NIFTI: ("slices", "NIfTI file"),
}


@dataclass(frozen=True)
class Choice:
    """What the user chose among what a file holds: the images and the labels by name; "" where nothing is chosen.

    window: centre and width. axis: of `AXES`, along which a volume is cut.
    """

    images: str = ""
    labels: str = ""
    window: tuple[float, float] | None = None
    axis: str = ""

    @classmethod
    def parse(cls, text: str) -> Choice:
        """Reads IMAGES, LABELS, window=CENTRE/WIDTH and axis=AXIS, with commas between them; UserError names a flaw."""
        words = [word.strip() for word in text.split(",")] if text else []
        names = [word for word in words if "=" not in word]
        options = dict(word.split("=", 1) for word in words if "=" in word)
        if len(names) > 2 or set(options) - {"window", "axis"}:
            raise UserError(f"{shown(text)!r} chooses nothing: give IMAGES,LABELS or window=CENTRE/WIDTH or axis=AXIS")
        if (axis := options.get("axis", "")) not in ("", *AXES):
            raise UserError(f"axis is {shown(axis)!r}: give one of {', '.join(AXES)}")
        window = options.get("window")
        return cls(*names, window=None if window is None else _window(window), axis=axis)


class Container(Protocol):
    """One file's images, its members, numbered from 0; reading is safe from many threads.

    names: of the members, each once. left_out: (member, reason) of what is no image. classes: by class number, None
    where labels are not asked for or are numbers alone. has_labels: whether `label` can be asked.
    """

    names: Sequence[str]
    left_out: Sequence[tuple[str, str]]
    classes: list[str] | None
    has_labels: bool

    def read(self, number: int) -> bytes:
        """The encoded image; ImageError, without the path, if it cannot be had."""
        ...

    def label(self, number: int) -> int:
        """Class number; ImageError if it is none."""
        ...


@dataclass(frozen=True)
class Reading:
    """How files of one kind are opened: with labels or not, and what the user wrote to choose among what they hold."""

    labels: bool = False
    key: str = ""

    @property
    def choice(self) -> Choice:
        return Choice.parse(self.key)


def _window(text: str) -> tuple[float, float]:
    try:
        centre, width = (float(number) for number in text.split("/"))
    except ValueError:
        centre, width = 0.0, 0.0
    if not (math.isfinite(centre) and math.isfinite(width) and width > 0):
        raise UserError(f"window is {shown(text)!r}: give CENTRE/WIDTH, two numbers, the width above 0")
    return centre, width


def with_window(places: Sequence[Path], window: Sequence[float] | None) -> list[Path]:
    """The places with the window that a flag gives, where they have none of their own."""
    if not window:
        return list(places)
    option = "window=" + "/".join(f"{number:g}" for number in window)
    keys = [chosen_in(place.expanduser())[1] for place in places]
    return [
        place if "window=" in key else Path(f"{place}{',' if key else ':'}{option}")
        for place, key in zip(places, keys, strict=True)
    ]


def container_of(path: str | os.PathLike[str]) -> str | None:
    """As `container_kind`; a file whose suffix says nothing is looked into, since DICOM files often have none."""
    name = os.path.basename(os.fspath(path))
    if (kind := container_kind(name)) is not None or kind_by_name(name) is not None or not os.path.isfile(path):
        return kind
    return DICOM if kind_of_file(path, name) == DICOM else None


def suffix_of(name: str) -> str:
    """The suffix that tells the kind, for the ledger."""
    lower = name.lower()
    known = (suffix for suffixes in _SUFFIXES.values() for suffix in suffixes)
    return next((suffix for suffix in known if lower.endswith(suffix)), DICOM)


def container_kind(name: str) -> str | None:
    """The kind of a file of several images, by its suffix in any case; None for any other file."""
    lower = name.lower()
    return next((kind for kind, suffixes in _SUFFIXES.items() if lower.endswith(suffixes)), None)


def container_opener(kind: str) -> Callable[[Path, Reading], Container]:
    """What opens files of this kind; UserError with the line that installs the package, where it is missing."""
    home, name = {
        PARQUET: ("parquet", "open_parquet"),
        HDF5: ("hdf5", "open_hdf5"),
        DICOM: ("dicom", "open_dicom"),
        NIFTI: ("nifti", "open_nifti"),
    }[kind]
    return getattr(import_module(f"{__package__}.{home}"), name)


def unit_of(kind: str, files: int) -> str:
    """What is counted, for the ledger: "rows of 2 parquet files"."""
    members, file = _UNITS[kind]
    return f"{members} of {files} {file}{'s' if files > 1 else ''}"


def needed(module: str, extra: str, files: str, package: str | None = None) -> ModuleType:
    """The package that reads some files; UserError with the line that installs it.

    files: what needs it, in the plural: "parquet files". package: its name for pip, if that is another.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = package or module.partition(".")[0]
        raise UserError(
            f"{files} need {package} ({error}): pip install {package} (in the extra {extra} of mirl-engine)"
        ) from None


def no_choice(place: Path, key: str) -> UserError:
    """The error for FILE:KEY where the file holds nothing to choose among."""
    return UserError(f"{shown(place)} has nothing that {shown(key)!r} could choose: leave out the colon and the rest")
