"""Batches made ahead of time by one background thread: read -> window -> decode -> resize, in a fixed order.

The order and every random number come from the plan of a batch, so making batches ahead changes nothing about them.
What broke travels with the batch and is counted when the batch is taken: a batch that was made but never taken, at the
end of a run or before a jump, leaves no trace.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from mirl.dataloaders.decoding.arrays import as_resizable, normalise
from mirl.dataloaders.decoding.at_exit import close_at_exit
from mirl.dataloaders.decoding.dali_pipeline import DaliDecoder, DecodeJob
from mirl.dataloaders.decoding.resize import CpuResizer
from mirl.dataloaders.decoding.samples import Sample, SampleReader
from mirl.dataloaders.errors import BadImage

_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """Which items a batch shows, at which positions of which epoch; valid is False for padding (evaluation).

    image_size: (height, width) of its images where they are not those that decoder and resizer were made for.
    """

    epoch: int
    indices: np.ndarray
    positions: np.ndarray
    valid: np.ndarray | None = None
    image_size: tuple[int, int] | None = None


@dataclass(slots=True)
class Batch:
    """What the training loop gets. B images of this rank.

    images: uint8 [B, H, W, C], or float32 [B, C, H, W], normalised, of a 16-bit or float array data set; on the device.
    sample_ids: int64 [B], the items shown (a stand-in's own number where an image was broken). epoch: from 0.
    positions: int64 [B], places in the epoch's order; (seed, epoch, position) is a key of the sample that no division
    of the work among ranks changes. labels: on the device, int64 [B], or of label images int16 [B, H, W]; or None.
    valid: bool [B]; False marks padding and, in evaluation, broken images.
    """

    images: torch.Tensor
    sample_ids: np.ndarray
    epoch: int
    positions: np.ndarray
    labels: torch.Tensor | None = None
    valid: np.ndarray | None = None
    bad: list[BadImage] = field(default_factory=list)


Transform = Callable[[Batch], Batch]
# (sizes [B, 2], epoch, positions) -> windows [B, 4], mirrored [B], resized sizes [B, 2] or None, offsets or None
Geometry = Callable[[np.ndarray, int, np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]]


class BatchStream:
    """An iterator over batches with a thread behind it."""

    def __init__(
        self,
        plans: Iterator[BatchPlan],
        reader: SampleReader,
        geometry: Geometry,
        decoder: DaliDecoder | None,
        resizer: CpuResizer | None,
        *,
        device: torch.device,
        prefetch: int,
        statistics: tuple[Sequence[float] | None, Sequence[float] | None] = (None, None),
        transform: Transform | None = None,
    ) -> None:
        """decoder None: an array data set, whose samples are pixels already. resizer None: the decoder finishes.
        prefetch: batches that may wait, finished, for the training loop.
        transform: called on each batch in the thread, before it is on the device (where the decoder left it)."""
        self._plans, self._reader, self._geometry = plans, reader, geometry
        self._decoder, self._resizer = decoder, resizer
        self._device, self._statistics, self._transform = device, statistics, transform
        self._upload_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ready: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=max(1, prefetch))
        self._stop = threading.Event()
        self._ended: BaseException | None = None
        self.wait_seconds = 0.0
        self._thread = threading.Thread(target=self._work, name="mirl-data", daemon=True)
        self._thread.start()
        close_at_exit(self)

    def __iter__(self) -> BatchStream:
        return self

    def __next__(self) -> Batch:
        """The next batch; the time blocked here adds to wait_seconds. An error of the thread is raised here, always."""
        if self._ended is not None:
            raise self._ended
        begin = time.perf_counter()
        item = self._ready.get()
        self.wait_seconds += time.perf_counter() - begin
        if isinstance(item, Batch):
            for tensor in (item.images, item.labels):
                if tensor is not None and tensor.is_cuda:
                    # Made on another stream: its memory must not be used again before this stream is done with it.
                    tensor.record_stream(torch.cuda.current_stream(tensor.device))
            return item
        self._ended = StopIteration() if item is None else item
        raise self._ended

    def close(self) -> None:
        """Stops the thread and waits for it; what it had made is dropped. The reader and decoder stay usable."""
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._ready.get(timeout=0.05)
            except queue.Empty:
                continue
        self._thread.join()

    def _work(self) -> None:
        try:
            if self._device.type == "cuda":
                # A thread starts on GPU 0, and whatever it does first would open a context there: half a GiB of GPU 0
                # for every other rank of the host.
                torch.cuda.set_device(self._device)
            with closing(self._make() if self._decoder is not None else self._make_from_arrays()) as batches:
                for batch in batches:
                    if not self._put(batch):
                        return
            self._put(None)
        except BaseException as error:  # handed to the training loop, which raises it
            self._put(error)

    def _put(self, item: Batch | BaseException | None) -> bool:
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=_POLL_S)
                return True
            except queue.Full:
                continue
        return False

    def _reading(self, ahead: int) -> Iterator[tuple[BatchPlan, list[Sample]]]:
        """Plans with their samples read, `ahead` batches being read while one is worked on."""
        started: deque = deque()
        for plan in self._plans:
            started.append((plan, self._reader.start(plan.indices, plan.epoch, plan.positions)))
            if len(started) > ahead:
                plan, futures = started.popleft()
                yield plan, self._reader.finish(futures)
        for plan, futures in started:
            yield plan, self._reader.finish(futures)

    def _make(self) -> Iterator[Batch]:
        decoder, waiting = self._decoder, deque()
        assert decoder is not None
        try:
            for plan, samples in self._reading(ahead=2):
                if len(waiting) == decoder.depth:
                    yield self._finish(*waiting.popleft())
                job = self._job(plan, samples)
                decoder.submit(job, partial(self._exchange, plan, samples))
                waiting.append((plan, samples, job))
            while waiting:
                yield self._finish(*waiting.popleft())
        finally:
            decoder.drain()

    def _job(self, plan: BatchPlan, samples: list[Sample]) -> DecodeJob:
        sizes_B2 = np.array([(sample.height, sample.width) for sample in samples])
        geometry = self._geometry(sizes_B2, plan.epoch, plan.positions)
        return DecodeJob([sample.data for sample in samples], *geometry, image_size=plan.image_size)

    def _exchange(self, plan: BatchPlan, samples: list[Sample], i: int) -> DecodeJob:
        samples[i] = self._reader.after_refusal(samples[i])
        alone = BatchPlan(
            plan.epoch, plan.indices[i : i + 1], plan.positions[i : i + 1], image_size=plan.image_size
        )  # fmt: skip
        return self._job(alone, [samples[i]])

    def _finish(self, plan: BatchPlan, samples: list[Sample], job: DecodeJob) -> Batch:
        assert self._decoder is not None
        decoded = self._decoder.collect()
        if self._resizer is not None:
            decoded = self._resizer(decoded, job.mirrored, job.sizes, job.offsets, job.image_size)
        return self._batch(plan, samples, decoded)

    def _make_from_arrays(self) -> Iterator[Batch]:
        assert self._resizer is not None
        for plan, samples in self._reading(ahead=2):
            job = self._job(plan, samples)
            crops = [as_resizable(crop) for crop in job.cut()]
            images = self._resizer(crops, job.mirrored, job.sizes, job.offsets, job.image_size)
            if images.dtype != torch.uint8:
                images = normalise(images, *self._statistics)
            yield self._batch(plan, samples, images)

    def _batch(self, plan: BatchPlan, samples: list[Sample], images: torch.Tensor) -> Batch:
        labels = None
        if self._reader.labels:
            labels = torch.tensor([sample.label for sample in samples], dtype=torch.int64)
        batch = Batch(
            images=images,
            sample_ids=np.array([sample.index for sample in samples], dtype=np.int64),
            epoch=plan.epoch,
            positions=np.asarray(plan.positions, dtype=np.int64),
            labels=labels,
            valid=plan.valid,
            bad=[self._reader.bad_image(sample) for sample in samples if sample.reason],
        )
        if self._transform is not None:
            batch = self._transform(batch)
        return self._upload(batch)

    def _upload(self, batch: Batch) -> Batch:
        """Images and labels on the device. This thread waits for the copy, and never for the training step's work."""
        with torch.cuda.stream(self._upload_stream):
            batch.images = batch.images.to(self._device)
            batch.labels = None if batch.labels is None else batch.labels.to(self._device)
        if self._upload_stream is not None:
            self._upload_stream.synchronize()
        return batch
