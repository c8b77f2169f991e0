"""UperNet on a plain Vision Transformer maps images to a class for every pixel.

Shapes: B batch, H W image, C channels, K classes, P patch side.
"""

from __future__ import annotations

from torch import Tensor

from mirl.engine.models.config import ModelConfig
from mirl.engine.transfer.dense.feature_maps import DenseModel, Pyramid
from mirl.engine.transfer.dense.norms import norm_of
from mirl.engine.transfer.segmentation.upernet import FCNHead, UPerHead, resized
from mirl.errors import UserError


class Segmenter(DenseModel):
    """The segmenter is initialised from torch's global random numbers.

    State dict: ``encoder.*`` under timm's names, ``pyramid.*`` under those of BEiT's backbone, ``decode_head.*`` and
    ``auxiliary_head.*`` under mmsegmentation's.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_classes: int,
        head_channels: int = 0,
        norm: str = "batch",
        drop_path: float = 0.0,
        position_grid: tuple[int, int] | None = None,
    ) -> None:
        """Build the model.

        config: of the encoder, with the size of the crops of training. head_channels: 0 for the encoder's width. norm:
        of pyramid and heads, "batch" (over all ranks) or "group". Others as in `DenseModel`.
        """
        super().__init__(config, drop_path=drop_path, position_grid=position_grid)
        if num_classes < 2:
            raise UserError(f"num_classes is {num_classes}: segmentation needs two classes or more")
        width, made = config.width, norm_of(norm)
        self.num_classes = num_classes
        self.pyramid = Pyramid(width, made)
        self.decode_head = UPerHead(width, head_channels or width, num_classes, made)
        self.auxiliary_head = FCNHead(width, num_classes, made)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return logits of both heads in training, [B, K, 4H/P, 4W/P] and [B, K, H/P, W/P].

        In evaluation return those of the decode head at the size of the images, float32 [B, K, H, W]. Images are as in
        `DenseModel.feature_maps`.
        """
        maps = self.pyramid(self.feature_maps(images))
        if self.training:
            return self.decode_head(maps), self.auxiliary_head(maps)
        rows, columns = self._grid_of(images)
        side = self.config.patch_size
        return resized(self.decode_head(maps).float(), (rows * side, columns * side))

    def kept_buffers(self) -> dict[str, Tensor]:
        """Return the running statistics of the norms, by name, which a checkpoint needs beside the parameters."""
        return {name: buffer for name, buffer in self.named_buffers() if name.rpartition(".")[2].startswith("running_")}
