"""Mask R-CNN on a plain Vision Transformer maps images to losses, or to boxes, classes, scores and masks.

Shapes: B images, H W padded size, C channels, P patch side, D width, n objects of an image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mirl.engine.models.config import ModelConfig
from mirl.engine.models.layers import add_branch
from mirl.engine.models.pixels import normalise_images
from mirl.engine.transfer.dense.feature_maps import DenseModel, taken_blocks
from mirl.engine.transfer.detection.heads import (
    BOX_LOSSES,
    PROPOSALS,
    TERMS,
    build_proposals,
    build_region_heads,
    image_list,
    in_float32,
)
from mirl.engine.transfer.detection.pyramids import PaperPyramid, SimplePyramid
from mirl.engine.transfer.detection.windows import global_blocks, join_windows, split_windows
from mirl.errors import UserError

VARIANTS = ("paper", "vitdet")
Target = dict[str, Tensor]
"""An image has "boxes" float32 [n, 4] as x1 y1 x2 y2 in pixels, "labels" int64 [n] from 1, "masks" uint8 [n, H, W]."""


class Detector(DenseModel):
    """The detector is a Mask R-CNN, initialised from torch's global random numbers.

    | variant | maps of blocks             | pyramid                        | proposals     |
    |---------|----------------------------|--------------------------------|---------------|
    | paper   | depth x 1/3, 1/2, 2/3, 1   | BEiT's scales, then FPN        | 1 convolution |
    | vitdet  | the last                   | simple, LayerNorm              | 2             |

    With a window, blocks attend inside windows of so many patches a side. The global blocks do not: those of the maps
    (paper), or the last of each quarter (vitdet). A windowed model has no class token, and its images are padded to
    whole windows.

    State dict: ``encoder.*`` as of any `DenseModel`, ``pyramid.*``, ``rpn.*``, ``roi_heads.*`` (torchvision's names).
    Encoder and pyramid compute in the dtype of the weights, the heads in float32.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        classes: int,
        variant: str = "paper",
        window: int = 0,
        drop_path: float = 0.0,
        position_grid: tuple[int, int] | None = None,
        box_loss: str = "l1",
        regions: int = 512,
        channels: int = 256,
        proposals: int = PROPOSALS,
    ) -> None:
        """Build the model.

        classes: besides the background. window: side in patches, 0 for none. regions: sampled from each image in
        training. channels: of pyramid and heads. proposals: regions of an image that the box head sees.

        Raises:
            UserError: an unknown variant or loss, or sizes that do not go together.
        """
        if variant not in VARIANTS:
            raise UserError(f"variant is {variant!r}: choose one of {', '.join(VARIANTS)}")
        if box_loss not in BOX_LOSSES:
            raise UserError(f"box_loss is {box_loss!r}: choose one of {', '.join(BOX_LOSSES)}")
        taken = taken_blocks(config.depth) if variant == "paper" else (config.depth - 1,)
        super().__init__(config, drop_path=drop_path, position_grid=position_grid, taken=taken)
        self.variant, self.window = variant, window
        self.global_blocks = frozenset(taken if variant == "paper" else global_blocks(config.depth))
        self.pyramid = (PaperPyramid if variant == "paper" else SimplePyramid)(config.width, channels)
        self.rpn = build_proposals(config.patch_size, channels, 1 if variant == "paper" else 2, proposals)
        self.roi_heads = build_region_heads(config.patch_size, channels, classes, box_loss=box_loss, regions=regions)
        in_float32(self.rpn)
        in_float32(self.roi_heads)

    @property
    def multiple(self) -> int:
        """Return the divisor of padded sides: two patches, which the smallest map halves, and a window."""
        return padding_multiple(self.config.patch_size, self.window)

    def forward(
        self, images: Tensor, sizes: Sequence[tuple[int, int]], targets: list[Target] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Return losses by the names of `TERMS` in training, and detections of each image in evaluation.

        Detections are "boxes" float32 [n, 4], "labels" [n], "scores" [n] and "masks", probabilities in the boxes,
        float32 [n, 1, 28, 28]. images: uint8 [B, H, W, C], padded at the bottom and on the right. sizes: height and
        width of each without the padding.
        """
        sizes = [(int(height), int(width)) for height, width in sizes]
        images_BCHW = blank_padding(normalise_images(images, self.config.mean, self.config.std, torch.float32), sizes)
        maps = {name: found.float() for name, found in self.pyramid(self.feature_maps(images_BCHW)).items()}
        with torch.autocast(images.device.type, enabled=False):
            proposals, of_proposals = self.rpn(image_list(images_BCHW, sizes), maps, targets)
            found, of_regions = self.roi_heads(maps, proposals, sizes, targets)
        if not self.training:
            return found
        losses = (of_proposals["loss_objectness"], of_proposals["loss_rpn_box_reg"], *of_regions.values())
        return dict(zip(TERMS, losses, strict=True))

    def feature_maps(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the maps of any `DenseModel`; with windows the class token is left out."""
        dtype = self.weight_dtype
        images = images if images.dtype == torch.uint8 else images.to(dtype)
        if not self.window:
            return super().feature_maps(images)
        self.choose(images)
        grid = self._grid_of(images)
        if any(side % self.window for side in grid):
            raise UserError(
                f"images have {grid[0]}x{grid[1]} patches and window is {self.window}: pad them to whole windows"
            )
        x_BND = self.embed(images, grid)[:, 1:].contiguous()
        maps, start = [], 0
        for stop in sorted(self.global_blocks | {block for block in self.taken}):
            x_BND = self._run_windowed(start, stop, x_BND, grid)
            x_BND = self._run(stop, stop + 1, x_BND) if stop in self.global_blocks else self._run_windowed(
                stop, stop + 1, x_BND, grid
            )  # fmt: skip
            if stop in self.taken:
                maps.append(x_BND.transpose(1, 2).unflatten(2, grid))
            start = stop + 1
        return tuple(maps)

    def _run_windowed(self, start: int, stop: int, x_BND: Tensor, grid: tuple[int, int]) -> Tensor:
        if start == stop:
            return x_BND
        windows = grid[0] // self.window * (grid[1] // self.window)
        for block in self.encoder.blocks[start:stop]:
            block.parts = windows  # an image is dropped or kept as a whole
        return join_windows(self._run(start, stop, split_windows(x_BND, grid, self.window)), grid, self.window)

    def _run(self, start: int, stop: int, x_BND: Tensor) -> Tensor:
        return add_branch(*self._advance(start, stop, (x_BND, None, None)))


def padding_multiple(patch_size: int, window: int) -> int:
    """Return the divisor of the sides of padded images: whole windows, or two patches, which the last map halves."""
    return patch_size * (window if window > 1 and window % 2 == 0 else 2 * max(1, window))


def blank_padding(images_BCHW: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
    """Set ``images_BCHW`` to 0, the mean, outside of each image; in place."""
    for image_CHW, (height, width) in zip(images_BCHW, sizes, strict=True):
        image_CHW[:, height:] = 0
        image_CHW[:, :, width:] = 0
    return images_BCHW
