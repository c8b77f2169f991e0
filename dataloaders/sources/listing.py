"""Finding the images of a data set: folders of any depth, and text lists of paths.

Every function returns names in one sorted order, the same on every machine and rank, and raises UserError with the
path and the mend when there is nothing to train on.
"""

from __future__ import annotations

import os
from pathlib import Path

from mirl.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp", ".ppm", ".pgm", ".gif")
ARRAY_SUFFIXES = (".npy",)
LIST_SUFFIXES = (".txt", ".lst", ".list")


def list_folder(root: Path, suffixes: tuple[str, ...]) -> list[str]:
    """Sorted names, relative to `root`, of all files below it that end in one of `suffixes` (any case).

    Symbolic links are followed, a folder that contains itself is entered once. Hidden entries (a leading dot, such as
    macOS's ._x.jpg companions) are skipped.
    """
    _check_readable(root)
    names: list[str] = []
    pending = [("", frozenset([_identity(root)]))]
    while pending:
        folder, above = pending.pop()
        try:
            with os.scandir(root / folder if folder else root) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    name = f"{folder}/{entry.name}" if folder else entry.name
                    if entry.name.lower().endswith(suffixes):
                        names.append(name)
                    elif entry.is_dir():
                        identity = _identity(Path(entry.path))
                        if identity not in above:
                            pending.append((name, above | {identity}))
        except PermissionError:
            raise UserError(
                f"data folder {root / folder} cannot be read (permission denied); "
                f"grant read and search permission (chmod -R u+rX) or move it out of {root}"
            ) from None
    names.sort()
    return names


def read_path_list(list_file: Path) -> tuple[list[str], list[int] | None]:
    """(paths, labels or None) from a text file: one path a line, optionally a tab and an integer label.

    Empty lines and lines that start with # are skipped. Relative paths start at the folder of the list.
    """
    try:
        lines = list_file.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError as error:
        raise UserError(f"list {list_file} cannot be read ({error.strerror}); check its permissions") from None
    lines = [line for line in lines if line.strip() and not line.startswith("#")]
    if not lines:
        raise UserError(f"list of paths {list_file} names no image; write one path a line")
    labels: list[int] | None = None
    if "\t" in lines[0]:
        pairs = [line.rpartition("\t") for line in lines]
        bad = next((n for n, (path, _, label) in enumerate(pairs) if not path or not label.strip().isdigit()), None)
        if bad is not None:
            raise UserError(f"list of paths {list_file}: {lines[bad]!r} is not 'path<TAB>label' as the first entry is")
        lines, labels = [path for path, _, _ in pairs], [int(label) for _, _, label in pairs]
    paths = [line.strip() for line in lines]
    first = list_file.parent / paths[0]
    if not first.exists():
        raise UserError(
            f"list of paths {list_file}: its first entry {first} does not exist; "
            "use absolute paths or paths relative to the folder of the list"
        )
    return paths, labels


def split_folder(root: Path, split: str = "train") -> Path:
    """The folder of ``split``, "train" or "val", where root is a set with standard splits, train beside val or test.

    Of several that are there, val, valid, validation and test in this order are "val". Any other root is itself.
    """
    others = [root / name for name in ("val", "valid", "validation", "test") if (root / name).is_dir()]
    if not others or not (root / "train").is_dir():
        return root
    return root / "train" if split == "train" else others[0]


def class_folders(names: list[str], root: Path) -> tuple[list[str], list[int]]:
    """(class names, label of each file): the sorted first folder names below `root`, numbered from 0."""
    tops = [name.partition("/")[0] if "/" in name else "" for name in names]
    if "" in tops:
        loose = names[tops.index("")]
        raise UserError(
            f"labels were asked for, but {root / loose} is in no class folder; "
            f"arrange the images as {root}/CLASS/image.jpg or give a list with 'path<TAB>label' lines"
        )
    classes = sorted(set(tops))
    number = {name: label for label, name in enumerate(classes)}
    return classes, [number[top] for top in tops]


def nothing_found(root: Path, suffixes: tuple[str, ...]) -> UserError:
    """The error for a folder without images, with what it holds instead."""
    with os.scandir(root) as entries:
        found = sorted(entry.name for entry in entries)
    holds = f"it holds {', '.join(found[:3])}{', ...' if len(found) > 3 else ''}" if found else "it is empty"
    return UserError(f"no images in {root} ({holds}); expected files ending in {' '.join(suffixes)} at any depth")


def _check_readable(root: Path) -> None:
    if not root.exists():
        raise UserError(f"data folder {root} does not exist; check the path")
    if not root.is_dir():
        raise UserError(f"{root} is not a folder, a list ({', '.join(LIST_SUFFIXES)}), a manifest or a .tar file")


def _identity(folder: Path) -> tuple[int, int]:
    stat = os.stat(folder)
    return stat.st_dev, stat.st_ino
