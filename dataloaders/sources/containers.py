"""Know the files that hold several images each: their kind, the code that reads them, and the package that it needs.

Beside pictures or tar shards such a file is left out and counted: it may be a table of features, which is no image of
the data set. If a folder holds only such files, or one is named by itself, its members are the images. In a place
FILE:KEY that does not exist itself, KEY chooses among the images that the file holds.
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
AXES = ("sagittal", "coronal", "axial")  # slices along the axes right, anterior, superior
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
    """A choice says what the user wants of a file: the images and the labels by name; "" if nothing is chosen.

    window: centre and width. axis: of `AXES`, along which a volume is cut.
    """

    images: str = ""
    labels: str = ""
    window: tuple[float, float] | None = None
    axis: str = ""

    @classmethod
    def parse(cls, text: str) -> Choice:
        """Read IMAGES, LABELS, window=CENTRE/WIDTH and axis=AXIS, with commas between them. UserError names a flaw."""
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
    """A container is one file; its members, numbered from 0, are images. Many threads may read it.

    names: of the members, each once. left_out: (member, reason) for members that are no image. classes: names by class
    number; None if labels are not asked for or are numbers alone. has_labels: whether `label` may be called.
    """

    names: Sequence[str]
    left_out: Sequence[tuple[str, str]]
    classes: list[str] | None
    has_labels: bool

    def read(self, number: int) -> bytes:
        """Read the encoded image. ImageError, without the path, if it cannot be had."""
        ...

    def label(self, number: int) -> int:
        """Return the class number. ImageError if the file has another value in its place."""
        ...


@dataclass(frozen=True)
class Reading:
    """A reading says how files of one kind are opened: with labels or not. key: the text of the user's `Choice`."""

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
    """Return the places, with the window that a flag gives added to those that have none of their own."""
    if not window:
        return list(places)
    option = "window=" + "/".join(f"{number:g}" for number in window)
    keys = [chosen_in(place.expanduser())[1] for place in places]
    return [
        place if "window=" in key else Path(f"{place}{',' if key else ':'}{option}")
        for place, key in zip(places, keys, strict=True)
    ]


def container_of(path: str | os.PathLike[str]) -> str | None:
    """Do as `container_kind`, but look into a file whose suffix says nothing: DICOM files often have no suffix."""
    name = os.path.basename(os.fspath(path))
    if (kind := container_kind(name)) is not None or kind_by_name(name) is not None or not os.path.isfile(path):
        return kind
    return DICOM if kind_of_file(path, name) == DICOM else None


def suffix_of(name: str) -> str:
    """Return the suffix that tells the kind, for the ledger; "DICOM" without one."""
    lower = name.lower()
    known = (suffix for suffixes in _SUFFIXES.values() for suffix in suffixes)
    return next((suffix for suffix in known if lower.endswith(suffix)), DICOM)


def container_kind(name: str) -> str | None:
    """Tell the kind of a file of several images by its suffix, in upper or lower case; None for any other file."""
    lower = name.lower()
    return next((kind for kind, suffixes in _SUFFIXES.items() if lower.endswith(suffixes)), None)


def container_opener(kind: str) -> Callable[[Path, Reading], Container]:
    """Return the function that opens files of this kind. It raises UserError if the package for it is missing."""
    home, name = {
        PARQUET: ("parquet", "open_parquet"),
        HDF5: ("hdf5", "open_hdf5"),
        DICOM: ("dicom", "open_dicom"),
        NIFTI: ("nifti", "open_nifti"),
    }[kind]
    return getattr(import_module(f"{__package__}.{home}"), name)


def unit_of(kind: str, files: int) -> str:
    """Name the unit that the ledger counts: "rows of 2 parquet files"."""
    members, file = _UNITS[kind]
    return f"{members} of {files} {file}{'s' if files > 1 else ''}"


def needed(module: str, extra: str, files: str, package: str | None = None) -> ModuleType:
    """Import the package that reads some files. If it is missing, UserError gives the line that installs it.

    files: the files that need it, in the plural: "parquet files". package: its name for pip, if pip has another.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = package or module.partition(".")[0]
        raise UserError(
            f"{files} need {package} ({error}): pip install {package} (in the extra {extra} of mirl-engine)"
        ) from None


def no_choice(place: Path, key: str) -> UserError:
    """Return the error for FILE:KEY if the file holds nothing to choose among."""
    return UserError(f"{shown(place)} has nothing that {shown(key)!r} could choose: leave out the colon and the rest")
