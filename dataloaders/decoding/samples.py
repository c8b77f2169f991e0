"""Read the image of a number in the data set for a decoder, or a stand-in if the image is broken.

A broken image must not change how many images a batch has, so it is replaced at once by another, on the rank that met
it. A hash of (seed, epoch, position, attempt) chooses the stand-in: the same for any world size and after any resume.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from mirl.dataloaders.decoding.arrays import ArrayFormat
from mirl.dataloaders.decoding.headers import as_portable_pixmap, decode_with_pillow, read_header
from mirl.dataloaders.errors import BadImage, ImageError, KnownBroken
from mirl.dataloaders.sources.base import Source
from mirl.dataloaders.sources.patience import read_image
from mirl.errors import UserError
from mirl.keyed import keyed_u64

_REPLACEMENT_STREAM = 3
MAX_REPLACEMENTS = 100
_NO_DATA = np.empty(0, np.uint8)
_CHUNK = 8  # samples a thread reads per task: a task costs about 20 us, a sample about 40


def replacement(num_images: int, seed: int, epoch: int, position: int, attempt: int) -> int:
    """Return the number of stand-in ``attempt`` for a broken image at a position of an epoch."""
    return int(keyed_u64(_REPLACEMENT_STREAM, seed, epoch, position, attempt)[0]) % num_images


@dataclass(slots=True)
class Sample:
    """A sample is one image on its way into a batch.

    wanted, index: the item that the order names, and the item that is shown (another if `wanted` is broken).
    reason: why `wanted` is broken; empty if it is not broken, or if the manifest calls it broken already.
    data: the encoded file, uint8 [bytes], or, of an array data set, pixels [H, W, C]. height, width: upright pixels.
    """

    wanted: int
    index: int
    epoch: int
    position: int
    data: np.ndarray
    height: int
    width: int
    label: int = -1
    attempt: int = 0
    reason: str = ""


class SampleReader:
    """A reader reads samples of a source in parallel threads."""

    def __init__(
        self,
        source: Source,
        *,
        seed: int,
        channels: int = 3,
        array_format: ArrayFormat | None = None,
        labels: bool = False,
        threads: int = 4,
    ) -> None:
        self.source, self.seed, self.channels = source, seed, channels
        self.array_format, self.labels = array_format, labels
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="mirl-read")
        self._refused_by_dali: set[int] = set()
        self._lock = threading.Lock()

    def start(self, indices: Sequence[int] | np.ndarray, epoch: int, positions: Sequence[int] | np.ndarray) -> list:
        """Begin to read a batch. Returns futures for `finish`."""
        triples = [(int(i), epoch, int(p)) for i, p in zip(indices, positions, strict=True)]
        return [self._pool.submit(self._read_chunk, triples[at : at + _CHUNK]) for at in range(0, len(triples), _CHUNK)]

    def finish(self, futures: list) -> list[Sample]:
        """Return the samples of a started batch, in order."""
        return [sample for future in futures for sample in future.result()]

    def read(self, index: int, epoch: int, position: int) -> Sample:
        """Read one sample, or its first readable stand-in."""
        try:
            return self._load(Sample(index, index, epoch, position, _NO_DATA, 0, 0))
        except ImageError as error:
            shown = self.replace(Sample(index, index, epoch, position, _NO_DATA, 0, 0), str(error))
            if isinstance(error, KnownBroken):
                shown.reason = ""
            return shown

    def replace(self, sample: Sample, reason: str) -> Sample:
        """Read the next stand-in for a sample whose current image failed. The reason of the first failure is kept."""
        first_reason = sample.reason or reason
        for attempt in range(sample.attempt, MAX_REPLACEMENTS):
            index = replacement(self.source.num_images, self.seed, sample.epoch, sample.position, attempt)
            try:
                return self._load(
                    Sample(
                        wanted=sample.wanted,
                        index=index,
                        epoch=sample.epoch,
                        position=sample.position,
                        data=sample.data,
                        height=0,
                        width=0,
                        attempt=attempt + 1,
                        reason=first_reason,
                    )
                )
            except ImageError:
                continue
        raise UserError(
            f"{self.source.path(sample.wanted)} cannot be read ({first_reason}), nor can {MAX_REPLACEMENTS} other "
            "images that were tried in its place; run mirl validate-data on the data set"
        )

    def largest_number(self, index: int) -> float:
        """Return the largest absolute value in an array; infinity if it cannot be read, 0 for pictures."""
        if self.array_format is None:
            return 0.0
        try:
            return float(np.abs(self.array_format.read(self.source.read(index)).astype(np.float64)).max())
        except ImageError:
            return float("inf")

    def decode_here(self, sample: Sample) -> Sample:
        """Decode the sample by Pillow and wrap it as a pixmap, which DALI takes. ImageError if Pillow cannot."""
        pixels_HWC = decode_with_pillow(sample.data.tobytes(), self.channels)
        sample.data = np.frombuffer(as_portable_pixmap(pixels_HWC), np.uint8)
        sample.height, sample.width = pixels_HWC.shape[:2]
        return sample

    def after_refusal(self, sample: Sample) -> Sample:
        """Decode a sample that DALI refused by Pillow, or return a stand-in.

        The file is remembered and no longer offered to DALI, which would lose a whole batch on it.
        """
        with self._lock:
            self._refused_by_dali.add(sample.index)
        try:
            return self.decode_here(sample)
        except ImageError as error:
            return self.replace(sample, str(error))

    def bad_image(self, sample: Sample) -> BadImage:
        """Return the record of a sample that stands in for a broken image."""
        return BadImage(
            path=self.source.path(sample.wanted),
            reason=sample.reason,
            epoch=sample.epoch,
            position=sample.position,
            replaced_by=self.source.path(sample.index),
        )

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _read_chunk(self, triples: list[tuple[int, int, int]]) -> list[Sample]:
        return [self.read(*triple) for triple in triples]

    def _load(self, sample: Sample) -> Sample:
        data = read_image(self.source, sample.index)
        if self.array_format is not None:
            sample.data = self.array_format.read(data)
            sample.height, sample.width = sample.data.shape[:2]
        else:
            header = read_header(data)
            sample.data = np.frombuffer(data, np.uint8)
            sample.height, sample.width = header.height, header.width
            if not header.native or sample.index in self._refused_by_dali:
                self.decode_here(sample)
        if self.labels:
            sample.label = self.source.label(sample.index)
        return sample
