"""Writes a smaller copy of a data set: JPEG files, or tar shards, whose shorter side is at most a given length.

Small files cost less to read and decode. They change training a little: a random crop takes the same share of the
picture, but from fewer pixels, so more crops are enlarged. `prepare_data` measures by how much for the set at hand.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mirl.dataloaders.decoding.arrays import detect_array_format
from mirl.dataloaders.decoding.crops import Augmentation
from mirl.dataloaders.decoding.headers import read_header
from mirl.dataloaders.errors import ImageError
from mirl.dataloaders.parallel import Progress, default_workers, parallel_map
from mirl.dataloaders.sources.base import FileSource, Source
from mirl.dataloaders.sources.listing import ARRAY_SUFFIXES
from mirl.dataloaders.sources.manifest import atomic_writer
from mirl.dataloaders.sources.opening import open_source
from mirl.dataloaders.sources.tar_index import make_index
from mirl.dataloaders.tools.reencode import Encoder, FileTask, ShardTask, class_name, shrunk_size
from mirl.errors import UserError

SETTINGS_NAME = "mirl-prepare.json"
_SAMPLED = 2000


@dataclass(frozen=True, kw_only=True)
class PrepareReport:
    """written, kept (there from an earlier run), broken: (path, reason) pairs, bytes of what was written, seconds.

    enlarged_before, enlarged_after: share of the random crops (area 0.2 to 1 of the picture) that have fewer pixels
    than the training image, in the original and in the copy, over a sample of the set.
    """

    written: int
    kept: int
    broken: Sequence[tuple[str, str]]
    bytes_written: int
    seconds: float
    train_size: int
    enlarged_before: float
    enlarged_after: float

    def __str__(self) -> str:
        size = f"{self.bytes_written / max(1, self.written) / 1024:.0f} KiB each"
        lines = [
            f"{self.written} images written ({size}), {self.kept} kept, {len(self.broken)} broken, {self.seconds:.0f} s"
        ]
        lines += [f"  {path}: {reason}" for path, reason in self.broken[:20]]
        lines.append(
            f"random crops with fewer pixels than {self.train_size} x {self.train_size}: {self.enlarged_before:.0%} of "
            f"the originals', {self.enlarged_after:.0%} of the copies'; these are enlarged and softer"
        )
        return "\n".join(lines)


def prepare_data(
    src: str | Path,
    dst: str | Path,
    *,
    short_side: int = 256,
    quality: int = 90,
    shard_size: int | None = None,
    train_size: int = 224,
    layout: str = "auto",
    index_dir: str | Path | None = None,
    workers: int | None = None,
    progress: Progress = True,
) -> PrepareReport:
    """Re-encodes `src` into `dst` in parallel. Run it again after an interruption: what is whole is kept.

    short_side: pixels; smaller images keep their size, and upright RGB JPEG files among them their bytes. quality: of
    JPEG. shard_size: images per tar shard (WebDataset, with index, and class numbers where `src` has class folders);
    default: loose files under the names of the source, ending in .jpg. train_size: image side for the report's crops.
    Images are written upright, as RGB, without metadata, each file or shard appearing whole by a rename. Broken images
    are left out and listed. UserError if `dst` was made with other settings, is inside `src`, or there is no data.
    """
    begin = time.perf_counter()
    source_root, target = Path(src).expanduser(), Path(dst).expanduser()
    if short_side < 1 or not 1 <= quality <= 100 or (shard_size is not None and shard_size < 1):
        raise UserError(
            f"short_side {short_side} and shard_size {shard_size} must be at least 1, quality {quality} within 1..100"
        )
    if target.resolve().is_relative_to(source_root.resolve()):
        raise UserError(f"dst {target} is inside src {source_root}; choose a folder outside of it")
    source = open_source(source_root, layout=layout, index_dir=index_dir)
    try:
        if source.path(0).endswith(ARRAY_SUFFIXES):
            raise UserError(f"{source.path(0)} is an array file; only pictures are re-encoded to JPEG")
        settings = {"short_side": short_side, "quality": quality, "shard_size": shard_size}
        _claim(target, settings | {"source": source.fingerprint()})
        before, after = _enlarged_shares(source, short_side, train_size)
        encode = Encoder(short_side, quality)
        tasks = _file_tasks(source, target) if shard_size is None else _shard_tasks(source, target, shard_size)
        written, kept, size, broken = 0, 0, 0, []
        for done in parallel_map(
            lambda task: task.run(encode),
            tasks,
            total=source.num_images if shard_size is None else -(-source.num_images // shard_size),
            workers=workers or default_workers(),
            unit="image" if shard_size is None else "shard",
            progress=progress,
        ):
            written, kept, size = written + done.written, kept + done.kept, size + done.bytes
            broken += done.broken
    finally:
        source.close()
    if shard_size is not None:
        make_index(target, progress=False)
    return PrepareReport(
        written=written,
        kept=kept,
        broken=broken,
        bytes_written=size,
        seconds=time.perf_counter() - begin,
        train_size=train_size,
        enlarged_before=before,
        enlarged_after=after,
    )


def _file_tasks(source: Source, target: Path) -> Iterator[FileTask]:
    taken: set[str] = set()
    for index in range(source.num_images):
        name = _relative_name(source, index)
        stem, suffix = os.path.splitext(name)
        wanted = f"{stem}.jpg" if f"{stem}.jpg" not in taken else f"{stem}{suffix}.jpg"  # a.png beside a.jpg
        taken.add(wanted)
        yield FileTask(source, index, target / wanted)


def _shard_tasks(source: Source, target: Path, shard_size: int) -> Iterator[ShardTask]:
    classes = None
    if isinstance(source, FileSource):
        names = {class_name(source, i) for i in range(source.num_images)}
        if "" not in names:
            classes = {name: number for number, name in enumerate(sorted(names))}
    for number, first in enumerate(range(0, source.num_images, shard_size)):
        end = min(first + shard_size, source.num_images)
        yield ShardTask(source, first, end, target / f"shard-{number:06d}.tar", classes)


def _relative_name(source: Source, index: int) -> str:
    """The name below the source's folder; of a tar member, its name below a folder named for the shard."""
    if isinstance(source, FileSource) and not os.path.isabs(source.paths.name(index)):
        return os.path.normpath(source.paths.name(index)).replace("../", "")
    shard, separator, member = source.path(index).partition("::")
    return f"{Path(shard).stem}/{member}" if separator else source.path(index).lstrip("/")


def _claim(target: Path, settings: dict[str, object]) -> None:
    """Records how the copy is made; UserError if it was begun in another way or the folder holds something else."""
    record = target / SETTINGS_NAME
    if record.exists():
        known = json.loads(record.read_text())
        other = [
            f"{name} {known.get(name)} (now {value})" for name, value in settings.items() if known.get(name) != value
        ]
        if other:
            raise UserError(f"{target} was begun with {', '.join(other)}; go on with that, or choose an empty folder")
        return
    if target.exists() and any(target.iterdir()):
        raise UserError(f"{target} is not empty and was not made by prepare-data; choose an empty or new folder")
    with atomic_writer(record) as file:
        json.dump(settings, file, indent=1)


def _enlarged_shares(source: Source, short_side: int, train_size: int) -> tuple[float, float]:
    """Share of random crops with fewer than train_size^2 pixels, of the originals and of the copies."""
    sizes = []
    for index in np.unique(np.linspace(0, source.num_images - 1, _SAMPLED).astype(int)).tolist():
        try:
            data = source.read(index)
            if detect_array_format(data, source.path(index), 3) is None:
                header = read_header(data)
                sizes.append((header.height, header.width))
        except ImageError:
            continue  # counted as broken when its turn comes
    if not sizes:
        return float("nan"), float("nan")
    small = [shrunk_size(height, width, short_side) for height, width in sizes]
    crops = Augmentation(image_size=(train_size, train_size))

    def share(sizes_B2: np.ndarray) -> float:
        windows_B4, _ = crops.windows(sizes_B2.repeat(10, axis=0), 0, 0, np.arange(10 * len(sizes_B2)))
        return float((windows_B4[:, 2].astype(np.int64) * windows_B4[:, 3] < train_size**2).mean())

    return share(np.array(sizes)), share(np.array(small))
