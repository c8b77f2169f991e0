"""Load pictures with their objects, in the order that any run has, ahead of the training step.

The loader has the face of `mirl.dataloaders.TrainLoader` as far as a run asks for it: the same images at a step on any
number of ranks, resumable at any step, broken pictures replaced and counted.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mirl.dataloaders.errors import BadImage, ImageError, TooManyBadImages, one_line
from mirl.dataloaders.order import EpochOrder, StepPlan
from mirl.dataloaders.stream import Batch
from mirl.engine.transfer.detection.annotations import CocoSet
from mirl.engine.transfer.detection.config import DetectSection
from mirl.engine.transfer.detection.transforms import Sample, for_evaluation, for_training, pad_together
from mirl.errors import UserError

AHEAD = 2  # so many micro-batches are read while one is used
STAND_INS = 16  # so many pictures are tried, a broken one and those after it


@dataclass(slots=True)
class DetectionBatch(Batch):
    """The batch has images padded to one size, and their objects.

    sizes: height and width of each image without padding. targets: of each image, on the device. originals: sizes of
    the pictures before they were resized (evaluation).
    """

    sizes: list[tuple[int, int]] = field(default_factory=list)
    targets: list[dict[str, Tensor]] = field(default_factory=list)
    originals: list[tuple[int, int]] = field(default_factory=list)


class DetectionLoader:
    """The loader hands out endless micro-batches of one rank. It is not safe to share between threads."""

    def __init__(
        self,
        data: CocoSet,
        plan: StepPlan,
        section: DetectSection,
        *,
        size: tuple[int, int],
        multiple: int,
        seed: int,
        device: torch.device,
        threads: int,
        channels: int = 3,
        flip: bool = True,
        bad_image_limit: float = 0.001,
    ) -> None:
        """Start the threads, ``threads`` of them. size, multiple: see `DetectConfig.size` and `pad_together`."""
        self.data, self.plan, self.section, self.size, self.multiple = data, plan, section, size, multiple
        self.seed, self.device, self.channels, self.flip = seed, device, channels, flip
        self.num_images, self.ledger, self.source = data.num_images, data, data
        self.steps_per_epoch, self.effective_batch = plan.steps_per_epoch, plan.effective_batch
        self.fingerprint = data.fingerprint
        self.bad_images: list[BadImage] = []
        self.bad_allowed = 0 if bad_image_limit == 0 else max(1, int(bad_image_limit * data.num_images))
        self._bad_limit, self._bad_paths = bad_image_limit, set[str]()
        self.wait_seconds = 0.0
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="mirl-detect")
        self._order = EpochOrder(data.num_images, seed)
        self._micro_step = 0
        self._ahead: deque[tuple[int, np.ndarray, list[Future[_Read]]]] = deque()

    @property
    def step(self) -> int:
        """Count the optimiser steps whose images have all been handed out."""
        return self._micro_step // self.plan.accumulation

    @property
    def too_many_bad(self) -> bool:
        """Say whether more distinct pictures broke on this rank than the limit allows."""
        return len(self.bad_images) > self.bad_allowed

    def next_micro_batch(self) -> DetectionBatch:
        """Return the images of this rank's next forward pass. UserError if sixteen in a row are broken."""
        while len(self._ahead) <= AHEAD:
            epoch, positions = self.plan.locate(self._micro_step + len(self._ahead))
            chosen = self._order(epoch)[positions]
            jobs = [
                self._pool.submit(self._read, int(index), epoch, int(position))
                for index, position in zip(chosen, positions, strict=True)
            ]
            self._ahead.append((epoch, positions, jobs))
        epoch, positions, jobs = self._ahead.popleft()
        began = time.perf_counter()
        read = [job.result() for job in jobs]
        self.wait_seconds += time.perf_counter() - began
        self._micro_step += 1
        bad = [problem for one in read for problem in one.bad]
        self._count_bad(bad)
        return self._batch(read, epoch, positions, bad)

    def _batch(self, read: Sequence[_Read], epoch: int, positions: np.ndarray, bad: list[BadImage]) -> DetectionBatch:
        samples = [one.sample for one in read]
        images = pad_together([sample.image for sample in samples], self._least, self.multiple)
        to = {"device": self.device, "non_blocking": False}
        height, width = images.shape[1:3]
        return DetectionBatch(
            images=images.to(**to), sample_ids=np.array([one.index for one in read]), epoch=epoch,
            positions=np.asarray(positions), bad=bad,
            sizes=[tuple(sample.image.shape[1:]) for sample in samples],  # type: ignore[misc]  # two of them
            targets=[
                {name: value.to(**to) for name, value in _padded(sample, height, width).items()} for sample in samples
            ],
            originals=[sample.original for sample in samples],
        )  # fmt: skip

    @property
    def _least(self) -> tuple[int, int]:
        """Return the least padded size: crops all have one size, to which smaller pictures are padded."""
        return self.size if self.section.variant == "vitdet" else (1, 1)

    def _read(self, index: int, epoch: int, position: int) -> _Read:
        problems: list[tuple[str, str]] = []
        for other in range(index, index + STAND_INS):
            other %= self.num_images
            try:
                pixels = self.data.picture(other, self.channels)
            except ImageError as error:
                problems.append((self.data.file(other), one_line(error)))
                continue
            sample = for_training(
                pixels, self.data.objects(other), self.section, self.size, (self.seed, epoch, position), flip=self.flip
            )
            shown = self.data.file(other)
            bad = [
                BadImage(path=path, reason=why, epoch=epoch, position=position, replaced_by=shown)
                for path, why in problems
            ]
            return _Read(sample=sample, index=other, bad=bad)
        raise UserError(f"{problems[0][1]}; the {len(problems) - 1} after it are broken too: mend the data set")

    def _count_bad(self, bad: list[BadImage]) -> None:
        for image in bad:
            if image.path not in self._bad_paths:
                self._bad_paths.add(image.path)
                self.bad_images.append(image)

    def paths(self, sample_ids: Sequence[int] | np.ndarray) -> list[str]:
        """Return where the images are, for messages."""
        return [self.data.file(int(index)) for index in sample_ids]

    suspects = paths

    def bad_limit_error(self) -> TooManyBadImages:
        """Make the error for a run that has passed its limit, naming the first few images."""
        some = "; ".join(f"{bad.path}: {bad.reason}" for bad in self.bad_images[:3])
        return TooManyBadImages(
            f"{len(self.bad_images)} of {self.num_images} images are broken, more than the {self.bad_allowed} that "
            f"max_bad_images {self._bad_limit:g} allows ({some}; ...); mend them, take them out of the annotations, or "
            "raise the limit (--max-bad-images)"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return where the run stands, at the last whole optimiser step. It is the same on all ranks."""
        return {
            "version": 1, "seed": self.seed, "step": self.step, "effective_batch": self.effective_batch,
            "num_images": self.num_images, "fingerprint": self.fingerprint,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the step of ``state``. UserError if seed, batch or annotations differ."""
        mends = {
            "seed": "set the seed of the run that is resumed",
            "effective_batch": "choose micro_batch x accumulation x world_size to match",
            "fingerprint": f"it had {state['num_images']} images and now there are {self.num_images}, or other "
            "annotations: give the file as it was, or start a new run",
        }
        for name, mend in mends.items():
            if state[name] != getattr(self, name):
                raise UserError(f"{name} is {getattr(self, name)}, the checkpoint has {state[name]}; {mend}")
        self._drop()
        self._micro_step = int(state["step"]) * self.plan.accumulation

    def _drop(self) -> None:
        for _, _, jobs in self._ahead:
            for job in jobs:
                job.cancel()
        self._ahead.clear()

    def close(self) -> None:
        """End all threads."""
        self._drop()
        self._pool.shutdown(cancel_futures=True)
        self._order.close()


@dataclass(frozen=True)
class _Read:
    sample: Sample
    index: int
    bad: list[BadImage]


def _padded(sample: Sample, height: int, width: int) -> dict[str, Tensor]:
    """Return the target of ``sample`` with masks of the padded size."""
    masks = sample.target["masks"]
    padding = (0, width - masks.shape[2], 0, height - masks.shape[1])
    return sample.target | {"masks": torch.nn.functional.pad(masks, padding)}


def evaluation_batches(
    data: CocoSet, *, rank: int, world_size: int, batch_size: int, variant: str, size: tuple[int, int], multiple: int,
    device: torch.device, channels: int, threads: int,
) -> Iterator[DetectionBatch]:  # fmt: skip
    """Yield every image once, divided among the ranks, which all get equally many batches.

    ``sample_ids`` are numbers of images, -1 for an image that only fills up a batch or cannot be read; ``bad`` names
    the unreadable ones.
    """
    rounds = -(-data.num_images // (world_size * batch_size))
    with ThreadPoolExecutor(threads, thread_name_prefix="mirl-detect-val") as pool:

        def read(index: int) -> Tensor | ImageError:
            try:
                return for_evaluation(data.picture(index, channels), variant, size)
            except ImageError as error:
                return error

        def begin(number: int) -> tuple[np.ndarray, list[Future[Tensor | ImageError]]]:
            places = (number * world_size + rank) * batch_size + np.arange(batch_size)
            return places, [pool.submit(read, int(place % data.num_images)) for place in places]

        ahead = deque(begin(number) for number in range(min(1, rounds)))
        for number in range(rounds):
            if number + 1 < rounds:
                ahead.append(begin(number + 1))
            places, jobs = ahead.popleft()
            found = [job.result() for job in jobs]
            blank = torch.zeros(channels, 32, 32, dtype=torch.uint8)
            images = [one if isinstance(one, Tensor) else blank for one in found]
            valid = np.array([place < data.num_images for place in places])
            bad = [
                BadImage(data.file(int(place)), one_line(one), 0, int(place), "")
                for place, one, real in zip(places, found, valid, strict=True)
                if real and isinstance(one, ImageError)
            ]
            broken = {problem.position for problem in bad}
            ids = np.array(
                [place if real and place not in broken else -1 for place, real in zip(places, valid, strict=True)]
            )
            least = size if variant == "vitdet" else (1, 1)
            yield DetectionBatch(
                images=pad_together(images, least, multiple).to(device), sample_ids=ids, epoch=0, positions=places,
                valid=ids >= 0, bad=bad,
                sizes=[tuple(image.shape[1:]) for image in images],  # type: ignore[misc]  # two of them
                originals=[data.size(int(place % data.num_images)) for place in places],
            )  # fmt: skip
