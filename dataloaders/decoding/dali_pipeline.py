"""Decode batches with NVIDIA DALI, which this module alone uses, and find out which sample DALI refused.

GPU and CPU have one graph. Its inputs for a sample are the encoded file and the window (start and shape, upright
pixels). If the graph finishes the image, they are also the resized size, the offset and the shape of the final crop and
the mirror flag.

    encoded -> decoders.image_slice (window only) -> [finish: resize bicubic antialiased -> slice -> flip] -> output

device_id n: device="mixed" decoding (nvJPEG, hardware decoder) and finish, output uint8 [B, H, W, C] on that GPU.
device_id None: CPU operators; without finish the output is the decoded windows, which dataloaders/decoding/resize.py
resizes faster than DALI's CPU operator does; with finish it is uint8 [B, H, W, C] in host memory.

When one file is bad, DALI raises for the whole batch and the pipeline is then unusable; no switch makes it skip the
file. So `DaliDecoder` keeps the inputs of all batches in flight. On an error it finds the refused samples one by one in
a pipeline of batch 1, lets the caller exchange them, rebuilds and feeds everything again.
"""

from __future__ import annotations

import errno
import logging
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from mirl.dataloaders.decoding.at_exit import close_at_exit
from mirl.dataloaders.sources.handles import mend_of_too_many, raise_file_limit
from mirl.errors import UserError

_MAX_EXCHANGES = 100
_log = logging.getLogger(__name__)
# Buffers of the size that ImageNet's largest images need, so that none is allocated or freed during training: the
# values of NVIDIA's own ImageNet training (DALI, docs/examples/use_cases/pytorch/resnet50/main.py).
_ON_GPU = {
    "device_memory_padding": 211025920,
    "host_memory_padding": 140544512,
    "preallocate_width_hint": 5980,
    "preallocate_height_hint": 6430,
    "jpeg_fancy_upsampling": True,
}
_INSTALL = "pip install nvidia-dali-cuda130 (or nvidia-dali-cuda120 with a CUDA 12 driver)"
# A pixmap of 2 x 2 grey pixels, which fills the pipeline when it is built.
_BLANK = np.frombuffer(b"P6 2 2 255\n" + bytes([128]) * 12, np.uint8)


@dataclass(slots=True)
class DecodeJob:
    """A job is one batch to decode.

    encoded: files as uint8 vectors, or arrays [H, W, C], which are cut and not decoded. windows: int32 [B, 4] as (top,
    left, height, width). mirrored: bool [B]. sizes, offsets: int32 [B, 2] for evaluation (resize to sizes, cut at
    offsets), or None: resize to the output size. image_size: (height, width) of the output of this job, None for that
    of the decoder.
    """

    encoded: list[np.ndarray]
    windows: np.ndarray
    mirrored: np.ndarray
    sizes: np.ndarray | None = None
    offsets: np.ndarray | None = None
    image_size: tuple[int, int] | None = None

    def one(self, i: int) -> DecodeJob:
        """Return sample i as a batch of its own."""
        take = slice(i, i + 1)
        sizes = None if self.sizes is None else self.sizes[take]
        offsets = None if self.offsets is None else self.offsets[take]
        return DecodeJob(
            self.encoded[take], self.windows[take], self.mirrored[take], sizes, offsets, self.image_size
        )  # fmt: skip

    def cut(self) -> list[np.ndarray]:
        """Cut the windows from arrays that stand in the place of encoded files: [h, w, C] each, contiguous."""
        return [
            np.ascontiguousarray(pixels_HWC[top : top + height, left : left + width])
            for pixels_HWC, (top, left, height, width) in zip(self.encoded, self.windows.tolist(), strict=True)
        ]

    def put(self, i: int, other: DecodeJob) -> None:
        """Replace sample i by the only sample of `other`."""
        self.encoded[i], self.windows[i], self.mirrored[i] = other.encoded[0], other.windows[0], other.mirrored[0]
        if self.sizes is not None and self.offsets is not None:
            assert other.sizes is not None and other.offsets is not None
            self.sizes[i], self.offsets[i] = other.sizes[0], other.offsets[0]


Exchange = Callable[[int], DecodeJob]


class DaliDecoder:
    """The decoder decodes jobs in the order in which they are submitted; at most `depth` are in flight."""

    def __init__(
        self,
        *,
        batch_size: int,
        image_size: tuple[int, int],
        channels: int,
        threads: int,
        device_id: int | None,
        depth: int = 2,
        finish: bool | None = None,
        hw_decoder_load: float = 0.65,
    ) -> None:
        """Build the pipeline.

        channels: 3 (RGB) or 1 (grey). threads: DALI's worker threads. finish: resize in the graph; default: on GPUs.
        hw_decoder_load: share of the JPEG files that the hardware decoder of an A100, H100 or newer takes.
        UserError with the pip line if DALI is missing.
        """
        if channels not in (1, 3):
            raise UserError(f"channels is {channels}; DALI decodes pictures to 1 or 3 channels")
        self.batch_size, self.image_size, self.channels = batch_size, image_size, channels
        self.threads, self.device_id, self.depth = threads, device_id, depth
        self.hw_decoder_load = hw_decoder_load
        self.finish = device_id is not None if finish is None else finish
        if device_id is not None and not self.finish:
            raise ValueError("finish is False with a GPU; decoded windows are only handed out on the CPU")
        self._in_flight: deque[tuple[DecodeJob, Exchange]] = deque()
        self._failure: RuntimeError | None = None
        self._probe = None
        self._stream = torch.cuda.Stream(device_id) if device_id is not None else None
        self._pipe = self._build(batch_size, threads, depth)
        close_at_exit(self)

    def submit(self, job: DecodeJob, exchange: Exchange) -> None:
        """Start to decode a job. Call `collect` first when `depth` jobs are in flight.

        `collect` calls exchange(i) if DALI refuses sample i. It returns a job of one image to decode in the sample's
        place. If DALI refuses that image too, exchange(i) is called again.
        """
        if len(self._in_flight) >= self.depth:
            raise RuntimeError(f"{self.depth} jobs are in flight; collect one first")
        self._in_flight.append((job, exchange))
        try:
            self._start(job)
        except RuntimeError as error:  # an earlier job in flight has failed meanwhile; `collect` sees to both
            self._failure = error

    def collect(self) -> list[np.ndarray] | torch.Tensor:
        """Return the oldest job's output: uint8 [B, H, W, C], or without finish a list of uint8 [h, w, C] windows."""
        for _ in range(_MAX_EXCHANGES):
            try:
                if self._failure is not None:
                    raise self._failure
                outputs = self._pipe.share_outputs()
            except RuntimeError as error:
                self._recover(error)
                continue
            try:
                result = self._take(outputs[0])
            finally:
                self._pipe.release_outputs()
            self._in_flight.popleft()
            return result
        raise RuntimeError(f"DALI failed {_MAX_EXCHANGES} times on one batch")

    def drain(self) -> None:
        """Throw away the jobs in flight, so that the next job is the first."""
        while self._in_flight:
            try:
                if self._failure is not None:
                    raise self._failure
                self._pipe.share_outputs()
                self._pipe.release_outputs()
            except RuntimeError as error:  # a refused sample in a batch that nobody will see
                _log.debug("dropped batch: %s", error)
                self._in_flight.clear()
                self._rebuild()
                return
            self._in_flight.popleft()

    def close(self) -> None:
        """Drop the pipelines; their threads end with them."""
        self._in_flight.clear()
        self._pipe = self._probe = None

    def _take(self, output):
        if not self.finish:
            # A view keeps its DALI tensor alive, and with the dynamic executor the tensor keeps its memory.
            return [np.asarray(output[i]) for i in range(len(output))]
        if self.device_id is None:
            return torch.from_numpy(np.array(output.as_tensor()))
        from nvidia.dali.plugin.pytorch import feed_ndarray

        with torch.cuda.stream(self._stream):
            images_BHWC = torch.empty(output.as_tensor().shape(), dtype=torch.uint8, device=f"cuda:{self.device_id}")
            feed_ndarray(output.as_tensor(), images_BHWC, cuda_stream=self._stream)
        self._stream.synchronize()  # in the loader's thread; training does not wait here
        return images_BHWC

    def _recover(self, error: RuntimeError) -> None:
        """Exchange the refused samples of the first job that has any, and start all jobs in flight again."""
        for job, exchange in self._in_flight:
            refused = [i for i in range(len(job.encoded)) if not self._accepts(job.one(i))]
            for i in refused:
                job.put(i, self._exchange_until_accepted(exchange, i, error))
            if refused:
                break
        else:
            raise RuntimeError(
                "DALI failed on a batch, but on none of its images alone (out of memory, or a fault of the device); "
                "lower the micro-batch or the prefetch depth"
            ) from error
        self._rebuild()
        for job, _ in self._in_flight:
            self._start(job)

    def _exchange_until_accepted(self, exchange: Exchange, i: int, error: RuntimeError) -> DecodeJob:
        for _ in range(_MAX_EXCHANGES):
            other = exchange(i)
            if self._accepts(other):
                return other
        raise RuntimeError(f"DALI refused {_MAX_EXCHANGES} images in a row") from error

    def _rebuild(self) -> None:
        self._pipe, self._failure = self._build(self.batch_size, self.threads, self.depth), None

    def _start(self, job: DecodeJob) -> None:
        self._feed(self._pipe, job)
        self._pipe.schedule_run()

    def _accepts(self, job: DecodeJob) -> bool:
        if self._probe is None:
            self._probe = self._build(1, 1, 1)
        try:
            self._feed(self._probe, job)
            self._probe.schedule_run()
            self._probe.share_outputs()
            self._probe.release_outputs()
            return True
        except RuntimeError as error:
            _log.debug("DALI refuses a sample: %s", error)
            self._probe = None
            return False

    def _feed(self, pipe, job: DecodeJob) -> None:
        pipe.feed_input("encoded", job.encoded)
        pipe.feed_input("start", np.ascontiguousarray(job.windows[:, :2]))
        pipe.feed_input("shape", np.ascontiguousarray(job.windows[:, 2:]))
        if not self.finish:
            return
        count = len(job.encoded)
        whole = np.tile(np.int32(job.image_size or self.image_size), (count, 1))
        sizes = job.sizes if job.sizes is not None else whole
        offsets = job.offsets if job.offsets is not None else np.zeros((count, 2), np.int32)
        pipe.feed_input("size", sizes.astype(np.float32))
        pipe.feed_input("offset", np.ascontiguousarray(offsets, dtype=np.int32))
        pipe.feed_input("extent", whole)
        pipe.feed_input("mirror", job.mirrored.astype(np.int32))

    def _build(self, batch_size: int, threads: int, depth: int):
        """Build a pipeline and empty it: DALI's first run takes `depth` batches at once, which are blanks here."""
        raise_file_limit()
        try:
            from nvidia.dali import Pipeline, fn, types
        except (ImportError, OSError) as error:
            if os.strerror(errno.EMFILE) in str(error):  # DALI is there; the dynamic linker says this as an ImportError
                raise UserError(f"the limit of open files is too low ({error}): {mend_of_too_many()}") from error
            raise UserError(f"NVIDIA DALI cannot be imported ({error}), pictures need it; {_INSTALL}") from error
        on_gpu = self.device_id is not None
        pipe = Pipeline(
            batch_size=batch_size,
            num_threads=threads,
            device_id=self.device_id,
            prefetch_queue_depth=depth,
            exec_dynamic=True,
        )
        with pipe:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, no_copy=True)
            start = fn.external_source(name="start", dtype=types.INT32, ndim=1)
            shape = fn.external_source(name="shape", dtype=types.INT32, ndim=1)
            images = fn.decoders.image_slice(
                encoded,
                start=start,
                shape=shape,
                axes=[0, 1],
                device="mixed" if on_gpu else "cpu",
                output_type=types.RGB if self.channels == 3 else types.GRAY,
                adjust_orientation=True,
                **(_ON_GPU | {"hw_decoder_load": self.hw_decoder_load} if on_gpu else {}),
            )
            if self.finish:
                size = fn.external_source(name="size", dtype=types.FLOAT, ndim=1)
                offset = fn.external_source(name="offset", dtype=types.INT32, ndim=1)
                extent = fn.external_source(name="extent", dtype=types.INT32, ndim=1)
                mirror = fn.external_source(name="mirror", dtype=types.INT32, ndim=0)
                images = fn.resize(
                    images, size=size, interp_type=types.INTERP_CUBIC, antialias=True, subpixel_scale=False
                )
                images = fn.slice(images, start=offset, shape=extent, axes=[0, 1])
                images = fn.flip(images, horizontal=mirror)
            pipe.set_outputs(images)
        pipe.build()
        blank = DecodeJob([_BLANK], np.array([[0, 0, 2, 2]], np.int32), np.zeros(1, bool))
        for _ in range(depth):
            self._feed(pipe, blank)
        pipe.schedule_run()
        for _ in range(depth):
            pipe.share_outputs()
            pipe.release_outputs()
        return pipe
