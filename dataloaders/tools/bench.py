"""Measure the loader: images per second by threads and image size, and the rate of reading alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mirl.dataloaders.decoding.samples import SampleReader
from mirl.dataloaders.order import epoch_permutation
from mirl.dataloaders.parallel import default_workers
from mirl.dataloaders.sources.base import Source
from mirl.dataloaders.sources.opening import Data, open_source
from mirl.dataloaders.train_loader import build_train_loader, first_array_format
from mirl.errors import UserError


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """A row is one measurement. read_images_per_s: reading and parsing headers alone, with the same reading threads."""

    threads: int
    image_size: tuple[int, int]
    micro_batch: int
    images_per_s: float
    read_images_per_s: float
    bad_images: int


def bench_loader(
    data: Data,
    *,
    image_sizes: Sequence[tuple[int, int]] = ((224, 224),),
    threads: Sequence[int] | None = None,
    micro_batch: int = 64,
    seconds: float = 10.0,
    device_id: int | None = None,
    channels: int = 3,
    layout: str = "auto",
    index_dir: str | Path | None = None,
    progress: bool | Callable[[BenchRow], None] = True,
) -> list[BenchRow]:
    """Measure the training loader on `data`, for `seconds` per combination of threads and image size.

    threads: decoding threads to try; default 1, 2, 4 ... up to the cores of this process. device_id: decode on this
    GPU. progress: print each row, nothing, or a function of the row. The first batches, which fill the queues, do not
    count. The second pass over a small set comes from the page cache: to measure the storage, use a set larger than the
    memory. UserError for settings or data that cannot work.
    """
    if seconds <= 0:
        raise UserError(f"seconds is {seconds}, must be above 0")
    source = open_source(data, layout=layout, index_dir=index_dir)
    cores = default_workers()
    tried = list(threads) if threads else [2**k for k in range(cores.bit_length()) if 2**k <= cores]
    rows = []
    if progress is True:
        print(f"data {source.ledger}", flush=True)
    try:
        for size in image_sizes:
            for count in tried:
                row = _measure(source, tuple(size), count, micro_batch, seconds, device_id, channels)
                rows.append(row)
                if progress is True:
                    print(format_row(row), flush=True)
                elif callable(progress):
                    progress(row)
    finally:
        source.close()
    return rows


def format_row(row: BenchRow) -> str:
    """Write a row as a line for people."""
    return (
        f"{row.image_size[0]}x{row.image_size[1]} px, {row.threads} threads, batch {row.micro_batch}: "
        f"{row.images_per_s:.0f} images/s (reading alone {row.read_images_per_s:.0f})"
        + (f", {row.bad_images} broken images" if row.bad_images else "")
    )


def _measure(
    source: Source,
    image_size: tuple[int, int],
    threads: int,
    micro_batch: int,
    seconds: float,
    device_id: int | None,
    channels: int,
) -> BenchRow:
    batch = min(micro_batch, source.num_images)
    read = _read_rate(source, batch, max(4, threads), min(seconds / 4, 5.0), channels)
    loader = build_train_loader(
        source,
        image_size=image_size,
        micro_batch=batch,
        threads=threads,
        device_id=device_id,
        channels=channels,
        bad_image_limit=1.0,
    )
    try:
        for _ in range(6):  # more than the batches that are made ahead
            loader.next_micro_batch()
        count, begin = 0, time.perf_counter()
        while time.perf_counter() - begin < seconds:
            loader.next_micro_batch()
            count += batch
        rate = count / (time.perf_counter() - begin)
        return BenchRow(
            threads=threads,
            image_size=image_size,
            micro_batch=batch,
            images_per_s=rate,
            read_images_per_s=read,
            bad_images=len(loader.bad_images),
        )
    finally:
        loader.close()


def _read_rate(source: Source, batch: int, threads: int, seconds: float, channels: int) -> float:
    reader = SampleReader(
        source, seed=0, channels=channels, array_format=first_array_format(source, channels), threads=threads
    )
    order = epoch_permutation(source.num_images, 0, 0)
    try:
        count, begin = 0, time.perf_counter()
        while time.perf_counter() - begin < seconds:
            positions = np.arange(count, count + batch) % source.num_images
            count += len(reader.finish(reader.start(order[positions], 0, positions)))
        return count / (time.perf_counter() - begin)
    finally:
        reader.close()
