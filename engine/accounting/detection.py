"""Formulas give the FLOPs of a Mask R-CNN on a plain Vision Transformer, and the bytes it keeps for the backward pass.

A FLOP is one multiplication or one addition, as in `mirl.engine.accounting.flops`; norms, softmax, RoIAlign and NMS are
left out. Letters: N patches, D width, V side of a window, C channels of pyramid and heads.
"""

from __future__ import annotations

from dataclasses import dataclass

from mirl.engine.accounting.activations import VALUE_BYTES, classifier_activations
from mirl.engine.models.checkpointing import CheckpointPlan
from mirl.engine.models.config import ModelConfig

PLACES = 16 + 4 + 1 + 1 / 4 + 1 / 16  # in the five maps together, for each patch
ANCHORS = 3
BOX_PLACES, MASK_PLACES = 7 * 7, 14 * 14
MASK_SHARE = 0.25  # at most this share of the regions has an object, and so a mask


@dataclass(frozen=True, kw_only=True)
class DetectorShape:
    """The fields decide the cost of a detector. window: 0 for none; else ``global_blocks`` blocks attend globally."""

    variant: str
    window: int
    global_blocks: int
    channels: int
    regions: int
    classes: int


@dataclass(frozen=True, kw_only=True)
class DetectorFlops:
    """The fields count FLOPs of the forward pass on one image in training."""

    patch_projection: float
    linear: float
    attention: float
    pyramid: float
    proposals: float
    regions: float

    @property
    def encoder(self) -> float:
        return self.patch_projection + self.linear + self.attention

    @property
    def total(self) -> float:
        return self.encoder + self.pyramid + self.proposals + self.regions

    @property
    def training(self) -> float:
        """Count the forward and backward pass without recomputation; pixels need no gradient."""
        return 3 * self.total - self.patch_projection


def detector_flops(config: ModelConfig, shape: DetectorShape) -> DetectorFlops:
    """Count the forward pass on one image of the size of ``config``."""
    patches, width, channels = config.num_patches, config.width, shape.channels
    tokens = patches if shape.window else 1 + patches
    windowed = config.depth - shape.global_blocks if shape.window else 0
    keys = windowed * shape.window**2 + (config.depth - windowed) * tokens
    per_place = 2 * 9 * channels**2
    if shape.variant == "paper":
        # Two deconvolutions lead to the largest map and one to the next. The feature pyramid has 1 x 1 and 3 x 3.
        scales = 2 * 4 * width**2 * (1 + 4 + 1)
        projected = 2 * width * channels * (16 + 4 + 1 + 1 / 4)
    else:
        half, quarter = width // 2, width // 4
        scales = 2 * 4 * (width * half + 4 * half * quarter + width * half)
        projected = 2 * channels * (16 * quarter + 4 * half + (1 + 1 / 4) * width)
    convolutions = 1 if shape.variant == "paper" else 2
    box = shape.regions * (
        4 * BOX_PLACES * per_place + 2 * 4 * channels * (BOX_PLACES * channels + 5 * (1 + shape.classes))
    )
    mask = 4 * MASK_PLACES * per_place + 2 * 4 * MASK_PLACES * channels * (channels + 1 + shape.classes)
    return DetectorFlops(
        patch_projection=2 * patches * config.patch_pixels * width,
        linear=config.depth * 2 * tokens * (4 * width**2 + 2 * width * config.mlp_width),
        attention=4 * tokens * keys * width,
        pyramid=patches * (scales + projected + (PLACES - 1 / 16) * per_place),
        proposals=patches * PLACES * (convolutions * per_place + 2 * 5 * ANCHORS * channels),
        regions=box + MASK_SHARE * shape.regions * mask,
    )


def detector_image_bytes(
    config: ModelConfig, shape: DetectorShape, precision: str, *, math: bool, checkpointing: str | int = "none",
    recompute: bool = False,
) -> float:  # fmt: skip
    """Count the most that an image of the size of ``config`` takes at a time in training, pixels and masks included.

    math: attention keeps its weights. tests/engine/accounting/test_detection.py checks the figure against a real pass.
    """
    size = VALUE_BYTES[precision]
    patches, channels, pixels = config.num_patches, shape.channels, config.image_height * config.image_width
    encoder = classifier_activations(config, checkpointing, precision, recompute=recompute).peak
    if math:
        encoder += size * _weights(config, shape, CheckpointPlan.make(checkpointing))
    # Maps before and after each layer; the norms' own values in float32.
    if shape.variant == "paper":
        maps = patches * (config.width * (1 + 3 * 4 + 16 + 4 + 1) + 2 * channels * (16 + 4 + 1 + 1 / 4))
    else:
        maps = patches * (config.width * (1 + 3 * 2 + 4 + 2 + 1) + channels * (16 + 4 + 1 + 1 / 4) * (2 + 2 * 4 / size))
    convolutions = 1 if shape.variant == "paper" else 2
    proposals = 4 * patches * PLACES * channels * (1 + 2 * convolutions)
    # A convolution keeps its input, and the float32 input of its norm and that norm's output; the ReLU works in place.
    box = 4 * shape.regions * (channels * BOX_PLACES * (1 + 4 * 3) + 3 * 4 * channels)
    mask = 4 * MASK_SHARE * shape.regions * channels * MASK_PLACES * (1 + 4 * 3 + 2 * 4)
    objects = 20 * pixels  # masks of some objects, a byte a pixel
    return encoder + size * maps + proposals + box + mask + objects + pixels * config.channels * (1 + 4 + size)


def _weights(config: ModelConfig, shape: DetectorShape, plan: CheckpointPlan) -> float:
    """Count the values of attention's weights kept at a time: in all blocks, or in the largest recomputed group."""
    tokens = config.num_patches if shape.window else 1 + config.num_patches
    of_global = config.heads * tokens**2
    if not shape.window:
        blocks = config.depth if plan.group == 0 else plan.group or config.depth
        return blocks * of_global
    of_windowed = config.heads * tokens * shape.window**2
    if plan.group == 0:
        return shape.global_blocks * of_global + (config.depth - shape.global_blocks) * of_windowed
    return of_global
