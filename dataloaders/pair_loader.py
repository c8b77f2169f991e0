"""Load pairs of an image and its label image as `TrainLoader` loads images: resumable, the same on any count of ranks.

Pillow decodes and resizes in threads. A label image is resized to the nearest value, in the same window as its image,
and DALI's fused decoding does not give that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mirl.dataloaders.decoding.headers import decode_with_pillow
from mirl.dataloaders.decoding.label_images import read_label_image
from mirl.dataloaders.decoding.pair_crops import PairAugmentation
from mirl.dataloaders.decoding.samples import MAX_REPLACEMENTS, replacement
from mirl.dataloaders.errors import BadImage, ImageError
from mirl.dataloaders.order import StepPlan
from mirl.dataloaders.sources.label_map import LabelMap
from mirl.dataloaders.sources.label_pairs import PairSource
from mirl.dataloaders.sources.patience import read_image
from mirl.dataloaders.stream import Batch, BatchPlan, BatchStream
from mirl.dataloaders.train_loader import TrainLoader
from mirl.errors import UserError

AHEAD = 3  # batches whose pairs are read while one is worked on


@dataclass(frozen=True, slots=True)
class Pair:
    """A pair is an image and its labels. index: the item shown. bad: set if it stands in for a broken pair."""

    index: int
    image: np.ndarray
    labels: np.ndarray
    bad: BadImage | None = None


class PairReader:
    """A reader reads pairs: the image as uint8 [h, w, C], its labels as classes int16 [h, w]. Threads may share it."""

    def __init__(self, source: PairSource, label_map: LabelMap, *, channels: int) -> None:
        self.source, self.channels = source, channels
        self._table = label_map.table()

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Read pair ``index``. ImageError, with the reason, if it cannot be used."""
        image = decode_with_pillow(read_image(self.source, index), self.channels)
        labels = self._table[read_label_image(self.source.read_label(index))]
        if labels.shape != image.shape[:2]:
            raise ImageError(f"its label image is {labels.shape[0]}x{labels.shape[1]}, another size than its own")
        return image, labels


class _TrainReader:
    """This reader does for pairs what `TrainLoader` asks of its reader. The images are pictures, never arrays."""

    array_format = None

    def __init__(self, reader: PairReader, augmentation: PairAugmentation, *, seed: int, threads: int) -> None:
        self.reader, self.augmentation, self.seed = reader, augmentation, seed
        self.source, self.channels = reader.source, reader.channels
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="mirl-pairs")

    def start(self, plan: BatchPlan) -> list[Future[Pair]]:
        """Begin to make the pairs of a batch."""
        pairs = zip(plan.indices, plan.positions, strict=True)
        return [self._pool.submit(self._make, int(index), plan.epoch, int(position)) for index, position in pairs]

    def largest_number(self, index: int) -> float:
        """Return 0, as for any picture."""
        return 0.0

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _make(self, wanted: int, epoch: int, position: int) -> Pair:
        index, reason = wanted, ""
        for attempt in range(MAX_REPLACEMENTS + 1):
            try:
                image, labels = self.augmentation(*self.reader.read(index), self.seed, epoch, position)
            except ImageError as error:
                reason = reason or str(error)
                index = replacement(self.source.num_images, self.seed, epoch, position, attempt)
                continue
            bad = None
            if reason:
                bad = BadImage(
                    path=self.source.path(wanted), reason=reason, epoch=epoch, position=position,
                    replaced_by=self.source.path(index),
                )  # fmt: skip
            return Pair(index, image, labels, bad)
        raise UserError(
            f"{self.source.path(wanted)} cannot be read ({reason}), nor can {MAX_REPLACEMENTS} others in its place"
        )


class _PairStream(BatchStream):
    """This stream gives batches of pairs, made ahead by the threads of the reader."""

    def _make_from_arrays(self) -> Iterator[Batch]:
        reader: Any = self._reader
        started: deque[tuple[BatchPlan, list[Future[Pair]]]] = deque()
        try:
            for plan in self._plans:
                started.append((plan, reader.start(plan)))
                if len(started) > AHEAD:
                    yield self._joined(*started.popleft())
            while started:
                yield self._joined(*started.popleft())
        finally:
            for _, futures in started:
                for future in futures:
                    future.cancel()

    def _joined(self, plan: BatchPlan, futures: list[Future[Pair]]) -> Batch:
        pairs = [future.result() for future in futures]
        batch = Batch(
            images=torch.from_numpy(np.stack([pair.image for pair in pairs])),
            sample_ids=np.array([pair.index for pair in pairs], dtype=np.int64),
            epoch=plan.epoch,
            positions=np.asarray(plan.positions, dtype=np.int64),
            labels=torch.from_numpy(np.stack([pair.labels for pair in pairs])),
            valid=plan.valid,
            bad=[pair.bad for pair in pairs if pair.bad is not None],
        )
        return self._upload(batch)


class PairLoader(TrainLoader):
    """This is a `TrainLoader` of pairs: a batch's ``labels`` are classes, int16 [B, H, W], -1 for ignored pixels."""

    def __init__(
        self,
        source: PairSource,
        plan: StepPlan,
        augmentation: PairAugmentation,
        label_map: LabelMap,
        *,
        channels: int,
        seed: int,
        device: torch.device,
        threads: int,
        bad_image_limit: float = 0.001,
        raise_on_bad_limit: bool = True,
        prefetch: int = 2,
    ) -> None:
        reader: Any = _TrainReader(
            PairReader(source, label_map, channels=channels), augmentation, seed=seed, threads=threads
        )
        super().__init__(
            source, plan, augmentation=None, reader=reader, decoder=None, resizer=None, seed=seed, device=device,
            statistics=(None, None), bad_image_limit=bad_image_limit, raise_on_bad_limit=raise_on_bad_limit,
            batch_transform=None, prefetch=prefetch,
        )  # fmt: skip

    def _open_stream(self, plans: Iterator[BatchPlan]) -> BatchStream:
        return _PairStream(
            plans, self._reader, self._geometry, None, None, device=self._device, prefetch=self._prefetch
        )


def eval_pairs(
    reader: PairReader, *, rank: int, world_size: int, threads: int
) -> Generator[tuple[int, np.ndarray, np.ndarray] | tuple[int, None, str] | None, None, None]:
    """Iterate over the pairs that rank ``rank`` evaluates, in order. All ranks together take each pair once.

    Gives (index, image uint8 [h, w, C], labels int16 [h, w]), or (index, None, reason) for a broken pair. If this rank
    has run out before others it gives None, so that all ranks have equally many items.
    """
    count = reader.source.num_images
    rounds = -(-count // world_size)
    mine: Sequence[int] = [rank + world_size * number for number in range(rounds)]

    def read(index: int) -> tuple[int, np.ndarray, np.ndarray] | tuple[int, None, str] | None:
        if index >= count:
            return None
        try:
            image, labels = reader.read(index)
            return index, image, labels
        except ImageError as error:
            return index, None, str(error)

    with ThreadPoolExecutor(threads, thread_name_prefix="mirl-pairs") as pool:
        waiting: deque[Future[Any]] = deque()
        try:
            for index in mine:
                waiting.append(pool.submit(read, index))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
