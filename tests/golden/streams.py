"""Every random stream of the engine as a hash of its numbers, with the first few beside it for the reader.

None of these depends on a decoder, a compiler or the width of a vector unit, so they are equal on every machine.
"""

from __future__ import annotations

import hashlib
import io
import random
from typing import Any

import numpy as np
import torch
from PIL import Image

from mirl.dataloaders import Batch
from mirl.dataloaders.decoding.crops import Augmentation
from mirl.dataloaders.decoding.samples import SampleReader
from mirl.dataloaders.errors import ImageError
from mirl.dataloaders.order import StepPlan, epoch_permutation
from mirl.engine.models.pixels import normalise_images
from mirl.engine.training.noise import mask_noise, seed_stochastic_depth
from mirl.engine.transfer.classification.augmentation import BatchAugmentation
from mirl.engine.transfer.classification.rand_augment import DEFAULT, augment, make_operation
from mirl.engine.transfer.random_state import BATCH_STREAM, RAND_AUGMENT_STREAM, keys_of, seeded
from mirl.keyed import keyed_u64, keyed_uniform

SHOWN = 6
MEAN, STD, BATCH, CLASSES = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 8, 10


def _recorded(numbers: np.ndarray) -> dict[str, Any]:
    numbers = np.ascontiguousarray(numbers)
    digest = hashlib.sha256(numbers.astype(numbers.dtype.newbyteorder("<")).tobytes()).hexdigest()
    return {"sha256": digest, "shape": list(numbers.shape), "first": numbers.reshape(-1)[:SHOWN].tolist()}


def _windows() -> np.ndarray:
    sizes = np.array([[375, 500], [500, 375], [64, 64], [1, 900], [900, 1], [33, 77]] * 50)
    windows, mirrored = Augmentation(image_size=(224, 192)).windows(sizes, 5, 2, np.arange(1000, 1000 + len(sizes)))
    return np.concatenate([windows, mirrored[:, None].astype(np.int32)], axis=1)


def _positions_of_ranks() -> np.ndarray:
    plans = [StepPlan(num_images=1003, micro_batch=4, accumulation=3, rank=rank, world_size=2) for rank in range(2)]
    return np.stack([np.append(plan.locate(step)[1], plan.locate(step)[0]) for plan in plans for step in range(150)])


def _draws(stream: int) -> np.ndarray:
    """What timm's transforms draw from: Python's, numpy's and torch's generator under each key."""
    rows = []
    for key in keys_of(stream, 3, 1, np.arange(20)):
        with seeded(key, torch.device("cpu")):
            rows.append([random.random(), np.random.rand(), float(torch.rand((), dtype=torch.float64))])
    return np.array(rows)


def _dropped_paths() -> np.ndarray:
    rows = []
    for step in range(4):
        seed_stochastic_depth(9, step, 16)
        rows.append(torch.rand(32, dtype=torch.float64).numpy())
    return np.array(rows)


def _operators() -> np.ndarray:
    """What RandAugment asks of each image, whatever pixels Pillow makes of it: the number of an operator among timm's
    and the strength of it in millionths, for logarithms of another library may differ in their last bit.
    """
    operation, rows = make_operation(DEFAULT, (32, 32), MEAN), []
    for number, operator in enumerate(operation.ops):

        def noted(image: Image.Image, *levels: float, number: int = number, **_: Any) -> Image.Image:
            rows.append([number, round(1e6 * float(levels[0])) if levels else 0])
            return image

        operator.aug_fn = noted
    augment(operation, np.zeros((60, 32, 32, 3), np.uint8), keys_of(RAND_AUGMENT_STREAM, 3, 1, np.arange(60)))
    return np.array(rows)


def _batches(**parts: float) -> tuple[np.ndarray, np.ndarray]:
    """Of twelve micro-batches: which pixels `BatchAugmentation` changed, bool [12, B, H, W], and the targets of the
    first image of each in millionths, [12, classes].
    """
    images = torch.randint(0, 256, (BATCH, 32, 32, 3), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    plain, labels, changed, targets = normalise_images(images, MEAN, STD, torch.float32), torch.arange(BATCH), [], []
    augmentation = BatchAugmentation(
        num_classes=CLASSES, mean=MEAN, std=STD, seed=3, micro_batch=BATCH, device=torch.device("cpu"),
        **({"random_erase": 0.0, "mixup": 0.0, "cutmix": 0.0, "label_smoothing": 0.0} | parts),
    )  # fmt: skip
    for number in range(12):
        positions = np.arange(number * BATCH, (number + 1) * BATCH)
        batch = Batch(images=images, sample_ids=positions, epoch=1, positions=positions, labels=labels)
        made, wanted = augmentation(batch)
        changed.append((made != plain).any(dim=1).numpy())
        targets.append(np.rint(1e6 * wanted[0].double().numpy()).astype(np.int64))
    return np.stack(changed), np.stack(targets)


class _HalfBroken:
    """A source of a thousand images, every even one of them broken."""

    num_images = 1000

    def __init__(self) -> None:
        stream = io.BytesIO()
        Image.new("RGB", (8, 8)).save(stream, "PNG")
        self._image = stream.getvalue()

    def read(self, index: int) -> bytes:
        if index % 2 == 0:
            raise ImageError("broken")
        return self._image


def _stand_ins() -> np.ndarray:
    reader = SampleReader(_HalfBroken(), seed=3)
    try:
        samples = [reader.read(2 * position, 1, position) for position in range(200)]
    finally:
        reader.close()
    return np.array([[sample.index, sample.attempt] for sample in samples])


def record_streams() -> dict[str, dict[str, Any]]:
    """The record of each stream: sha256 of its numbers in little-endian order, their shape, and the first few."""
    state = torch.get_rng_state()
    try:
        return {
            "keyed_u64": _recorded(keyed_u64(7, 11, np.arange(1000))),
            "keyed_uniform": _recorded(keyed_uniform(7, 11, np.arange(1000))),
            "mask_noise": _recorded(mask_noise(3, 17, 5, 9, 197).numpy()),
            "epoch_permutation": _recorded(epoch_permutation(5000, 3, 2)),
            "positions_of_ranks": _recorded(_positions_of_ranks()),
            "crop_windows_and_flips": _recorded(_windows()),
            "rand_augment_draws": _recorded(_draws(RAND_AUGMENT_STREAM)),
            "rand_augment_operators": _recorded(_operators()),
            "erase_mixup_cutmix_draws": _recorded(_draws(BATCH_STREAM)),
            "erased_pixels": _recorded(_batches(random_erase=0.5)[0]),
            "cutmix_pixels": _recorded(_batches(cutmix=1.0)[0]),
            "mixup_targets": _recorded(_batches(mixup=0.8)[1]),
            "smooth_mixup_or_cutmix_targets": _recorded(_batches(mixup=0.8, cutmix=1.0, label_smoothing=0.1)[1]),
            "stand_ins_for_broken_images": _recorded(_stand_ins()),
            "stochastic_depth_draws": _recorded(_dropped_paths()),
        }
    finally:
        torch.set_rng_state(state)
