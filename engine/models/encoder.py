"""The encoder takes visible patches and returns the latent of every segment (Eq. 1, 5).

Shapes: B batch, N patches, K kept, P patch side, C channels, Q = P * P * C, D width, G segments.
"""

from __future__ import annotations

from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mirl.engine.models.checkpointing import CheckpointPlan
from mirl.engine.models.config import ModelConfig
from mirl.engine.models.layers import Block, StreamNorm, add_branch
from mirl.engine.models.masking import PatchMask
from mirl.engine.models.pixels import image_layout, normalise_images
from mirl.engine.models.positions import sincos_positions
from mirl.kernels import assemble_tokens, gather_patches, gather_tokens


class PatchProjection(nn.Conv2d):
    """A convolution with stride P can also be applied as the matrix product that it is."""

    def __init__(self, channels: int, width: int, patch_size: int) -> None:
        super().__init__(channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Project patches [B, K, Q] in (p, q, c) order to [B, K, D], or images [B, C, H, W] to [B, N, D]."""
        if x.ndim == 4:
            return self._conv_forward(x, self.weight, self.bias).flatten(2).transpose(1, 2)
        return F.linear(x, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)


class PatchEmbed(nn.Module):
    """Hold the projection under timm's key, ``patch_embed.proj``."""

    def __init__(self, config: ModelConfig, visible_only: bool) -> None:
        super().__init__()
        self.config = config
        self.visible_only = visible_only
        self.proj = PatchProjection(config.channels, config.width, config.patch_size)

    def forward(self, images: Tensor, ids_keep_BK: Tensor) -> Tensor:
        """Project the kept patches of uint8 [B, H, W, C] or normalised float [B, C, H, W] images: [B, K, D]."""
        config, dtype = self.config, self._compute_dtype(images.device)
        layout = image_layout(images)
        if not self.visible_only:
            x_BND = self.proj(normalise_images(images, config.mean, config.std, dtype))
            return gather_tokens(x_BND, ids_keep_BK)
        mean, std = (config.mean, config.std) if layout == "BHWC" else (None, None)
        patches_BKQ = gather_patches(
            images, ids_keep_BK, patch_size=config.patch_size, mean=mean, std=std, layout=layout, dtype=dtype
        )
        return self.proj(patches_BKQ)

    def _compute_dtype(self, device: torch.device) -> torch.dtype:
        """Return the dtype in which the projection will multiply, so that pixels are written in it at once."""
        if torch.is_autocast_enabled(device.type):
            return torch.get_autocast_dtype(device.type)
        return self.proj.weight.dtype


class Encoder(nn.Module):
    """The encoder has L blocks in G segments, with a LayerNorm of its own for the latent of each segment.

    ``segment_norms`` maps g to LN_g: "0" (only where DID reads z_0) to "G-1"; LN_G is ``norm``, as in any ViT.
    """

    pos_embed: Tensor

    def __init__(self, config: ModelConfig, visible_only_projection: bool = True) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config, visible_only_projection)
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.width))
        self.register_buffer("pos_embed", sincos_positions(config.grid, config.width), persistent=False)
        rates = torch.linspace(0, config.drop_path, config.built_depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, config.mlp_width, rate, config.drop_path == 0) for rate in rates
        )
        first = 0 if config.did else 1
        self.segment_norms = nn.ModuleDict({str(g): StreamNorm(config.width) for g in range(first, config.segments)})
        self.norm = StreamNorm(config.width)
        self.checkpointing = CheckpointPlan()

    def forward(self, images: Tensor, mask: PatchMask) -> tuple[Tensor, ...]:
        """Return LN_g(z_g), each [B, 1 + K, D], of every g that something reads: under DID 0, then 1..G."""
        config = self.config
        x_BSD = self.embed(images, mask.ids_keep)
        latents = [self.segment_norms["0"](x_BSD)] if config.did else []
        for g in range(1, config.segments + 1):
            norm = self.norm if g == config.segments else self.segment_norms[str(g)]
            branch = self._run_segment(g, x_BSD)
            if isinstance(norm, StreamNorm):
                x_BSD, latent_BSD = norm(*branch)
            else:  # a classifier has no norm here: it normalises later
                x_BSD = latent_BSD = add_branch(*branch)
            latents.append(latent_BSD)
        return tuple(latents)

    def embed(self, images: Tensor, ids_keep_BK: Tensor) -> Tensor:
        """Return z_0 [B, 1 + K, D]: class token and kept patches, with their positions."""
        # Under autocast the projection is bfloat16 and the residual stream stays in the dtype of the weights.
        x_BKD = self.patch_embed(images, ids_keep_BK).to(self.cls_token.dtype)
        # The class token's own position is zeros.
        return assemble_tokens(x_BKD, ids_keep_BK, self.pos_embed[1:].to(x_BKD.dtype), self.cls_token.flatten())

    def run_segment(self, g: int, x_BSD: Tensor) -> Tensor:
        """Map z_{g-1} to z_g."""
        return add_branch(*self._run_segment(g, x_BSD))

    def _run_segment(self, g: int, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Map z_{g-1} to z_g, returned as a sum that the norm after it adds up."""
        stop = g * self.config.segment_depth
        start, branch = stop - self.config.segment_depth, None
        for first, last in self.checkpointing.groups(start, stop):
            # One tensor goes from group to group, because each group keeps what it begins with.
            x_BSD = x_BSD if branch is None else add_branch(*branch)
            branch = self.checkpointing.call(partial(self.run_blocks, first, last), x_BSD)
        return branch

    def run_blocks(
        self, first: int, last: int, x_BSD: Tensor, delta_BSD: Tensor | None = None, bias_D: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Run blocks ``first`` to ``last`` - 1 on x + (delta + bias), and return the parts of such a sum."""
        for block in islice(self.blocks, first, last):  # a slice of a ModuleList is another module, made each time
            x_BSD, delta_BSD, bias_D = block.branches(x_BSD, delta_BSD, bias_D)
        return x_BSD, delta_BSD, bias_D
