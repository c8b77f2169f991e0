"""Augment a whole batch on its device: random erasing, mixup and cutmix, smoothed targets.

RandAugment, which works on single pictures on the CPU, comes before it, in the loader.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.data.mixup import Mixup, mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.nn import functional as F

from mirl.dataloaders import Batch
from mirl.engine.models.pixels import normalise_images
from mirl.engine.transfer.random_state import BATCH_STREAM, keys_of, seeded
from mirl.errors import UserError


class BatchAugmentation:
    """Turn uint8 images and labels into normalised float images and soft targets.

    All random numbers are a function of (seed, epoch, place of the micro-batch in the epoch). So a resumed run sees the
    same batches, on any number of ranks that keeps the size of a micro-batch. A micro-batch has one mixing ratio, and
    its images are mixed with those of the same micro-batch in reverse order, as in timm.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int,
        micro_batch: int,
        device: torch.device,
        random_erase: float = 0.25,
        mixup: float = 0.8,
        cutmix: float = 1.0,
        label_smoothing: float = 0.1,
    ) -> None:
        """Set up the parts; 0 turns a part off.

        random_erase: probability for an image, erased by noise pixel by pixel. mixup, cutmix: alpha of the beta
        distributions; each micro-batch takes one of the two.

        Raises:
            UserError: a value out of its range, or an odd micro-batch to be mixed.
        """
        for name, value, highest in (
            ("random_erase", random_erase, 1.0), ("mixup", mixup, float("inf")), ("cutmix", cutmix, float("inf")),
            ("label_smoothing", label_smoothing, 1.0),
        ):  # fmt: skip
            if not 0 <= value <= highest:
                raise UserError(f"{name} is {value}: give 0 (off) or more{', up to 1' if highest == 1 else ''}")
        mixing = bool(mixup or cutmix)
        if mixing and micro_batch % 2:
            raise UserError(
                f"micro_batch is {micro_batch} and mixup or cutmix pairs the images of a micro-batch: give an even "
                "number, or set --mixup 0 --cutmix 0"
            )
        self.num_classes, self.label_smoothing = num_classes, label_smoothing
        self.mean, self.std, self.seed, self.device = tuple(mean), tuple(std), seed, device
        self._erase = RandomErasing(random_erase, mode="pixel", device=str(device)) if random_erase else None
        self._mix = None
        if mixing:
            self._mix = Mixup(
                mixup_alpha=mixup, cutmix_alpha=cutmix, label_smoothing=label_smoothing, num_classes=num_classes
            )

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return images float32 [B, C, H, W] and targets float32 [B, classes], each row of which sums to 1."""
        assert batch.labels is not None, "the loader was built without labels"
        images_BCHW = normalise_images(batch.images, self.mean, self.std, torch.float32)
        if images_BCHW is batch.images:
            images_BCHW = images_BCHW.clone()  # the parts below write in place
        (key,) = keys_of(BATCH_STREAM, self.seed, batch.epoch, batch.positions[:1])
        with seeded(key, self.device):
            if self._erase is not None:
                images_BCHW = self._erase(images_BCHW)
            if self._mix is not None:
                return self._mix(images_BCHW, batch.labels)
        return images_BCHW, mixup_target(batch.labels, self.num_classes, smoothing=self.label_smoothing)


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean over the batch of -sum(target * log_softmax(logits)), in float32 at least."""
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)
