"""Load images for evaluation: resize and centre crop, every image once, equally many batches on every rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from mirl.dataloaders.decoding.arrays import check_statistics
from mirl.dataloaders.decoding.crops import evaluation_crop, evaluation_windows
from mirl.dataloaders.decoding.dali_pipeline import DaliDecoder
from mirl.dataloaders.decoding.resize import CpuResizer
from mirl.dataloaders.decoding.samples import SampleReader
from mirl.dataloaders.errors import BadImage
from mirl.dataloaders.sources.base import Source
from mirl.dataloaders.sources.opening import Data, open_source
from mirl.dataloaders.stream import Batch, BatchPlan, BatchStream
from mirl.dataloaders.train_loader import first_array_format, is_data
from mirl.errors import UserError


def build_eval_loader(
    data: Data | Source,
    *,
    image_size: tuple[int, int],
    batch_size: int,
    resize_short: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    device_id: int | None = None,
    threads: int = 4,
    channels: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    layout: str = "auto",
    index_dir: str | Path | None = None,
    labels: bool = True,
    prefetch: int = 2,
    split: str = "val",
) -> EvalLoader:
    """Open a data set for evaluation: image i of rank r's batch k is item (k * world_size + r) * batch_size + i.

    resize_short: the shorter side before the centre crop, pixels. The default comes from
    `mirl.dataloaders.decoding.crops.evaluation_crop`: 256 / 224 of the shorter side of image_size. split: the part of
    the data that is meant by a folder with train/ beside val/ or test/. Other arguments are as in `build_train_loader`.

    All ranks have equally many batches of equal size. `Batch.valid` is False if the set has run out or an image is
    broken (named in `bad_images`), so neither is ever counted as right or wrong.
    """
    for field, value in (("batch_size", batch_size), ("world_size", world_size)):
        if value < 1:
            raise UserError(f"{field} is {value}, must be at least 1")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank}, must be in 0..{world_size - 1} (world_size {world_size})")
    if len(image_size) != 2 or min(image_size) < 1:
        raise UserError(f"image_size is {image_size}, must be (height, width), both at least 1")
    size = (image_size[0], image_size[1])
    cover = evaluation_crop(size).resized if resize_short is None else size
    short = min(cover) if resize_short is None else resize_short
    if short < 1:
        raise UserError(f"resize_short is {short}, must be at least 1")
    check_statistics(channels, mean, std)
    source = (
        open_source(data, layout=layout, labels=labels, index_dir=index_dir, split=split) if is_data(data) else data
    )
    array_format = first_array_format(source, channels)
    reader = SampleReader(source, seed=0, channels=channels, array_format=array_format, labels=labels, threads=threads)
    decoder = None
    if array_format is None:
        decoder = DaliDecoder(
            batch_size=batch_size,
            image_size=(image_size[0], image_size[1]),
            channels=channels,
            threads=threads,
            device_id=device_id,
        )
    device = torch.device("cpu" if device_id is None else f"cuda:{device_id}")
    return EvalLoader(
        source,
        reader,
        decoder,
        image_size=size,
        resize_short=short,
        cover=cover,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        threads=threads,
        device=device,
        statistics=(mean, std),
        prefetch=prefetch,
    )


class EvalLoader:
    """Iterating over the loader gives one pass of `Batch`; every pass is the same. `build_eval_loader` makes it.

    num_images: of the whole set. classes: class names by label, or None. bad_images: met in the latest pass.
    ledger: how many files the set has, and why some of them are left out.
    """

    def __init__(
        self,
        source: Source,
        reader: SampleReader,
        decoder: DaliDecoder | None,
        *,
        image_size: tuple[int, int],
        resize_short: int,
        cover: tuple[int, int],
        batch_size: int,
        rank: int,
        world_size: int,
        threads: int,
        device: torch.device,
        statistics: tuple[Sequence[float] | None, Sequence[float] | None],
        prefetch: int,
    ) -> None:
        self.source, self.classes, self.num_images = source, source.classes, source.num_images
        self.ledger = source.ledger
        self.bad_images: list[BadImage] = []
        self._reader, self._decoder = reader, decoder
        self._image_size, self._resize_short, self._cover = image_size, resize_short, cover
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size
        self._device, self._statistics, self._prefetch = device, statistics, prefetch
        self._resizer = None if decoder is not None and decoder.finish else CpuResizer(image_size, threads)

    def __len__(self) -> int:
        """Count the batches of one pass, equal on all ranks."""
        return -(-self.num_images // (self._batch_size * self._world_size))

    def __iter__(self) -> Iterator[Batch]:
        self.bad_images = []
        stream = BatchStream(
            self._plans(),
            self._reader,
            self._geometry,
            self._decoder,
            self._resizer,
            device=self._device,
            prefetch=self._prefetch,
            statistics=self._statistics,
        )
        try:
            for batch in stream:
                broken = {bad.position for bad in batch.bad}
                assert batch.valid is not None
                batch.valid &= ~np.isin(batch.positions, list(broken))
                self.bad_images += [bad for bad in batch.bad if bad.position < self.num_images]
                yield batch
        finally:
            stream.close()

    def paths(self, sample_ids: Sequence[int] | np.ndarray) -> list[str]:
        """Return the paths of images, for messages."""
        return [self.source.path(int(index)) for index in sample_ids]

    def close(self) -> None:
        """End all threads and free the decoder. It may be called twice."""
        self._reader.close()
        if self._resizer is not None:
            self._resizer.close()
        if self._decoder is not None:
            self._decoder.close()
        self.source.close()

    def __enter__(self) -> EvalLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _plans(self) -> Iterator[BatchPlan]:
        for number in range(len(self)):
            first = (number * self._world_size + self._rank) * self._batch_size
            positions = np.arange(first, first + self._batch_size)
            yield BatchPlan(0, np.minimum(positions, self.num_images - 1), positions, positions < self.num_images)

    def _geometry(self, sizes_B2: np.ndarray, epoch: int, positions: np.ndarray):
        return evaluation_windows(sizes_B2, self._resize_short, self._image_size, self._cover)
