"""Write a smaller copy of a data set: JPEG files, loose or in tar shards, whose shorter side is at most a given length.

Small files cost less to read and decode. They change training a little: a random crop takes the same share of the
picture, but from fewer pixels, so more crops are enlarged. `prepare_data` measures how many more for the set at hand.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from mirl.dataloaders.decoding.arrays import detect_array_format
from mirl.dataloaders.decoding.crops import Augmentation
from mirl.dataloaders.decoding.headers import read_header
from mirl.dataloaders.errors import ImageError
from mirl.dataloaders.parallel import Progress, default_workers, parallel_map
from mirl.dataloaders.sources.base import FileSource, Source
from mirl.dataloaders.sources.class_names import write_class_names
from mirl.dataloaders.sources.listing import ARRAY_SUFFIXES, split_names
from mirl.dataloaders.sources.manifest import atomic_writer
from mirl.dataloaders.sources.opening import open_source
from mirl.dataloaders.sources.tar_index import make_index
from mirl.dataloaders.tools.carried_labels import Numbering, Split, one_numbering, open_labelled
from mirl.dataloaders.tools.reencode import Encoder, FileTask, ShardTask, shrunk_size
from mirl.dataloaders.tools.target_names import TargetNames, name_in_source, safe_name
from mirl.errors import UserError

SETTINGS_NAME = "mirl-prepare.json"
LIST_NAME = "mirl-list.txt"
_SAMPLED = 2000


@dataclass(frozen=True, kw_only=True)
class PrepareReport:
    """A report says what one call of `prepare_data` did.

    written, kept: images written, and found from an earlier run. broken: (path, reason) pairs. bytes_written, seconds:
    size of the written images, and time. enlarged_before, enlarged_after: share of the random crops (area 0.2 to 1 of
    the picture) that have fewer pixels than the training image, in the original and in the copy, over a sample of the
    set. splits: images of the source by split ("" if it has none). labels: how they were kept, or why not. account: see
    `Ledger`.
    """

    written: int
    kept: int
    broken: Sequence[tuple[str, str]]
    bytes_written: int
    seconds: float
    train_size: int
    enlarged_before: float
    enlarged_after: float
    splits: dict[str, int]
    labels: str
    account: str = ""

    def __str__(self) -> str:
        size = f"{self.bytes_written / max(1, self.written) / 1024:.0f} KiB each"
        lines = [f"data {self.account}"] if self.account else []
        lines += [
            f"{self.written} images written ({size}), {self.kept} kept, {len(self.broken)} broken, {self.seconds:.0f} s"
        ]
        lines += [f"  {path}: {reason}" for path, reason in self.broken[:20]]
        if len(self.broken) > 20:
            lines.append(f"  and {len(self.broken) - 20} more")
        if len(self.splits) > 1:
            lines.append("splits: " + ", ".join(f"{name} {count} images" for name, count in self.splits.items()))
        lines.append(f"labels: {self.labels}")
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
    """Re-encode `src` into `dst` in parallel. Call it again after an interruption: whole files are kept.

    short_side: pixels; smaller images keep their size, and upright RGB JPEG files among them their bytes. quality: of
    JPEG. shard_size: images per tar shard (WebDataset, with index); default: loose files under the names of the source,
    ending in .jpg. train_size: image side for the report's crops.
    A root that holds train/ beside val/ or test/ is copied with all of these folders. Labels are kept. Shards have them
    as cls parts, with the class names beside them (mirl-classes.txt), numbered alike in all splits. Loose files have
    class folders or, if the classes have no names, a list (mirl-list.txt) of paths and numbers.
    Images are written upright, as RGB, without metadata. Each file or shard appears whole by a rename, and never
    outside of `dst`: a name such as ../../a.jpg loses its first parts. Broken images are left out and listed.
    UserError if `dst` was made with other settings, is inside `src`, or there is no data.
    """
    begin = time.perf_counter()
    source_root, target = Path(src).expanduser(), Path(dst).expanduser()
    if short_side < 1 or not 1 <= quality <= 100 or (shard_size is not None and shard_size < 1):
        raise UserError(
            f"short_side {short_side} and shard_size {shard_size} must be at least 1, quality {quality} within 1..100"
        )
    if target.resolve().is_relative_to(source_root.resolve()):
        raise UserError(f"dst {target} is inside src {source_root}; choose a folder outside of it")
    splits = _open_splits(source_root, layout, index_dir)
    try:
        for split in splits:
            if split.source.path(0).endswith(ARRAY_SUFFIXES) or getattr(split.source, "arrays", False):
                raise UserError(f"{split.source.path(0)} is an array file; only pictures are re-encoded to JPEG")
        numbering = one_numbering(splits)
        settings = {
            "short_side": short_side,
            "quality": quality,
            "shard_size": shard_size,
            "labels": numbering.digest(),
        }
        _claim(target, settings | {"source": "/".join(split.source.fingerprint() for split in splits)})
        before, after = _enlarged_shares([split.source for split in splits], short_side, train_size)
        jobs = [_split_tasks(split, numbering, target / split.name, shard_size) for split in splits]
        written, kept, size, broken = 0, 0, 0, []
        encode = Encoder(short_side, quality)
        for done in parallel_map(
            lambda task: task.run(encode),
            chain.from_iterable(tasks for tasks, _ in jobs),
            total=sum(count for _, count in jobs),
            workers=workers or default_workers(),
            unit="image" if shard_size is None else "shard",
            progress=progress,
        ):
            written, kept, size = written + done.written, kept + done.kept, size + done.bytes
            broken += done.broken
        if shard_size is None:
            for split in splits:
                _write_list(split, numbering, target / split.name)
    finally:
        for split in splits:
            split.source.close()
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
        splits={split.name: split.source.num_images for split in splits},
        labels=str(numbering),
        account="; ".join(filter(None, (str(split.source.ledger) for split in splits))),
    )


def _open_splits(root: Path, layout: str, index_dir: str | Path | None) -> list[Split]:
    """Open the whole of `root` as one split without a name, or each of the standard splits that it holds."""

    def opened(folder: Path, name: str) -> Split:
        return open_labelled(
            name, lambda labels: open_source(folder, layout=layout, labels=labels, index_dir=index_dir)
        )

    names = split_names(root)
    return [opened(root / name, name) for name in names] if names else [opened(root, "")]


def _split_tasks(
    split: Split, numbering: Numbering, target: Path, shard_size: int | None
) -> tuple[Iterator[FileTask] | Iterator[ShardTask], int]:
    """Return the tasks of one split and their number."""
    source, label = split.source, numbering.of(split)
    if shard_size is None:
        return (
            FileTask(source, index, target / name, label) for index, name in _target_names(split)
        ), source.num_images
    if label is not None and numbering.names is not None:
        write_class_names(target, numbering.names)
    starts = range(0, source.num_images, shard_size)
    return (
        ShardTask(source, first, min(first + shard_size, source.num_images), target / f"shard-{number:06d}.tar", label)
        for number, first in enumerate(starts)
    ), len(starts)


def _target_names(split: Split) -> Iterator[tuple[int, str]]:
    """Give (image, its name in the copy). Images out of shards go into class folders if the classes have names."""
    names, source = TargetNames(), split.source
    named = not split.unlabelled and source.classes is not None and not isinstance(source, FileSource)
    folders = [safe_name(name.replace("/", "_")) for name in source.classes or ()] if named else []
    if len(set(folders)) < len(folders):
        raise UserError(f"two of the classes of {source.path(0)} would share a folder; give shard_size")
    for index in range(source.num_images):
        name = name_in_source(source, index)
        try:
            yield index, names.take(f"{folders[source.label(index)]}/{name}" if named else name)
        except ImageError:  # its label cannot be read; its task will list it as broken
            yield index, names.take(name)


def _write_list(split: Split, numbering: Numbering, target: Path) -> None:
    """Write the paths and class numbers of a labelled split whose copy has no class folders."""
    label = numbering.of(split)
    if label is None or split.source.classes is not None:
        return
    with atomic_writer(target / LIST_NAME) as file:
        for index, name in _target_names(split):
            if (target / name).exists():
                file.write(f"{name}\t{label(index)}\n")


def _claim(target: Path, settings: dict[str, object]) -> None:
    """Record how the copy is made. UserError if it was begun in another way or the folder holds something else."""
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


def _enlarged_shares(sources: Sequence[Source], short_side: int, train_size: int) -> tuple[float, float]:
    """Return the shares of random crops with fewer than train_size^2 pixels, for the originals and for the copies."""
    sizes = []
    total = sum(source.num_images for source in sources)
    for source in sources:
        sampled = np.linspace(0, source.num_images - 1, max(1, _SAMPLED * source.num_images // total))
        for index in np.unique(sampled.astype(int)).tolist():
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
