"""Prediction heads turn decoder tokens [B, R, E] into pixels [B, R, Q]."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class WeightNormHead(nn.Module):
    """The release's head is a linear map whose matrix has, for each INPUT feature, a column of fixed length.

    W[:, e] = weight_g[e] * weight_v[:, e] / |weight_v[:, e]|. The magnitude ``weight_g`` stays 1: it is a buffer,
    because a frozen Parameter breaks ZeRO-3 with activation checkpointing. The norm is taken in float32 or better.
    """

    weight_g: Tensor

    def __init__(self, width: int, pixels: int) -> None:
        super().__init__()
        self.weight_v = nn.Parameter(torch.empty(pixels, width))
        self.bias = nn.Parameter(torch.empty(pixels))
        self.register_buffer("weight_g", torch.ones(width))

    def weight(self) -> Tensor:
        """Return the matrix in use, [Q, E]."""
        precise = torch.promote_types(self.weight_v.dtype, torch.float32)
        direction_QE = self.weight_v.to(precise)
        scale_E = self.weight_g.to(precise) / torch.linalg.vector_norm(direction_QE, dim=0)
        return (direction_QE * scale_E).to(self.weight_v.dtype)

    def forward(self, x_BRE: Tensor) -> Tensor:
        return F.linear(x_BRE, self.weight(), self.bias)


def prediction_head(variant: str, width: int, pixels: int) -> nn.Module:
    """Make a plain Linear (paper) or a `WeightNormHead` (release)."""
    return nn.Linear(width, pixels) if variant == "paper" else WeightNormHead(width, pixels)
