"""What every model of transfer has in common: a pre-trained encoder inside it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import nn

from mirl.engine.models.config import ModelConfig


class EncoderModel(Protocol):
    """A model built around an encoder; a classifier is one.

    config: the encoder as it is fine-tuned. position_grid: patches (rows, columns) that its positions were made for,
    before they were resampled.
    """

    config: ModelConfig
    position_grid: tuple[int, int]
    encoder: nn.Module

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """As of any `torch.nn.Module`."""
        ...
