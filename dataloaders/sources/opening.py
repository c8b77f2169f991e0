"""From what the user names to a `Source`: folders, lists of paths, manifests, tar shards, or several of them."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from mirl.dataloaders.sources import listing
from mirl.dataloaders.sources.base import FileSource, JoinedSource, Source
from mirl.dataloaders.sources.manifest import MANIFEST_NAME, is_manifest, read_manifest
from mirl.dataloaders.sources.paths import PathTable
from mirl.dataloaders.sources.tar_index import find_shards
from mirl.dataloaders.sources.tar_source import TarSource
from mirl.errors import UserError

LAYOUTS = ("auto", "files", "tar")
_log = logging.getLogger(__name__)

Data = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def open_source(
    data: Data,
    *,
    layout: str = "auto",
    labels: bool = False,
    index_dir: str | Path | None = None,
    use_manifest: bool = True,
    split: str = "train",
) -> Source:
    """The data set that `data` names.

    data: a folder (images at any depth, or .tar shards with their indexes), a text list of paths, a manifest, one .tar
    file, or a sequence of these. A folder that holds train/ beside val/ or test/ stands for its ``split``: "train", or
    "val". Images that a manifest in the folder (mirl-manifest.tsv) calls broken are left out.
    layout: "files" or "tar" decides for a folder that holds both; "auto" refuses it.
    labels: class numbers, from the sorted names of the first folder level, the list's second column, or cls parts.
    index_dir: where the .idx files are, if not beside the shards. use_manifest: leave out what a manifest calls broken.
    UserError, one line with the mend, for everything that leaves nothing to train on.
    """
    if layout not in LAYOUTS:
        raise UserError(f"layout is {layout!r}, must be one of {', '.join(LAYOUTS)}")
    if split not in ("train", "val"):
        raise ValueError(f"split is {split!r}, must be train or val")
    roots = [Path(data)] if isinstance(data, str | os.PathLike) else [Path(root) for root in data]
    if not roots:
        raise UserError("data is an empty list; give at least one folder, list of paths or .tar file")
    index_folder = None if index_dir is None else Path(index_dir)
    parts = [_open_one(root.expanduser(), layout, labels, index_folder, use_manifest, split) for root in roots]
    return parts[0] if len(parts) == 1 else JoinedSource(parts)


def _open_one(root: Path, layout: str, labels: bool, index_dir: Path | None, use_manifest: bool, split: str) -> Source:
    if root.is_file():
        if root.suffix == ".tar":
            return TarSource([root], index_dir=index_dir, labels=labels)
        if is_manifest(root):
            return _open_manifest(root, labels)
        if root.suffix in listing.LIST_SUFFIXES:
            paths, numbers = listing.read_path_list(root)
            if labels and numbers is None:
                raise UserError(f"labels were asked for, but {root} has none; write 'path<TAB>label' lines")
            return FileSource(PathTable(root.parent, paths), labels=numbers if labels else None)
    return _open_folder(root, layout, labels, index_dir, use_manifest, split)


def _open_folder(
    root: Path, layout: str, labels: bool, index_dir: Path | None, use_manifest: bool, split: str
) -> Source:
    folder = listing.split_folder(root, split)
    if folder != root:
        _log.info("%s holds train beside other splits: reading %s", root, folder)
    suffixes = listing.IMAGE_SUFFIXES + listing.ARRAY_SUFFIXES
    names = listing.list_folder(folder, suffixes if layout != "auto" else (*suffixes, ".tar"))
    tars = sum(name.endswith(".tar") for name in names)
    if layout == "auto" and 0 < tars < len(names):
        raise UserError(f"{folder} holds {tars} .tar files and {len(names) - tars} images; choose layout tar or files")
    broken = _broken_names(root, folder) if use_manifest else set()
    if layout == "tar" or tars:
        skip = frozenset(os.path.join(folder, name) for name in broken)
        return TarSource(find_shards(folder), index_dir=index_dir, labels=labels, skip=skip)
    if not names:
        raise listing.nothing_found(folder, suffixes)
    # Classes are numbered before broken images are left out, so that an emptied class keeps its number.
    classes, numbers = listing.class_folders(names, folder) if labels else (None, None)
    if broken:
        kept = [i for i, name in enumerate(names) if name not in broken]
        _log.warning("%d images of %s are left out: broken by its manifest", len(names) - len(kept), folder)
        names = [names[i] for i in kept]
        numbers = [numbers[i] for i in kept] if numbers is not None else None
        if not names:
            raise UserError(f"all images of {folder} are broken by {MANIFEST_NAME}; see the reasons in it")
    return FileSource(PathTable(folder, names), labels=numbers, classes=classes)


def _broken_names(root: Path, folder: Path) -> set[str]:
    """Names relative to `folder` that a manifest in it, or in the folder above its split, calls broken."""
    broken: set[str] = set()
    for place in {root, folder}:
        manifest = place / MANIFEST_NAME
        if manifest.is_file():
            for row in read_manifest(manifest)[1]:
                if row.reason:
                    broken.add(os.path.relpath(place / row.path, folder))
    return broken


def _open_manifest(manifest: Path, labels: bool) -> FileSource:
    root, rows = read_manifest(manifest)
    root = root if Path(root).is_dir() else str(manifest.parent)  # the data set was moved with its manifest
    names = [row.path for row in rows if not row.reason]
    if not names:
        raise UserError(f"{manifest} names no good image; validate another folder")
    classes, numbers = listing.class_folders(names, Path(root)) if labels else (None, None)
    return FileSource(PathTable(root, names), labels=numbers, classes=classes)
