"""Decodes a whole data set once and writes down what is broken, so that training need not find out."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mirl.dataloaders.decoding.arrays import ArrayFormat
from mirl.dataloaders.decoding.headers import decode_with_pillow, read_header
from mirl.dataloaders.errors import ImageError
from mirl.dataloaders.parallel import Progress, default_workers, parallel_map
from mirl.dataloaders.sources.base import Source
from mirl.dataloaders.sources.manifest import MANIFEST_NAME, ManifestRow, write_manifest
from mirl.dataloaders.sources.opening import open_source
from mirl.dataloaders.train_loader import first_array_format
from mirl.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ValidationReport:
    """num_images looked at, the rows of the broken ones, how many of each format, where the manifest is, seconds."""

    num_images: int
    bad: Sequence[ManifestRow]
    formats: dict[str, int]
    manifest: Path
    seconds: float

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {name}" for name, count in sorted(self.formats.items(), key=lambda item: -item[1]))
        rate = self.num_images / max(self.seconds, 1e-9)
        lines = [f"{self.num_images} images ({kinds}), {len(self.bad)} broken, {rate:.0f} images/s; {self.manifest}"]
        lines += [f"  {row.path}: {row.reason}" for row in self.bad[:20]]
        if len(self.bad) > 20:
            lines.append(f"  and {len(self.bad) - 20} more, listed in the manifest")
        return "\n".join(lines)


def validate_data(
    data: str | Path,
    *,
    manifest: str | Path | None = None,
    layout: str = "auto",
    index_dir: str | Path | None = None,
    channels: int = 3,
    workers: int | None = None,
    progress: Progress = True,
) -> ValidationReport:
    """Decodes every image of `data` in full and writes a manifest; nothing of the data is changed.

    data, layout, index_dir: as in `open_source`, one place. manifest: where to write; default mirl-manifest.tsv in the
    folder `data`, where training finds it and leaves the broken images out. channels: 3, 1, or that of array files.
    workers: threads, default one a core. progress: a bar, nothing, or a function of (done, total).
    An image is broken if it cannot be read, is empty or cut, is no image, or Pillow cannot decode all of it.
    UserError with the mend if there is no data, or the manifest cannot be written.
    """
    begin = time.perf_counter()
    root = Path(data).expanduser()
    if manifest is None and not root.is_dir():
        raise UserError(f"{root} is not a folder; say where the manifest goes (--manifest PATH)")
    target = Path(manifest) if manifest is not None else root / MANIFEST_NAME
    _check_writable(target)
    source = open_source(root, layout=layout, index_dir=index_dir, use_manifest=False)
    base = str(root.resolve() if root.is_dir() else root.resolve().parent)
    try:
        array_format = first_array_format(source, channels)
        rows = list(
            parallel_map(
                lambda index: _look_at(source, index, base, channels, array_format),
                range(source.num_images),
                total=source.num_images,
                workers=workers or default_workers(),
                unit="image",
                progress=progress,
            )
        )
    finally:
        source.close()
    write_manifest(target, base, rows)
    return ValidationReport(
        num_images=len(rows),
        bad=[row for row in rows if row.reason],
        formats=dict(Counter(row.format or "unknown" for row in rows)),
        manifest=target,
        seconds=time.perf_counter() - begin,
    )


def _look_at(source: Source, index: int, base: str, channels: int, array_format: ArrayFormat | None) -> ManifestRow:
    path = os.path.relpath(os.path.abspath(source.path(index)), base)
    size, height, width, kind, reason = 0, 0, 0, "", ""
    try:
        data = source.read(index)
        size = len(data)
        if array_format is not None:
            kind = "array"
            height, width, _ = array_format.read(data).shape
        else:
            header = read_header(data)
            kind = header.format
            height, width, _ = decode_with_pillow(data, channels).shape
    except ImageError as error:
        reason = str(error)
    return ManifestRow(path, size, height, width, kind, reason)


def _check_writable(target: Path) -> None:
    folder = target.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"the manifest cannot be written to {folder}; name another place (--manifest PATH)")
