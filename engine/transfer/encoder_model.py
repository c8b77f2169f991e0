"""What every model of transfer has in common: a pre-trained encoder inside it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from torch import nn

from mirl.engine.models.config import ModelConfig


class EncoderModel(Protocol):
    """A model built around an encoder; a classifier is one."""

    @property
    def config(self) -> ModelConfig:
        """The encoder as it is fine-tuned."""
        ...

    @property
    def position_grid(self) -> tuple[int, int]:
        """Patches (rows, columns) that the positions were made for, before they were resampled."""
        ...

    @property
    def encoder(self) -> Any:
        """The encoder: ``blocks`` and what comes before and after them."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """As of any `torch.nn.Module`."""
        ...
