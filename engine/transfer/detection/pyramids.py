"""Both pyramids have five maps, usually of 256 channels, at strides P/4, P/2, P, 2P, 4P for patches of side P.

Names of the maps are torchvision's: "0", "1", "2", "3" and "pool".
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from mirl.engine.models.layers import NORM_EPS
from mirl.engine.transfer.dense.feature_maps import Pyramid
from mirl.engine.transfer.dense.norms import norm_of

NAMES = ("0", "1", "2", "3", "pool")


class ChannelNorm(nn.LayerNorm):
    """Normalise the channels of each place of a map [B, D, h, w] by LayerNorm, computed in float32 (ViTDet's LN)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=NORM_EPS)

    def forward(self, x_BDhw: Tensor) -> Tensor:
        x_BhwD = x_BDhw.permute(0, 2, 3, 1).float()
        y_BhwD = F.layer_norm(x_BhwD, self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)
        return y_BhwD.permute(0, 3, 1, 2).to(x_BDhw.dtype)


class PaperPyramid(nn.Module):
    """Scale four maps of the encoder by BEiT's up- and down-sampling, then run a feature pyramid network.

    Its norm is of groups of channels, as in the benchmark of plain ViTs whose protocol MAE has. This norm needs no
    other image, and no running averages.
    """

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.scales = Pyramid(width, norm_of("group"))
        self.fpn = FeaturePyramidNetwork([width] * 4, channels, extra_blocks=LastLevelMaxPool())

    def forward(self, maps: Sequence[Tensor]) -> dict[str, Tensor]:
        """Map four maps [B, D, h, w] to five maps [B, channels, ...] by name."""
        return dict(self.fpn(dict(zip(NAMES, self.scales(maps), strict=False))))


class SimplePyramid(nn.Module):
    """Scale and project the last map of the encoder alone (ViTDet's simple feature pyramid, LayerNorm)."""

    def __init__(self, width: int, channels: int) -> None:
        """Build the stages. width: of the encoder, a multiple of 4. channels: of the maps."""
        super().__init__()

        def double(ins: int, outs: int) -> nn.ConvTranspose2d:
            return nn.ConvTranspose2d(ins, outs, kernel_size=2, stride=2)

        half, quarter = width // 2, width // 4
        scales = (
            ([double(width, half), ChannelNorm(half), nn.GELU(), double(half, quarter)], quarter),
            ([double(width, half)], half),
            ([], width),
            ([nn.MaxPool2d(kernel_size=2, stride=2)], width),
        )
        self.stages = nn.ModuleList(
            nn.Sequential(
                *layers, nn.Conv2d(scaled, channels, 1, bias=False), ChannelNorm(channels),
                nn.Conv2d(channels, channels, 3, padding=1, bias=False), ChannelNorm(channels),
            )
            for layers, scaled in scales
        )  # fmt: skip

    def forward(self, maps: Sequence[Tensor]) -> dict[str, Tensor]:
        """Map one map [B, D, h, w] to five maps [B, channels, ...] by name."""
        (last,) = maps
        made = [stage(last) for stage in self.stages]
        return dict(zip(NAMES, [*made, F.max_pool2d(made[-1], kernel_size=1, stride=2)], strict=True))
