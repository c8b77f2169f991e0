"""Every model of transfer has a pre-trained encoder inside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import nn

from mirl.engine.models.config import ModelConfig
from mirl.engine.models.masking import PatchMask


class EncoderModel(Protocol):
    """This is a model built around an encoder; a classifier is one."""

    @property
    def config(self) -> ModelConfig:
        """Return the configuration of the encoder as it is fine-tuned."""
        ...

    @property
    def position_grid(self) -> tuple[int, int]:
        """Return the patches (rows, columns) for which the positions were made, before they were resampled."""
        ...

    @property
    def encoder(self) -> Any:
        """Return the encoder: ``blocks`` and the modules before and after them."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield names and parameters, as any `torch.nn.Module` does."""
        ...


def encoder_config(config: ModelConfig, drop_path: float = 0.0, attention: str = "auto") -> ModelConfig:
    """Return ``config`` for a plain Vision Transformer of all its blocks, without norms that only decoders read.

    The attention backend of pre-training is not taken over: it may not run here.
    """
    return dataclasses.replace(
        config, segments=1, did=False, objective="mae", truncated_depth=None, feature_loss=0.0, vgg_loss=0.0,
        drop_path=drop_path, attention=attention,
    )  # fmt: skip


def all_visible(batch: int, num_patches: int, device: torch.device) -> PatchMask:
    """Make the mask that hides nothing."""
    ids_BN = torch.arange(num_patches, device=device).expand(batch, num_patches)
    return PatchMask(ids_keep=ids_BN, ids_masked=ids_BN[:, :0], ids_restore=ids_BN)
