"""UperNet's heads (Xiao et al. 2018) are built as in mmsegmentation, under its parameter names.

Maps come from `mirl.engine.transfer.dense.feature_maps.Pyramid`. Shapes: B batch, D width of the maps, E channels of a
head, K classes, h w places of a map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mirl.engine.transfer.dense.norms import BatchNorm

POOLS = (1, 2, 3, 6)
DROPOUT = 0.1
AUXILIARY_CHANNELS = 256
AUXILIARY_MAP = 2
AUXILIARY_WEIGHT = 0.4
CLASSIFIER_STD = 0.01

Norm = Callable[[int], nn.Module]


class ConvNormReLU(nn.Module):
    """Apply a convolution without bias that keeps the size, a norm and ReLU.

    The norm is called ``bn``, or ``gn`` for groups, as in mmcv. The initial values are mmcv's, too.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, norm: Norm) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        made = norm(outputs)
        self._norm = "bn" if isinstance(made, BatchNorm) else "gn"
        self.add_module(self._norm, made)

    def forward(self, x_BDhw: Tensor) -> Tensor:
        return F.relu(self.get_submodule(self._norm)(self.conv(x_BDhw)))


class UPerHead(nn.Module):
    """Pool a pyramid on the last map, build a feature pyramid over all four, and classify at the size of the first."""

    def __init__(self, width: int, channels: int, classes: int, norm: Norm) -> None:
        super().__init__()
        # Each Sequential has its parameters at "1", as in mmsegmentation.
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(side), ConvNormReLU(width, channels, 1, norm)) for side in POOLS
        )
        self.bottleneck = ConvNormReLU(width + len(POOLS) * channels, channels, 3, norm)
        self.lateral_convs = nn.ModuleList(ConvNormReLU(width, channels, 1, norm) for _ in range(3))
        self.fpn_convs = nn.ModuleList(ConvNormReLU(channels, channels, 3, norm) for _ in range(3))
        self.fpn_bottleneck = ConvNormReLU(4 * channels, channels, 3, norm)
        self.dropout = nn.Dropout2d(DROPOUT)
        self.conv_seg = _classifier(channels, classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Map four maps [B, D, h, w], the largest first, to logits [B, K, h, w] at the size of the largest."""
        laterals = [conv(map_BDhw) for conv, map_BDhw in zip(self.lateral_convs, maps[:3], strict=True)]
        laterals.append(self._pooled(maps[3]))
        for level in range(3, 0, -1):
            laterals[level - 1] = laterals[level - 1] + resized(laterals[level], laterals[level - 1].shape[2:])
        outs = [conv(lateral) for conv, lateral in zip(self.fpn_convs, laterals[:3], strict=True)]
        outs.append(laterals[3])
        outs = [resized(out, outs[0].shape[2:]) for out in outs]
        return self.conv_seg(self.dropout(self.fpn_bottleneck(torch.cat(outs, dim=1))))

    def _pooled(self, map_BDhw: Tensor) -> Tensor:
        pooled = [resized(pool(map_BDhw), map_BDhw.shape[2:]) for pool in self.psp_modules]
        return self.bottleneck(torch.cat([map_BDhw, *pooled], dim=1))


class FCNHead(nn.Module):
    """Apply one convolution and a classifier to one map, for the auxiliary loss of training."""

    def __init__(self, width: int, classes: int, norm: Norm, channels: int = AUXILIARY_CHANNELS) -> None:
        super().__init__()
        self.convs = nn.ModuleList([ConvNormReLU(width, channels, 3, norm)])
        self.dropout = nn.Dropout2d(DROPOUT)
        self.conv_seg = _classifier(channels, classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Map four maps to logits [B, K, h, w] at the size of map 2, counted from 0."""
        x_BEhw = maps[AUXILIARY_MAP]
        for conv in self.convs:
            x_BEhw = conv(x_BEhw)
        return self.conv_seg(self.dropout(x_BEhw))


def resized(map_BDhw: Tensor, size: Sequence[int]) -> Tensor:
    """Resize bilinearly, with the corners of pixels aligned and not their centres (``align_corners`` False)."""
    if tuple(map_BDhw.shape[2:]) == tuple(size):
        return map_BDhw
    return F.interpolate(map_BDhw, size=tuple(size), mode="bilinear", align_corners=False)


def _classifier(channels: int, classes: int) -> nn.Conv2d:
    made = nn.Conv2d(channels, classes, 1)
    nn.init.normal_(made.weight, std=CLASSIFIER_STD)
    assert made.bias is not None
    nn.init.zeros_(made.bias)
    return made
