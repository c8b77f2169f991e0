"""Open the places that a user names as one `Source`: folders, lists of paths, manifests, tar shards, other files."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from mirl.dataloaders.sources import listing
from mirl.dataloaders.sources.base import FileSource, JoinedSource, Source
from mirl.dataloaders.sources.containers import PARQUET, Reading, container_of, no_choice
from mirl.dataloaders.sources.kinds import IMAGE, SHARD, is_text, kind_of_file, read_head
from mirl.dataloaders.sources.ledger import Ledger, join_ledgers
from mirl.dataloaders.sources.manifest import MANIFEST_NAME, is_manifest
from mirl.dataloaders.sources.manifest_source import broken_names, open_manifest
from mirl.dataloaders.sources.member_source import MemberSource
from mirl.dataloaders.sources.parquet import of_split
from mirl.dataloaders.sources.path_list import existing_entries, read_path_list, refuse_misspelt
from mirl.dataloaders.sources.paths import PathTable, chosen_in, shown, url_of
from mirl.dataloaders.sources.patience import find_patiently, is_of_a_moment
from mirl.dataloaders.sources.remote import fetch_all, open_remote
from mirl.dataloaders.sources.tar_index import index_path
from mirl.dataloaders.sources.tar_source import TarSource
from mirl.errors import UserError

LAYOUTS = ("auto", "files", "tar")

Data = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def open_source(
    data: Data,
    *,
    layout: str = "auto",
    labels: bool = False,
    index_dir: str | Path | None = None,
    use_manifest: bool = True,
    split: str = "train",
    every_name: bool = False,
) -> Source:
    """Open the data set that `data` names.

    data: a folder (images at any depth, .tar shards with their indexes, or parquet, HDF5, DICOM or NIfTI files), a text
    list of paths, a manifest, one file of images, the address of shards (s3://, https://), or a sequence of these.
    PLACE:KEY chooses among the images that such a file, or a folder of them, holds (`Choice`). A folder that holds
    train/ beside val/ or test/ stands for its ``split``: "train", or "val". Images that a manifest in the folder
    (mirl-manifest.tsv) calls broken are left out.
    layout: "files" or "tar" decides for a folder that holds both; "auto" refuses it.
    labels: class numbers, from the sorted names of the first folder level, the list's second column, cls parts, or the
    files that hold the images.
    index_dir: the folder of the .idx files; default: beside the shards. use_manifest: leave out what a manifest calls
    broken. every_name: the source's `ledger` keeps the path of each file that is left out, not only counts by reason.
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
    parts = []
    if len(urls := [url for root in roots if (url := url_of(root)) is not None]) > 1:
        fetch_all(urls)
    for root in roots:
        if (url := url_of(root)) is not None:
            parts.append(open_remote(url, labels=labels, split=split, every_name=every_name))
            continue
        root, key = chosen_in(root.expanduser())
        reading = Reading(labels, key)
        try:
            one = partial(_open_one, root, layout, reading, index_folder, use_manifest, split, every_name)
            parts.append(find_patiently(one, shown(root)))
            if key and not isinstance(parts[-1], MemberSource):
                raise no_choice(root, key)
        except PermissionError as error:
            place = shown(os.fsdecode(error.filename or root))
            raise UserError(
                f"data {place} cannot be read (permission denied); grant read and search permission on it "
                "(chmod -R u+rX) and on the folders above it"
            ) from None
    if labels:
        _refuse_names_beside_numbers(roots, parts)
    if len(parts) == 1:
        return parts[0]
    joined = JoinedSource(parts)
    joined.ledger.notes += _overlaps(roots)
    return joined


def _overlaps(roots: Sequence[Path]) -> list[str]:
    """Return clauses for the ledger if images are seen twice, because one place is another or lies inside it."""
    places = [os.path.realpath(root.expanduser()) for root in roots]
    known = {place: root for place, root in zip(places, roots, strict=True) if not os.path.isfile(place)}
    notes, met = [], set()
    for place, root in zip(places, roots, strict=True):
        outer = next((above for above in map(os.fspath, Path(place).parents) if above in known), None)
        if place in met:
            notes.append(f"{shown(root)} is given twice: its images count twice")
        elif outer is not None and not (os.path.isfile(place) and root.suffix.lower() in listing.LIST_SUFFIXES):
            notes.append(f"{shown(root)} lies in {shown(known[outer])}: its images count twice")
        met.add(place)
    return notes[:3] + ([f"{len(notes) - 3} more overlap"] if len(notes) > 3 else [])


def _refuse_names_beside_numbers(roots: Sequence[Path], parts: Sequence[Source]) -> None:
    """Refuse class names in one part beside bare numbers in another: nothing says which names the numbers mean."""
    named = [root for root, part in zip(roots, parts, strict=True) if part.classes is not None]
    numbered = [root for root, part in zip(roots, parts, strict=True) if part.classes is None]
    if named and numbered:
        raise UserError(
            f"data has class names in {shown(named[0])} and class numbers alone in {shown(numbered[0])}: give all "
            "parts as class folders, or all as lists with numbers"
        )


def _open_one(
    root: Path, layout: str, reading: Reading, index_dir: Path | None, use_manifest: bool, split: str, every_name: bool
) -> Source:
    labels = reading.labels
    if root.is_file():
        if (held := container_of(root)) is not None:
            return MemberSource(root.parent, [root.name], held, reading=reading, every_name=every_name)
        kind = _kind_of_root(root)
        if kind == SHARD:
            return TarSource([root], index_dir=index_dir, labels=labels, every_name=every_name)
        if kind == "manifest":
            return open_manifest(root, labels, index_dir, leave_out=use_manifest, every_name=every_name)
        if kind == "list":
            paths, numbers = read_path_list(root)
            if labels and numbers is None:
                raise UserError(f"labels were asked for, but {shown(root)} has none; write 'path<TAB>label' lines")
            ledger = Ledger(every_name=every_name)
            there = existing_entries(root.parent, paths, ledger)
            if len(there) < len(paths):
                kept = set(there)
                refuse_misspelt(root, (path for entry, path in enumerate(paths) if entry not in kept))
                paths = [paths[entry] for entry in there]
                numbers = numbers and [numbers[entry] for entry in there]
            return FileSource(PathTable(root.parent, paths), labels=numbers if labels else None, ledger=ledger)
    return _open_folder(root, layout, reading, index_dir, use_manifest, split, every_name)


def _kind_of_root(root: Path) -> str:
    """Return SHARD, "manifest" or "list"; "" for a file that is no data set by itself."""
    try:
        if is_manifest(root):
            return "manifest"
        kind, head = kind_of_file(root, root.name), read_head(root)
    except OSError as error:
        if is_of_a_moment(error):
            raise
        raise UserError(f"{shown(root)} cannot be read ({error.strerror}); check its permissions") from None
    if kind == IMAGE:
        raise UserError(f"{shown(root)} is one image, not a data set: give its folder, or a text list of paths")
    if kind == SHARD:
        return SHARD
    suffix = root.suffix.lower()
    return "list" if suffix in listing.LIST_SUFFIXES or (not suffix and is_text(head)) else ""


def _open_folder(
    root: Path, layout: str, reading: Reading, index_dir: Path | None, use_manifest: bool, split: str, every_name: bool
) -> Source:
    labels, folder = reading.labels, listing.split_folder(root, split)
    found = listing.find_files(folder, every_name=every_name, containers=True)
    names, shards, ledger = found.images, found.shards, found.ledger
    if folder != root:
        ledger.notes.append(listing.beside_split(root, folder))
    if layout == "auto" and shards and names:
        one = shlex.quote(os.path.join(folder, shards[0]))
        raise UserError(
            f"{shown(folder)} holds {len(shards)} .tar files and {len(names)} images; choose layout tar or files: give "
            f"one kind by itself, e.g. --data {shown(one)}, or a folder of its own"
        )
    broken = broken_names(root, folder) if use_manifest else set()
    if layout == "auto" and found.containers and not names and not shards:
        return _open_containers(found, reading, split, broken, every_name)
    found.leave_out_containers()
    if layout == "tar" or (shards and layout == "auto"):
        return _open_shards(found, labels, index_dir, broken, every_name)
    for shard in shards:
        ledger.leave_out("tar shards (layout is files)", os.path.join(folder, shard))
    if not names:
        raise listing.nothing_found(found)
    # Classes are numbered before broken images are left out, so that an emptied class keeps its number.
    classes, numbers = listing.class_folders(names, folder) if labels else (None, None)
    if broken:
        kept = [i for i, name in enumerate(names) if name not in broken]
        for name in set(names) & broken:
            ledger.leave_out(f"broken by {MANIFEST_NAME}", os.path.join(folder, name))
        names = [names[i] for i in kept]
        numbers = [numbers[i] for i in kept] if numbers is not None else None
        if not names:
            raise UserError(f"all images of {shown(folder)} are broken by {MANIFEST_NAME}; see the reasons in it")
    return FileSource(PathTable(folder, names), labels=numbers, classes=classes, ledger=ledger)


def _open_containers(found: listing.Found, reading: Reading, split: str, broken: set[str], every_name: bool) -> Source:
    if len(found.containers) > 1:
        kinds = " and ".join(f"{len(files)} {kind} files" for kind, files in sorted(found.containers.items()))
        raise UserError(f"{shown(found.root)} holds {kinds}: give a folder of one kind, or the files one by one")
    ((kind, files),) = found.containers.items()
    names, others = [name for name, _ in files], []
    if kind == PARQUET:
        names, others = of_split(names, split)
    source = MemberSource(
        found.root,
        names,
        kind,
        reading=reading,
        passed_over=lambda name: f"broken by {MANIFEST_NAME}" if name in broken else None,
        class_folders=None if kind == PARQUET else listing.class_folders,
        every_name=every_name,
    )
    if others:
        taken = os.path.basename(names[0]).partition(".")[0].partition("-")[0]
        source.ledger.notes.append(f"{taken} of {shown(found.root)} is read, not {', '.join(sorted(others))}")
    found.ledger.images = 0
    source.ledger = join_ledgers([source.ledger, found.ledger]) if found.ledger.left_out else source.ledger
    source.ledger.notes += [note for note in found.ledger.notes if note not in source.ledger.notes]
    return source


def _open_shards(
    found: listing.Found, labels: bool, index_dir: Path | None, broken: set[str], every_name: bool
) -> Source:
    if not found.shards:
        raise UserError(f"no .tar files in {shown(found.root)}; compressed shards (.tar.gz) must be unpacked to .tar")
    skip = frozenset(os.path.join(found.root, name) for name in broken)
    shards = [found.root / name for name in found.shards]
    source = TarSource(shards, index_dir=index_dir, labels=labels, skip=skip, every_name=every_name)
    for name in found.images:
        found.ledger.leave_out("images (layout is tar)", os.path.join(found.root, name))
    # The indexes of the shards are not counted as left out: nobody misses them.
    found.ledger.images = 0
    indexes = [os.fspath(index_path(shard)) for shard in shards]
    found.ledger.forget(".idx", sum(map(os.path.exists, indexes)), set(indexes))
    source.ledger = join_ledgers([source.ledger, found.ledger]) if found.ledger.left_out else source.ledger
    source.ledger.notes += [note for note in found.ledger.notes if note not in source.ledger.notes]
    return source
