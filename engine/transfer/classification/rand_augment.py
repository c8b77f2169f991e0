"""Apply RandAugment on the CPU, in processes of its own, while the training step runs.

timm's operators draw from the global generators of ``random`` and numpy, and hold Python's lock much of the time. So
they run in processes, each seeded for one image at a time.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing.synchronize import Event

import numpy as np
import torch
from PIL import Image

from mirl.dataloaders import Batch
from mirl.engine.transfer.classification.config import RAND_AUGMENT as DEFAULT
from mirl.engine.transfer.random_state import RAND_AUGMENT_STREAM, keys_of, seeded
from mirl.errors import UserError

_FORM = re.compile(r"rand(-(m|n|mmax)\d+|-(mstd|p)\d+(\.\d+)?|-mstdinf|-inc[01])*")
_CHUNKS_PER_WORKER = 2  # so that one slow chunk does not hold up the batch for its whole length
_STOP_SIGNALS = {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT}

Operation = Callable[[Image.Image], Image.Image]


class RandAugment:
    """Return the same batch with other pixels, as a ``batch_transform`` of `mirl.dataloaders.build_train_loader`.

    The change of an image is a function of (seed, epoch, position in the epoch's order), whatever the number of ranks,
    workers and resumptions. Close it after the loader.
    """

    def __init__(
        self, form: str = DEFAULT, *, image_size: tuple[int, int], mean: Sequence[float], seed: int, workers: int
    ) -> None:
        """Start the processes.

        form: timm's notation: magnitude m, its deviation mstd, n operators, inc1 for rising severity. mean: of each
        channel, in [0, 1]; it fills what comes in from outside. workers: processes; 0: the loader's thread does the
        work.

        Raises:
            UserError: images that do not have 3 channels, or a form that timm does not know.
        """
        if len(mean) != 3:
            raise UserError(
                f"rand_augment is {form!r} and images have {len(mean)} channels: its colour operators need 3; set "
                "--rand-augment off"
            )
        if not _FORM.fullmatch(form):
            raise UserError(f"rand_augment is {form!r}: give off, or timm's notation, e.g. {DEFAULT}")
        self.seed, self.workers = seed, workers
        self._operation = make_operation(form, image_size, mean)
        self._stream: torch.cuda.Stream | None = None
        self._pool: ProcessPoolExecutor | None = None
        if workers:
            self._pool = _start_pool(workers, form, image_size, tuple(mean))

    def __call__(self, batch: Batch) -> Batch:
        """Return ``batch`` with augmented images, uint8 [B, H, W, 3], on the CPU."""
        if batch.images.dtype != torch.uint8:
            raise UserError("rand_augment takes uint8 pictures and these are arrays of floats: set --rand-augment off")
        images_BHWC = self._on_host(batch.images).numpy()
        keys = keys_of(RAND_AUGMENT_STREAM, self.seed, batch.epoch, batch.positions)
        if self._pool is None:
            done = [augment(self._operation, images_BHWC, keys)]
        else:
            parts = min(len(keys), _CHUNKS_PER_WORKER * self.workers)
            bounds = [len(keys) * part // parts for part in range(parts + 1)]
            slices = [slice(*pair) for pair in zip(bounds, bounds[1:], strict=False)]
            done = list(self._pool.map(_augment_in_worker, [images_BHWC[s] for s in slices], [keys[s] for s in slices]))
        return dataclasses.replace(batch, images=torch.from_numpy(np.concatenate(done)))

    def close(self) -> None:
        """End the processes; safe to call twice."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _on_host(self, images: torch.Tensor) -> torch.Tensor:
        """Copy to the CPU on a stream of its own: on the default stream a copy would wait for the training step."""
        if not images.is_cuda:
            return images
        if self._stream is None:
            self._stream = torch.cuda.Stream(images.device)
        with torch.cuda.stream(self._stream):
            return images.to("cpu")


def make_operation(form: str, image_size: tuple[int, int], mean: Sequence[float]) -> Operation:
    """Make timm's RandAugment with the settings that its own training pipeline gives it, bicubic."""
    from timm.data.auto_augment import rand_augment_transform  # it imports all of timm, so it comes late

    settings = {
        "translate_const": int(min(image_size) * 0.45),
        "img_mean": tuple(min(255, round(255 * value)) for value in mean),
        "interpolation": Image.Resampling.BICUBIC,
    }
    transform = rand_augment_transform(form, settings)
    for operator in transform.ops:
        if operator.name.startswith("Posterize"):
            operator.level_fn = partial(_at_least_one_bit, operator.level_fn)
    return transform


def _at_least_one_bit(level_of: Callable[..., tuple[int]], magnitude: float, settings: dict) -> tuple[int]:
    """Keep at least one bit: timm's strongest posterising keeps none, an all-black picture, which Pillow 13 refuses."""
    return (max(1, *level_of(magnitude, settings)),)


def augment(operation: Operation, images_BHWC: np.ndarray, keys: list[int]) -> np.ndarray:
    """Augment uint8 [B, H, W, 3] to the same shape, image i as a function of key i."""
    result_BHWC = np.empty_like(images_BHWC)
    for i, key in enumerate(keys):
        with seeded(key):
            result_BHWC[i] = np.asarray(operation(Image.fromarray(images_BHWC[i])))
    return result_BHWC


def _start_pool(workers: int, *operation: object) -> ProcessPoolExecutor:
    """Start ``workers`` processes that no signal to the run's whole group ends, from their first moment on.

    A scheduler or a terminal signals whole groups; a run that is told to stop saves first, and needs its workers until
    then.
    """
    context = multiprocessing.get_context("spawn")  # a fork would take CUDA and the loader's threads along
    with _stop_signals_blocked():  # the process that tracks semaphores starts here, and must not be ended either
        all_started = context.Event()
        pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(all_started, *operation))
    with _stop_signals_blocked():  # again, because starting the tracker unblocks them
        try:
            for _ in range(workers):  # each starts one process, as long as none is ready
                pool.submit(os.getpid)
        finally:
            all_started.set()
    return pool


@contextmanager
def _stop_signals_blocked() -> Iterator[None]:
    """Block stop signals in this thread and so in processes that it starts; another thread takes them meanwhile."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# --- in a worker

_operation: Operation | None = None


def _start_worker(all_started: Event, form: str, image_size: tuple[int, int], mean: tuple[float, ...]) -> None:
    """Prepare a worker, which leaves when the run says so, or when the run is gone."""
    global _operation
    for watch in (_leave_when_told, _leave_with_parent):
        threading.Thread(target=watch, daemon=True).start()
    _operation = make_operation(form, image_size, mean)
    all_started.wait()


def _augment_in_worker(images_BHWC: np.ndarray, keys: list[int]) -> np.ndarray:
    assert _operation is not None
    return augment(_operation, images_BHWC, keys)


def _leave_when_told() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(1)


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
