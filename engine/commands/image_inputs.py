"""Open the images of a command line, files, folders and lists mixed, as one `Source`. This needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mirl.dataloaders.sources.base import FileSource, JoinedSource, Source
from mirl.dataloaders.sources.kinds import IMAGE, kind_of_file
from mirl.dataloaders.sources.opening import open_source
from mirl.dataloaders.sources.paths import PathTable, chosen_in, shown, url_of
from mirl.errors import UserError


def open_images(paths: Sequence[Path], *, index_dir: Path | None = None) -> Source:
    """Open all images of ``paths``, in their order: image files, folders (at any depth), lists of paths, shards.

    Raises:
        UserError: a path does not exist, or holds no image.
    """
    parts: list[Source] = []
    files: list[str] = []

    def add_files() -> None:
        if files:
            parts.append(FileSource(PathTable("", list(files))))
            files.clear()

    for path in paths:
        if url_of(path) is None and not chosen_in(path)[0].exists():
            raise UserError(f"image {shown(path)} does not exist: give image files, folders or lists of paths")
        if path.is_file() and kind_of_file(str(path), path.name) == IMAGE:
            files.append(str(path))
            continue
        add_files()
        parts.append(open_source(path, labels=False, index_dir=index_dir, split="val"))
    add_files()
    return parts[0] if len(parts) == 1 else JoinedSource(parts)
