"""Use a manifest as a data set, of the images that it calls good, or as a list of images to leave out."""

from __future__ import annotations

import os
from pathlib import Path

from mirl.dataloaders.sources import listing
from mirl.dataloaders.sources.base import FileSource, JoinedSource, Source
from mirl.dataloaders.sources.containers import PARQUET, Reading, container_kind, container_of
from mirl.dataloaders.sources.kinds import IMAGE, kind_by_name
from mirl.dataloaders.sources.ledger import Ledger
from mirl.dataloaders.sources.manifest import LEFT_OUT, MANIFEST_NAME, ManifestRow, manifest_command, read_manifest
from mirl.dataloaders.sources.member_source import MemberSource
from mirl.dataloaders.sources.paths import PathTable, chosen_in, shard_of, shown, url_of
from mirl.dataloaders.sources.remote import open_remote_members
from mirl.dataloaders.sources.tar_source import TarSource
from mirl.errors import UserError


def open_manifest(
    manifest: Path, labels: bool, index_dir: Path | None, *, leave_out: bool = True, every_name: bool = False
) -> Source:
    """Open the good images of a manifest: loose files, members of shards or of other files that hold several, or all.

    Shards on this machine need their indexes. leave_out: False takes in the images too that the manifest calls broken.
    """
    root, rows = read_manifest(manifest)
    root = root if Path(root).is_dir() else str(manifest.parent)  # the data set was moved with its manifest
    known = [row for row in rows if not row.reason.startswith(LEFT_OUT)]
    good = [row.path for row in known if not (leave_out and row.reason)]
    if not good:
        raise UserError(f"{shown(manifest)} names no good image; validate another folder")
    remote = [path for path in good if url_of(path) is not None]
    good = [path for path in good if url_of(path) is None]
    members = {path: shard for path in good if (shard := shard_of(path, root)) is not None}
    # A DICOM file and the like may be a single image, whose name is the file's.
    members |= {path: path for path in good if path not in members and _holds_images(root, path)}
    kinds = {shard: _kind_and_key(root, shard) for shard in set(members.values())}
    parts: list[Source] = []
    files = [path for path in good if path not in members]
    if files:
        ledger = Ledger(every_name=every_name)
        taken = set(files)
        for row in rows:
            if row.reason and row.path not in taken and not _is_member(row.path, root):
                ledger.leave_out(_reason(row), os.path.join(root, row.path))
        classes, numbers = listing.class_folders(files, Path(root)) if labels else (None, None)
        parts.append(FileSource(PathTable(root, files), labels=numbers, classes=classes, ledger=ledger))
    if in_tars := {path: shard for path, shard in members.items() if kinds[shard][0] is None}:
        parts.append(_open_members(manifest, root, in_tars, labels, index_dir, every_name))
    for kind, key in sorted({(kind, key) for kind, key in kinds.values() if kind is not None}):
        held = {path: shard for path, shard in members.items() if kinds[shard] == (kind, key)}
        parts.append(_open_held(manifest, root, kind, key, held, labels, every_name))
    if remote:
        parts.append(open_remote_members(remote, labels=labels, every_name=every_name))
        if parts[-1].num_images < len(remote):
            raise _changed(manifest, root, "shards", len(remote), parts[-1].num_images)
    return parts[0] if len(parts) == 1 else JoinedSource(parts)


def _open_members(
    manifest: Path, root: str, members: dict[str, str], labels: bool, index_dir: Path | None, every_name: bool
) -> Source:
    shards = [Path(root, shard) for shard in dict.fromkeys(members.values())]
    only = frozenset(os.path.join(root, path) for path in members)
    source = TarSource(shards, index_dir=index_dir, labels=labels, only=only, every_name=every_name)
    if source.num_images < len(only):
        source.close()
        raise _changed(manifest, root, "shards", len(only), source.num_images)
    return source


def _open_held(
    manifest: Path, root: str, kind: str, key: str, members: dict[str, str], labels: bool, every_name: bool
) -> Source:
    """Open the members of files that hold several images each; ``key`` chooses among them."""
    end = len(key) + 1 if key else 0
    source = MemberSource(
        Path(root),
        list(dict.fromkeys(file[: len(file) - end] for file in members.values())),
        kind,
        reading=Reading(labels, key),
        passed_over=lambda name: None if name in members else "not called good by the manifest",
        class_folders=None if kind == PARQUET else listing.class_folders,
        every_name=every_name,
    )
    if source.num_images < len(members):
        source.close()
        raise _changed(manifest, root, f"{kind} files", len(members), source.num_images)
    return source


def _changed(manifest: Path, root: str, files: str, named: int, there: int) -> UserError:
    return UserError(
        f"manifest {shown(manifest)} names {named} members, the {files} have {there} of them: "
        f"they changed; write it again with: {manifest_command(manifest, root)}"
    )


def broken_names(root: Path, folder: Path) -> set[str]:
    """Return names, relative to `folder`, that a manifest in it, or in `root` above a split, calls broken."""
    broken: set[str] = set()
    for place in {root, folder}:
        manifest = place / MANIFEST_NAME
        if manifest.is_file():
            inside = "" if place == folder else f"{folder.name}/"
            for row in read_manifest(manifest)[1]:
                if row.reason and not row.reason.startswith(LEFT_OUT) and row.path.startswith(inside):
                    broken.add(row.path.removeprefix(inside))
    return broken


def _kind_and_key(root: str, file: str) -> tuple[str | None, str]:
    """Return the kind of a file that holds several images, or None, and the key that chooses in it."""
    place, key = chosen_in(os.path.join(root, file))
    return container_of(place), key


def _holds_images(root: str, path: str) -> bool:
    """Say whether ``path`` names a file that holds images, such as DICOM, and is no encoded image itself."""
    known = kind_by_name(path)
    return known != IMAGE and (container_kind(path) or _kind_and_key(root, path)[0]) is not None


def _is_member(path: str, root: str) -> bool:
    return url_of(path) is not None or shard_of(path, root) is not None


def _reason(row: ManifestRow) -> str:
    return row.reason.removeprefix(LEFT_OUT) if row.reason.startswith(LEFT_OUT) else "broken by the manifest"
