"""The teacher of the feature loss (Table 2a) is a slow copy of the encoder that sees every patch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mirl.engine.models.compute_choices import ComputeChoices
from mirl.engine.models.config import ModelConfig
from mirl.engine.models.encoder import Encoder


class EmaTeacher(ComputeChoices):
    """The teacher is an exponential moving average, in float32, of a model's encoder without its segment norms.

    decay: share of the old average that an update keeps. The average is taken of the weights with which the model
    computes.
    """

    def __init__(self, model: nn.Module, config: ModelConfig, decay: float) -> None:
        plain = dataclasses.replace(
            config, segments=1, did=False, objective="mae", decoder_depth=1, drop_path=0.0, depth=config.built_depth,
            truncated_depth=None, feature_loss=0.0, vgg_loss=0.0,
        )  # fmt: skip
        super().__init__(plain)
        self.decay = decay
        device = next(model.parameters()).device
        with torch.device(device):
            self.encoder = Encoder(plain)
        self.requires_grad_(False)
        self.eval()
        self.copy_from(model)

    def _pairs(self, model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
        theirs = dict(model.named_parameters())
        for name, average in self.named_parameters():
            yield name, average, theirs[name]

    @torch.no_grad()
    def copy_from(self, model: nn.Module) -> None:
        """Start from the model's weights."""
        for _, average, weight in self._pairs(model):
            average.copy_(weight)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Set average = decay * average + (1 - decay) * weight."""
        averages, weights = [], []
        for _, average, weight in self._pairs(model):
            averages.append(average)
            weights.append(weight.float())
        torch._foreach_lerp_(averages, weights, 1 - self.decay)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return targets [B, N, D], float32: the patches' latents, normalised over D without scale and shift.

        images: as `MIRL` takes them, unmasked. The learned scale and shift are left out, so that the teacher cannot
        make its targets easy by shrinking them.
        """
        self.choose(images)
        encoder = self.encoder
        ids_BN = torch.arange(encoder.config.num_patches, device=images.device).expand(len(images), -1).contiguous()
        x_BSD = encoder.run_segment(1, encoder.embed(images, ids_BN))
        return F.layer_norm(x_BSD[:, 1:].float(), x_BSD.shape[-1:])
