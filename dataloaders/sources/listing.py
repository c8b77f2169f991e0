"""Find the images, the tar shards and the other files below a folder. Every layout uses this finder.

A name does not decide what an entry is: a folder named like a file is a folder, a link is what it leads to, and files
are judged by dataloaders/sources/kinds.py. Names come in one sorted order, the same on every machine and rank.
UserError names the path and the mend.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from mirl.dataloaders.errors import StorageError
from mirl.dataloaders.sources.containers import container_kind, suffix_of
from mirl.dataloaders.sources.kinds import ARRAY_SUFFIXES, DICOM, IMAGE, IMAGE_SUFFIXES, SHARD, kind_of_file
from mirl.dataloaders.sources.ledger import Ledger
from mirl.dataloaders.sources.paths import shown
from mirl.dataloaders.sources.patience import find_patiently, is_of_a_moment, patiently
from mirl.errors import UserError

_SPLITS = ("train", "val", "valid", "validation", "test")
LIST_SUFFIXES = (".txt", ".lst", ".list", ".csv", ".tsv")


@dataclass(frozen=True)
class Found:
    """These are the names found, relative to root and sorted; the ledger counts everything else.

    containers: (name, reason to leave it out) of the files that hold several images, by kind. The caller takes them or
    leaves them out (`leave_out_containers`).
    """

    root: Path
    images: list[str]
    shards: list[str]
    ledger: Ledger
    containers: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    def leave_out_containers(self, taken: str = "") -> None:
        """Count the files that hold several images, except those of the kind ``taken``, as left out."""
        for kind, files in self.containers.items():
            for name, reason in files if kind != taken else ():
                self.ledger.leave_out(reason, os.path.join(self.root, name))


def find_files(root: Path, *, every_name: bool = False, containers: bool = False) -> Found:
    """Find everything below the folder `root`.

    A file system that fails for a moment is asked again; StorageLost if it goes on failing. A file that goes on failing
    although its folder can be read is left out. Links are followed, also out of `root`; a folder that is inside itself
    by a link is entered once. Hidden entries (a leading dot, such as macOS's ._x.jpg companions) are left out; a hidden
    folder counts as one entry.
    every_name: the ledger keeps the path of each entry that is left out. containers: keep the files that hold several
    images for the caller to decide; otherwise they are left out.
    """
    if not root.exists():
        raise UserError(f"data folder {shown(root)} does not exist; check the path")
    if not root.is_dir():
        raise UserError(
            f"{shown(root)} is not a folder, a list ({', '.join(LIST_SUFFIXES)}), a manifest or a .tar file: give one"
        )
    found = Found(root, [], [], Ledger(every_name=every_name))
    pending = [("", frozenset([_identity(os.fspath(root))]))]
    while pending:
        folder, above = pending.pop()
        try:
            for base, path, kind in _entries(os.fspath(root / folder if folder else root)):
                name = f"{folder}/{base}" if folder else base
                if kind == IMAGE:
                    found.images.append(name)
                elif kind == SHARD:
                    found.shards.append(name)
                elif isinstance(kind, str):
                    holds = container_kind(base) or (DICOM if kind == DICOM else None)
                    if holds is not None and base[0] != ".":
                        found.containers.setdefault(holds, []).append((name, suffix_of(base)))
                    else:
                        found.ledger.leave_out(kind, path)
                elif kind in above:
                    found.ledger.leave_out("links to a folder above them", path)
                else:
                    pending.append((name, above | {kind}))
        except PermissionError:
            raise UserError(
                f"data folder {shown(root / folder)} cannot be read (permission denied); "
                f"grant read and search permission (chmod -R u+rX) or move it out of {shown(root)}"
            ) from None
    found.images.sort()
    found.shards.sort()
    for files in found.containers.values():
        files.sort()
    if not containers:
        found.leave_out_containers()
    found.ledger.images = len(found.images)
    return found


def _entries(folder: str) -> list[tuple[str, str, str | tuple[int, int]]]:
    """Return (name, path, kind) of each entry of `folder`; see `_kind`."""
    try:
        return patiently(lambda: _scan(folder, patient=False), folder)
    except StorageError:  # looked at once more: a single bad file is left out, a lost file system is StorageLost
        return find_patiently(lambda: _scan(folder, patient=True), folder)


def _scan(folder: str, *, patient: bool) -> list[tuple[str, str, str | tuple[int, int]]]:
    with os.scandir(folder) as entries:
        return [(entry.name, entry.path, _kind(entry, patient)) for entry in entries]


def _kind(entry: os.DirEntry[str], patient: bool) -> str | tuple[int, int]:
    """Return IMAGE, SHARD, the reason to leave the entry out, or the identity of a folder to enter.

    patient: the file system's moment has passed, so that a fault is the entry's own; otherwise it is raised.
    """
    if entry.name.startswith("."):
        return "hidden"
    try:
        if entry.is_dir():
            return _identity(entry.path)
        if entry.is_file():
            return kind_of_file(entry.path, entry.name)
    except OSError as error:  # such as a chain of links without end, or a bad sector
        if is_of_a_moment(error) and not patient:
            raise
        return f"unreachable ({error.strerror})"
    return "links to nowhere" if entry.is_symlink() else "pipes, sockets or devices"


def split_folder(root: Path, split: str = "train") -> Path:
    """Return the folder of ``split``, "train" or "val", if root has standard splits, train beside val or test.

    The first of val, valid, validation and test that root has is "val". Any other root is returned itself.
    """
    names = split_names(root)
    if not names:
        return root
    return root / (names[0] if split == "train" else names[1])


def split_names(root: Path) -> list[str]:
    """Return the splits that root holds, train first; none unless train has another beside it. Case does not matter."""
    try:
        with os.scandir(root) as entries:
            return ordered_splits({entry.name for entry in entries if entry.name.lower() in _SPLITS and entry.is_dir()})
    except (FileNotFoundError, NotADirectoryError):
        return []


def ordered_splits(folders: set[str]) -> list[str]:
    """Return the splits among the names of ``folders``, as `split_names` does."""
    folders = {name for name in folders if name.lower() in _SPLITS}
    there = {name.lower(): name for name in sorted(folders)}  # if Train/ is beside train/, train/ wins: it sorts last
    train, *others = [there[name] for name in _SPLITS if name in there] or [""]
    return [train, *others] if train.lower() == "train" and others else []


def beside_split(root: Path, folder: Path) -> str:
    """Say in a clause for the ledger which folders and files in `root`, beside the split `folder`, are not read."""
    with os.scandir(root) as entries:
        others = sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.name != folder.name)
    names = ", ".join(shown(name) for name in others[:5])
    more = f" and {len(others) - 5} more" if len(others) > 5 else ""
    return f"{folder.name}/ of {shown(root)} is read, not {names}{more}"


def class_folders(names: list[str], root: Path) -> tuple[list[str], list[int]]:
    """Return (class names, label of each file): the sorted first folder names below `root`, numbered from 0."""
    tops = [name.partition("/")[0] if "/" in name else "" for name in names]
    if "" in tops:
        loose = names[tops.index("")]
        raise UserError(
            f"labels were asked for, but {shown(root / loose)} is in no class folder; "
            f"arrange the images as {shown(root)}/CLASS/image.jpg or give a list with 'path<TAB>label' lines"
        )
    classes = sorted(set(tops))
    number = {name: label for label, name in enumerate(classes)}
    return classes, [number[top] for top in tops]


def nothing_found(found: Found) -> UserError:
    """Return the error for a folder without images, with what it holds instead."""
    with os.scandir(found.root) as entries:
        names = sorted(entry.name for entry in entries)
    some = ", ".join(map(shown, names[:3])) + (", ..." if len(names) > 3 else "")
    holds = f"it holds {some}" if names else "it is empty"
    counts = f"; {found.ledger}" if found.ledger.total else ""
    suffixes = " ".join(IMAGE_SUFFIXES + ARRAY_SUFFIXES)
    return UserError(
        f"no images in {shown(found.root)} ({holds}); expected files ending in {suffixes} at any depth{counts}"
    )


def _identity(folder: str) -> tuple[int, int]:
    stat = os.stat(folder)
    return stat.st_dev, stat.st_ino
