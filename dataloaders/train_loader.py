"""The loader that training uses: endless, resumable at any step, the same images at a step on any number of ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mirl.dataloaders.decoding.arrays import check_statistics, detect_array_format
from mirl.dataloaders.decoding.crops import Augmentation
from mirl.dataloaders.decoding.dali_pipeline import DaliDecoder
from mirl.dataloaders.decoding.resize import CpuResizer
from mirl.dataloaders.decoding.samples import SampleReader
from mirl.dataloaders.errors import BadImage, ImageError, TooManyBadImages
from mirl.dataloaders.greyness import all_grey
from mirl.dataloaders.order import EpochOrder, StepPlan
from mirl.dataloaders.sources.base import Source
from mirl.dataloaders.sources.opening import Data, open_source
from mirl.dataloaders.sources.paths import shown
from mirl.dataloaders.sources.patience import read_image
from mirl.dataloaders.sources.resumed import as_before, identity
from mirl.dataloaders.stream import Batch, BatchPlan, BatchStream, Transform
from mirl.errors import UserError

_log = logging.getLogger(__name__)


def build_train_loader(
    data: Data | Source,
    *,
    image_size: tuple[int, int],
    micro_batch: int,
    accumulation: int = 1,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    device_id: int | None = None,
    threads: int = 4,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: bool = True,
    centred: float = 0.0,
    channels: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    layout: str = "auto",
    index_dir: str | Path | None = None,
    labels: bool = False,
    bad_image_limit: float = 0.001,
    raise_on_bad_limit: bool = True,
    batch_transform: Transform | None = None,
    prefetch: int = 2,
    read_threads: int | None = None,
    hw_decoder_load: float = 0.65,
    resumed_fingerprint: str | None = None,
) -> TrainLoader:
    """Opens the data and returns a loader at step 0; nothing is decoded before the first batch is asked for.

    data, layout, index_dir, labels: see `open_source`; a Source is taken as it is.
    image_size: (height, width) of the images, pixels. micro_batch, accumulation: images per forward pass of a rank, and
    forward passes per optimiser step. seed: order and augmentation. device_id: CUDA device, or None for the CPU.
    threads: decoding threads of this rank. read_threads: threads that read files; default 4 on a GPU, since
    they share Python's lock with the thread that launches kernels, else max(4, threads).
    scale, ratio, flip, centred: see `Augmentation`. channels: 3, 1, or what array files hold; mean, std: of array files
    of floats or uint16, which come out normalised (uint8 is normalised by the model).
    bad_image_limit: distinct broken images, as a share of the data set, that this rank puts up with (at least one,
    unless 0). Past it `next_micro_batch` raises TooManyBadImages; with raise_on_bad_limit False it goes on, and
    `too_many_bad` is True, so that ranks can agree to stop at one step.
    batch_transform: called on each batch in the loader's thread, ahead of the training loop, before it is on the device
    (RandAugment). A function of the batch alone: a batch may be made twice, or never be used.
    prefetch: finished batches that may wait. resumed_fingerprint: of the data set in the checkpoint that a run goes on
    from; images that a manifest calls broken since then keep their places in the order, and others are shown for them.
    UserError, one line with the mend, for data or settings that cannot work.
    """
    if is_data(data):
        opened = partial(open_source, data, layout=layout, labels=labels, index_dir=index_dir)
        source = opened()
        if resumed_fingerprint is not None:
            source = as_before(source, partial(opened, use_manifest=False), resumed_fingerprint)
    else:
        source = data
    augmentation = Augmentation(image_size=tuple(image_size), scale=scale, ratio=ratio, flip=flip, centred=centred)
    plan = StepPlan(
        num_images=source.num_images,
        micro_batch=micro_batch,
        accumulation=accumulation,
        rank=rank,
        world_size=world_size,
    )
    if not 0 <= bad_image_limit <= 1:
        raise UserError(f"bad_image_limit is {bad_image_limit}, a share of the data set, must be in 0..1")
    array_format = first_array_format(source, channels)
    check_statistics(channels, mean, std)
    reader = SampleReader(
        source,
        seed=seed,
        channels=channels,
        array_format=array_format,
        labels=labels,
        threads=read_threads or (4 if device_id is not None else max(4, threads)),
    )
    decoder = None
    if array_format is None:
        decoder = DaliDecoder(
            batch_size=micro_batch,
            image_size=augmentation.image_size,
            channels=channels,
            threads=threads,
            device_id=device_id,
            hw_decoder_load=hw_decoder_load,
        )
    resizer = None if decoder is not None and decoder.finish else CpuResizer(augmentation.image_size, threads)
    return TrainLoader(
        source,
        plan,
        augmentation,
        reader,
        decoder,
        resizer,
        seed=seed,
        device=torch.device("cpu" if device_id is None else f"cuda:{device_id}"),
        statistics=(mean, std),
        bad_image_limit=bad_image_limit,
        raise_on_bad_limit=raise_on_bad_limit,
        batch_transform=batch_transform,
        prefetch=prefetch,
    )


class TrainLoader:
    """Made by `build_train_loader`. Not safe to share between threads.

    num_images, steps_per_epoch, effective_batch: of the whole run, equal on all ranks by construction.
    ledger: how many files there are, and why some of them are left out.
    wait_seconds: time that `next_micro_batch` has blocked, in total.
    bad_images: the distinct images that broke, in the order in which they were met; bad_encounters: how often one was.
    """

    def __init__(
        self,
        source: Source,
        plan: StepPlan,
        augmentation: Augmentation | None,
        reader: SampleReader,
        decoder: DaliDecoder | None,
        resizer: CpuResizer | None,
        *,
        seed: int,
        device: torch.device,
        statistics: tuple[Sequence[float] | None, Sequence[float] | None],
        bad_image_limit: float,
        raise_on_bad_limit: bool,
        batch_transform: Transform | None,
        prefetch: int,
    ) -> None:
        self.source, self.plan, self.augmentation, self.seed = source, plan, augmentation, seed
        self.num_images, self.ledger = source.num_images, source.ledger
        self.steps_per_epoch = plan.steps_per_epoch
        self.effective_batch = plan.effective_batch
        self.fingerprint = identity(source)
        self.bad_images: list[BadImage] = []
        self.bad_encounters = 0
        self.bad_allowed = 0 if bad_image_limit == 0 else max(1, int(bad_image_limit * source.num_images))
        self._bad_paths: set[str] = set()
        self._bad_limit, self._raise_on_bad_limit = bad_image_limit, raise_on_bad_limit
        self._reader, self._decoder, self._resizer = reader, decoder, resizer
        self._device, self._statistics = device, statistics
        self._transform, self._prefetch = batch_transform, prefetch
        self._order = EpochOrder(source.num_images, seed)
        self._micro_step = 0
        self._stream: BatchStream | None = None
        self._waited = 0.0
        self._size_at: Callable[[int], tuple[int, int]] | None = None

    @property
    def wait_seconds(self) -> float:
        return self._waited + (self._stream.wait_seconds if self._stream is not None else 0.0)

    @property
    def step(self) -> int:
        """Optimiser steps whose images have all been handed out."""
        return self._micro_step // self.plan.accumulation

    @property
    def too_many_bad(self) -> bool:
        """Whether more distinct images broke on this rank than the limit allows."""
        return len(self.bad_images) > self.bad_allowed

    def is_grey(self) -> bool:
        """Whether the images sampled have one value in all of their channels (see `all_grey`)."""
        return all_grey(self.source, self._reader.channels, self._reader.array_format)

    def take_statistics(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Normalise by ``mean`` and ``std`` from now on; before the first batch."""
        assert self._stream is None, "batches with other statistics are on their way"
        self._statistics = mean, std

    def take_image_sizes(self, size_at: Callable[[int], tuple[int, int]]) -> None:
        """Make images of ``size_at(step)``, (height, width), for each optimiser step from 0; before the first batch.

        Which window of an image is shown, and whether it is mirrored, does not depend on the size.
        """
        assert self._stream is None, "batches of another size are on their way"
        self._size_at = size_at

    def next_micro_batch(self) -> Batch:
        """The images of the next forward pass of this rank. Blocks until they are there.

        TooManyBadImages past the limit (see `build_train_loader`); UserError if stand-ins cannot be read either.
        """
        if self._stream is None:
            self._stream = self._open_stream(self._plans(self._micro_step))
        batch = next(self._stream)
        self._micro_step += 1
        self._count_bad(batch.bad)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands, at the last whole optimiser step. The same on all ranks; a few numbers."""
        return {
            "version": 1,
            "seed": self.seed,
            "step": self.step,
            "effective_batch": self.effective_batch,
            "num_images": self.num_images,
            "fingerprint": self.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on after the step of `state`, at any world size, micro-batch and accumulation with the same product.

        UserError if the seed, the effective batch or the data set is another, since the images would then differ.
        """
        mends = {
            "seed": "set the seed of the run that is resumed",
            "effective_batch": "choose micro_batch x accumulation x world_size to match",
            "fingerprint": f"it had {state['num_images']} images and now there are {self.num_images}, or other names: "
            "restore the data set as it was (broken files need not be deleted: a manifest of mirl validate-data leaves "
            "them out), or start a new run from the weights (--init-from)",
        }
        for field, mend in mends.items():
            if state[field] != getattr(self, field):
                raise UserError(f"{field} is {getattr(self, field)}, the checkpoint has {state[field]}; {mend}")
        self._drop_stream()
        self._micro_step = int(state["step"]) * self.plan.accumulation

    def paths(self, sample_ids: Sequence[int] | np.ndarray) -> list[str]:
        """Where the images are, for messages."""
        return [self.source.path(int(index)) for index in sample_ids]

    def suspects(self, sample_ids: Sequence[int] | np.ndarray) -> list[str]:
        """Where the images are, those of the largest numbers first: what to name when a loss is not finite.

        Arrays are read again for it; pictures, whose numbers are 0 to 255, stay in their order.
        """
        return self.paths(sorted(sample_ids, key=lambda index: -self._reader.largest_number(int(index))))

    def bad_limit_error(self) -> TooManyBadImages:
        """The error for a run that has passed its limit, naming the first few images."""
        some = "; ".join(f"{shown(bad.path)}: {bad.reason}" for bad in self.bad_images[:3])
        return TooManyBadImages(
            f"{len(self.bad_images)} of {self.num_images} images are broken, more than the {self.bad_allowed} that "
            f"bad_image_limit {self._bad_limit:g} allows ({some}; ...); run mirl validate-data on the data set, "
            "which writes a manifest that leaves them out, or raise the limit (--max-bad-images); then --resume auto "
            "goes on"
        )

    def close(self) -> None:
        """Ends all threads and frees the decoder; safe to call twice."""
        self._drop_stream()
        self._reader.close()
        self._order.close()
        if self._resizer is not None:
            self._resizer.close()
        if self._decoder is not None:
            self._decoder.close()
        self.source.close()

    def __enter__(self) -> TrainLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_stream(self, plans: Iterator[BatchPlan]) -> BatchStream:
        return BatchStream(
            plans,
            self._reader,
            self._geometry,
            self._decoder,
            self._resizer,
            device=self._device,
            prefetch=self._prefetch,
            statistics=self._statistics,
            transform=self._transform,
        )

    def _plans(self, first_micro_step: int) -> Iterator[BatchPlan]:
        for micro_step in count(first_micro_step):
            epoch, positions = self.plan.locate(micro_step)
            size = None if self._size_at is None else self._size_at(micro_step // self.plan.accumulation)
            yield BatchPlan(epoch, self._order(epoch)[positions], positions, image_size=size)

    def _geometry(self, sizes_B2: np.ndarray, epoch: int, positions: np.ndarray):
        assert self.augmentation is not None
        windows_B4, mirrored_B = self.augmentation.windows(sizes_B2, self.seed, epoch, positions)
        return windows_B4, mirrored_B, None, None

    def _count_bad(self, bad: list[BadImage]) -> None:
        for image in bad:
            self.bad_encounters += 1
            if image.path not in self._bad_paths:
                self._bad_paths.add(image.path)
                self.bad_images.append(image)
                names = shown(image.path), image.reason, shown(image.replaced_by)
                _log.warning("broken image %s (%s), shown instead: %s", *names)
        if bad and self.too_many_bad and self._raise_on_bad_limit:
            raise self.bad_limit_error()

    def _drop_stream(self) -> None:
        if self._stream is not None:
            self._waited += self._stream.wait_seconds
            self._stream.close()
            self._stream = None


def first_array_format(source: Source, channels: int):
    """The array format of a data set by its first readable file; None for pictures."""
    failures = []
    for index in range(min(source.num_images, 100)):
        try:
            return detect_array_format(read_image(source, index), source.path(index), channels)
        except ImageError as error:
            failures.append(f"{source.path(index)}: {error}")
    raise UserError(f"none of the first {len(failures)} images can be read ({failures[0]}); check the data set")


def is_data(data: Data | Source) -> bool:
    """Whether `data` is still to be opened."""
    return not hasattr(data, "num_images")
