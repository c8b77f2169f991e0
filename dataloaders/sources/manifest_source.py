"""A manifest as a data set: the images that it calls good; and as a list of those that are to be left out."""

from __future__ import annotations

import os
from pathlib import Path

from mirl.dataloaders.sources import listing
from mirl.dataloaders.sources.base import FileSource, JoinedSource, Source
from mirl.dataloaders.sources.ledger import Ledger
from mirl.dataloaders.sources.manifest import LEFT_OUT, MANIFEST_NAME, ManifestRow, manifest_command, read_manifest
from mirl.dataloaders.sources.paths import PathTable, shard_of, shown
from mirl.dataloaders.sources.tar_source import TarSource
from mirl.errors import UserError


def open_manifest(
    manifest: Path, labels: bool, index_dir: Path | None, *, leave_out: bool = True, every_name: bool = False
) -> Source:
    """The good images of a manifest: loose files, members of shards (which need their indexes), or both.

    leave_out: False takes those in too that the manifest calls broken.
    """
    root, rows = read_manifest(manifest)
    root = root if Path(root).is_dir() else str(manifest.parent)  # the data set was moved with its manifest
    known = [row for row in rows if not row.reason.startswith(LEFT_OUT)]
    good = [row.path for row in known if not (leave_out and row.reason)]
    if not good:
        raise UserError(f"{shown(manifest)} names no good image; validate another folder")
    members = {path: shard for path in good if (shard := shard_of(path, root)) is not None}
    parts: list[Source] = []
    files = [path for path in good if path not in members]
    if files:
        ledger = Ledger(every_name=every_name)
        taken = set(files)
        for row in rows:
            if row.reason and row.path not in taken and shard_of(row.path, root) is None:
                ledger.leave_out(_reason(row), os.path.join(root, row.path))
        classes, numbers = listing.class_folders(files, Path(root)) if labels else (None, None)
        parts.append(FileSource(PathTable(root, files), labels=numbers, classes=classes, ledger=ledger))
    if members:
        parts.append(_open_members(manifest, root, members, labels, index_dir, every_name))
    return parts[0] if len(parts) == 1 else JoinedSource(parts)


def _open_members(
    manifest: Path, root: str, members: dict[str, str], labels: bool, index_dir: Path | None, every_name: bool
) -> Source:
    shards = [Path(root, shard) for shard in dict.fromkeys(members.values())]
    only = frozenset(os.path.join(root, path) for path in members)
    source = TarSource(shards, index_dir=index_dir, labels=labels, only=only, every_name=every_name)
    if source.num_images < len(only):
        source.close()
        raise UserError(
            f"manifest {shown(manifest)} names {len(only)} members, the shards have {source.num_images} of them: "
            f"they changed; write it again with: {manifest_command(manifest, root)}"
        )
    return source


def broken_names(root: Path, folder: Path) -> set[str]:
    """Names relative to `folder` that a manifest in it, or in the folder `root` above its split, calls broken."""
    broken: set[str] = set()
    for place in {root, folder}:
        manifest = place / MANIFEST_NAME
        if manifest.is_file():
            inside = "" if place == folder else f"{folder.name}/"
            for row in read_manifest(manifest)[1]:
                if row.reason and not row.reason.startswith(LEFT_OUT) and row.path.startswith(inside):
                    broken.add(row.path.removeprefix(inside))
    return broken


def _reason(row: ManifestRow) -> str:
    return row.reason.removeprefix(LEFT_OUT) if row.reason.startswith(LEFT_OUT) else "broken by the manifest"
