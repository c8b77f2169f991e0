"""Decode a whole data set once and write down which images are broken, so that training need not find out."""

from __future__ import annotations

import dataclasses
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mirl.dataloaders.decoding.arrays import ArrayFormat
from mirl.dataloaders.decoding.headers import decode_with_pillow, read_header
from mirl.dataloaders.errors import ImageError
from mirl.dataloaders.parallel import Progress, default_workers, parallel_map
from mirl.dataloaders.sources.base import Source
from mirl.dataloaders.sources.listing import split_names
from mirl.dataloaders.sources.manifest import LEFT_OUT, MANIFEST_NAME, ManifestRow, write_manifest
from mirl.dataloaders.sources.opening import open_source
from mirl.dataloaders.sources.paths import below, chosen_in, joined, shown, url_of
from mirl.dataloaders.sources.patience import read_image
from mirl.dataloaders.tools.overview import Look, Overview, look_at, picture_form
from mirl.dataloaders.train_loader import first_array_format
from mirl.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ValidationReport:
    """A report says what one call of `validate_data` found.

    num_images: how many were decoded. bad: the rows of the broken ones. formats: how many images of each format.
    manifest, manifests: the first that was written, and all, one for each split. account: how many files were found and
    why some are no images (see `Ledger`). left_out: a row for each of those. value_range: least and greatest number of
    array files, before uint16 is divided by 65535; None for pictures. overviews: of the good images, one for each
    split.
    """

    num_images: int
    bad: Sequence[ManifestRow]
    formats: dict[str, int]
    manifest: Path
    manifests: Sequence[Path]
    seconds: float
    value_range: tuple[float, float] | None
    account: str = ""
    left_out: Sequence[ManifestRow] = ()
    overviews: Sequence[Overview] = ()

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {name}" for name, count in sorted(self.formats.items(), key=lambda item: -item[1]))
        rate = self.num_images / max(self.seconds, 1e-9)
        lines = [f"data {self.account}"] if self.account else []
        written = ", ".join(map(str, self.manifests))
        lines.append(f"{self.num_images} images ({kinds}), {len(self.bad)} broken, {rate:.0f} images/s; {written}")
        if self.value_range is not None:
            lines.append(f"  values of the arrays: {self.value_range[0]:g} to {self.value_range[1]:g}")
        lines += [f"  {line}" for overview in self.overviews for line in overview.lines()]
        for rows in (self.bad, self.left_out):
            lines += [f"  {shown(row.path)}: {row.reason}" for row in rows[:20]]
            if len(rows) > 20:
                lines.append(f"  and {len(rows) - 20} more, listed in the manifest")
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
    """Decode every image of `data` in full and write a manifest; nothing of the data is changed.

    data, layout, index_dir: as in `open_source`, one place. manifest: the file to write; default mirl-manifest.tsv in
    the folder `data`, where training finds it and leaves the broken images out. A root that holds train/ beside val/ or
    test/ is validated with all of these folders, each of which gets a manifest.
    channels: 3, 1, or that of array files. workers: threads, default one a core. progress: a bar, nothing, or a
    function of (done, total) of one folder.
    An image is broken if training would replace it: it cannot be read, is empty or cut, is no image, is of another kind
    than the first of its folder, holds NaN or infinity, or cannot be decoded to its end.
    UserError with the mend if there is no data, or the manifest cannot be written.
    """
    begin = time.perf_counter()
    root, key = chosen_in(Path(data).expanduser())
    splits = [root / name for name in split_names(root)]
    if manifest is not None and splits:
        names = ", ".join(split.name for split in splits)
        raise UserError(f"manifest is {manifest}, but {root} holds {names}: give one of them, or leave it out")
    if manifest is None and not root.is_dir():
        raise UserError(f"{url_of(root) or root} is not a folder; say where the manifest goes (--manifest PATH)")
    targets = [Path(manifest)] if manifest is not None else [place / MANIFEST_NAME for place in splits or [root]]
    for target in targets:
        _check_writable(target)
    rows: list[ManifestRow] = []
    left_out: list[ManifestRow] = []
    looks: list[_Look] = []
    accounts: list[str] = []
    overviews: list[Overview] = []
    for place, target in zip(splits or [root], targets, strict=True):
        source, labelled = _open(Path(f"{place}:{key}") if key else place, layout, index_dir)
        # Not resolved: training names images below the folder as it is given, which may be a link.
        base = url_of(place) or os.path.abspath(place if place.is_dir() else place.parent)
        found = _look_at_all(source, base, channels, workers or default_workers(), progress, labelled)
        passed_over = [
            ManifestRow(below(_absolute(path), base), 0, 0, 0, "", LEFT_OUT + reason)
            for path, reason in sorted(source.ledger.names or ())
        ]
        write_manifest(target, base, [*(look.row for look in found), *passed_over])
        prefix = f"{place.name}/" if splits else ""
        accounts.append(f"{prefix}{': ' if prefix else ''}{source.ledger}")
        looks += found
        good = [look for look in found if look.seen is not None]
        overviews.append(
            Overview.of(
                place.name if splits else "",
                [look.seen for look in good if look.seen is not None],
                [look.label for look in good] if labelled else None,
                source.classes,
            )
        )
        rows += [dataclasses.replace(look.row, path=prefix + look.row.path) for look in found]
        left_out += [dataclasses.replace(row, path=prefix + row.path) for row in passed_over]
    values = [look.values for look in looks if look.values is not None]
    return ValidationReport(
        num_images=len(rows),
        bad=[row for row in rows if row.reason],
        formats=dict(Counter(row.format or "unknown" for row in rows)),
        manifest=targets[0],
        manifests=targets,
        seconds=time.perf_counter() - begin,
        value_range=(min(low for low, _ in values), max(high for _, high in values)) if values else None,
        account="; ".join(accounts),
        left_out=left_out,
        overviews=overviews,
    )


def _open(place: Path, layout: str, index_dir: str | Path | None) -> tuple[Source, bool]:
    """Open the source, and say whether it has labels: a set need not have any."""
    opened = partial(open_source, place, layout=layout, index_dir=index_dir, use_manifest=False, every_name=True)
    try:
        return opened(labels=True), True
    except (UserError, ImageError):
        return opened(), False


@dataclass(frozen=True, slots=True)
class _Look:
    """This was found of one image. values: least and greatest number of an array. seen: None for a broken image.

    label: -1 if it has none.
    """

    row: ManifestRow
    values: tuple[float, float] | None = None
    seen: Look | None = None
    label: int = -1


def _look_at_all(
    source: Source, base: str, channels: int, workers: int, progress: Progress, labelled: bool
) -> list[_Look]:
    try:
        array_format = first_array_format(source, channels)
        return list(
            parallel_map(
                lambda index: _look_at(source, index, base, channels, array_format, labelled),
                range(source.num_images),
                total=source.num_images,
                workers=workers,
                unit="image",
                progress=progress,
            )
        )
    finally:
        source.close()


def _look_at(
    source: Source, index: int, base: str, channels: int, array_format: ArrayFormat | None, labelled: bool
) -> _Look:
    path = below(_absolute(source.path(index)), base)
    size, height, width, kind, reason, values, seen = 0, 0, 0, "", "", None, None
    try:
        data = read_image(source, index)
        size = len(data)
        if array_format is not None:
            kind = "array"
            array = array_format.read(data)
            height, width, _ = array.shape
            values = float(array.min()), float(array.max())
            seen = look_at(array, str(array.dtype))
        else:
            header = read_header(data)
            kind = header.format
            pixels = decode_with_pillow(data, channels)
            height, width, _ = pixels.shape
            seen = look_at(pixels, *picture_form(data))
    except ImageError as error:
        reason = str(error)
    label = _label(source, index) if labelled and seen is not None else -1
    return _Look(ManifestRow(path, size, height, width, kind, reason), values, seen, label)


def _label(source: Source, index: int) -> int:
    try:
        return source.label(index)
    except (ImageError, ValueError):
        return -1  # training with labels will say what is wrong


def _absolute(path: str) -> str:
    """Return the path from the root, not normalised: a member of a tar may hold ../ or //, which are no folders."""
    return joined(os.getcwd(), path)


def _check_writable(target: Path) -> None:
    folder = target.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"the manifest cannot be written to {folder}; name another place (--manifest PATH)")
