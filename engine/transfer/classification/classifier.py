"""A classifier is a pre-trained encoder with a head: a plain Vision Transformer under timm's parameter names.

Shapes: B batch, H W image, C channels, N patches, D width, L depth.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor, nn

from mirl.engine.models.compute_choices import ComputeChoices
from mirl.engine.models.config import ModelConfig
from mirl.engine.models.encoder import Encoder
from mirl.engine.models.initialise import initialise
from mirl.engine.models.layers import add_branch, layer_norm
from mirl.engine.models.positions import resample_positions, sincos_positions
from mirl.engine.transfer.encoder_model import all_visible, encoder_config
from mirl.errors import UserError

__all__ = ["Classifier", "all_visible", "encoder_config", "fixed_positions", "pool_tokens"]

POOLS = ("avg", "token")
HEAD_STD = 2e-5


class Classifier(ComputeChoices):
    """Map images to logits, with all patches visible; initialised from torch's global random numbers.

    | pool  | path                                                                       |
    |-------|----------------------------------------------------------------------------|
    | avg   | mean of the patch tokens -> ``fc_norm`` -> ``head``; no ``encoder.norm``   |
    | token | ``encoder.norm`` -> class token -> ``head``; no ``fc_norm``                |

    State dict: ``encoder.*``, ``fc_norm.*``, ``head.*``: timm's names behind the first prefix. It has no fixed
    positions; trained ones are ``encoder.pos_embed`` [1 + N, D].
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_classes: int,
        pool: str = "avg",
        drop_path: float = 0.0,
        position_grid: tuple[int, int] | None = None,
        train_positions: bool = False,
    ) -> None:
        """Build the model of ``config``, whose fields on decoders and objective are not used.

        position_grid: the grid of pre-training, from which positions are resampled to the grid of ``config``; None: the
        same. train_positions: positions are a parameter instead of a fixed buffer.
        """
        super().__init__(encoder_config(config, drop_path, config.attention))
        if num_classes < 1:
            raise UserError(f"num_classes is {num_classes}: give 1 or more")
        if pool not in POOLS:
            raise UserError(f"pool is {pool!r}: choose one of {', '.join(POOLS)}")
        self.pool = pool
        self.encoder = Encoder(self.config)
        self.fc_norm = nn.Identity()
        if pool == "avg":
            self.encoder.norm, self.fc_norm = nn.Identity(), layer_norm(config.width)
        self.head = nn.Linear(config.width, num_classes)
        initialise(self)
        # The cut is at two deviations: torch's bounds of +-2 would let a weight of 2 through, once in millions of
        # draws.
        nn.init.trunc_normal_(self.head.weight, std=HEAD_STD, a=-2 * HEAD_STD, b=2 * HEAD_STD)
        self.position_grid = position_grid or self.config.grid
        positions = fixed_positions(self.config, self.position_grid)
        if train_positions:
            del self.encoder.pos_embed
            self.encoder.pos_embed = nn.Parameter(positions)
        else:
            self.encoder.pos_embed.copy_(positions)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, classes] of uint8 images [B, H, W, C] or normalised float ones [B, C, H, W]."""
        return self.head(self.features(images))

    def trial_loss(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return the distance of the features to random ones, plus the squares of the logits.

        The head begins near zero, so the logits alone would let hardly any gradient through. A square is never near
        zero, so its relative error says something.
        """
        features_BD = self.features(images)
        random_BD = torch.randn(features_BD.shape, generator=generator).to(features_BD)
        return (features_BD - random_BD).float().square().mean() + self.head(features_BD).float().square().mean()

    def features(self, images: Tensor) -> Tensor:
        """Return the features that the head sees: [B, D]."""
        return self.fc_norm(pool_tokens(self.tokens(images), self.pool))

    def tokens(self, images: Tensor) -> Tensor:
        """Return class token and patches after the last block, [B, 1 + N, D]; under the pool "token" normalised."""
        self.choose(images)
        (latent_BSD,) = self.encoder(images, all_visible(len(images), self.config.num_patches, images.device))
        return latent_BSD

    @torch.no_grad()
    def block_features(self, images: Tensor) -> list[Tensor]:
        """Return the mean of the patch tokens after each of the L blocks, not normalised: L tensors [B, D]."""
        return [pool_tokens(x_BSD, "avg") for x_BSD in self._after_blocks(images)]

    @torch.no_grad()
    def features_after(self, images: Tensor, block: int, pool: str) -> Tensor:
        """Pool the tokens after ``block``, counted from 0, not normalised: [B, D]. Later blocks are not computed."""
        (x_BSD,) = islice(self._after_blocks(images), block, block + 1)
        return pool_tokens(x_BSD, pool)

    def _after_blocks(self, images: Tensor) -> Iterator[Tensor]:
        """Yield the tokens [B, 1 + N, D] after each block."""
        self.choose(images, plain=True)
        mask = all_visible(len(images), self.config.num_patches, images.device)
        x_BSD, delta_BSD, bias_D = self.encoder.embed(images, mask.ids_keep), None, None
        for block in self.encoder.blocks:
            x_BSD, delta_BSD, bias_D = block.branches(x_BSD, delta_BSD, bias_D)
            yield add_branch(x_BSD, delta_BSD, bias_D)


def fixed_positions(config: ModelConfig, source_grid: tuple[int, int]) -> Tensor:
    """Return the sin-cos positions of ``source_grid``, resampled to the grid of ``config``: [1 + N, D]."""
    return resample_positions(sincos_positions(source_grid, config.width), source_grid, config.grid)


def pool_tokens(tokens_BSD: Tensor, pool: str) -> Tensor:
    """Pool [B, 1 + N, D] to [B, D]: the class token, or the mean of the others."""
    return tokens_BSD[:, 0] if pool == "token" else tokens_BSD[:, 1:].mean(dim=1)
