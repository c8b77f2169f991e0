"""The plain eager reference: section by section what the paper says, nothing skipped, nothing fused.

All patches are embedded, then the kept ones gathered; every decoder works on all 1 + N positions; keys and values are
concatenated; the whole image is patchified and the loss computed on all patches, then masked. Attention is written out
as matmul, softmax, matmul, or is torch's scaled_dot_product_attention. It is the oracle of the tests and the baseline
of the benchmarks and is never made faster. It shares no code with the engine; parameter names are the same, so that
``reference.load_state_dict(engine_model.state_dict())`` works.

Letters: B batch, N patches, K kept, S tokens, D encoder width, E decoder width, G segments, Q = P * P * C pixels of a
patch in (p, q, c) order.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ReferenceOutput(NamedTuple):
    """loss: scalar; terms: [terms], unweighted; predictions: G tensors [B, N, Q]; mask_BN: True = masked."""

    loss: Tensor
    terms: Tensor
    predictions: tuple[Tensor, ...]
    mask_BN: Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, use_sdpa: bool) -> Tensor:
    """[B, H, S, d], [B, H, T, d], [B, H, T, d] -> [B, S, H * d]."""
    if use_sdpa:
        out = F.scaled_dot_product_attention(q, k, v)
    else:
        weights = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), dim=-1)
        out = weights @ v
    return out.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, use_sdpa: bool) -> None:
        super().__init__()
        self.heads, self.use_sdpa = heads, use_sdpa
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(attend(q, k, v, self.use_sdpa))


class CrossAttention(nn.Module):
    def __init__(self, width: int, heads: int, use_sdpa: bool) -> None:
        super().__init__()
        self.heads, self.use_sdpa = heads, use_sdpa
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(source).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(attend(q, k, v, self.use_sdpa))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """x += SelfAttn(LN x); with ``did`` x += MHA(LN x, LN kv); x += MLP(LN x)."""

    def __init__(self, width: int, heads: int, hidden: int, use_sdpa: bool, did: bool = False) -> None:
        super().__init__()
        self.did = did
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = SelfAttention(width, heads, use_sdpa)
        if did:
            self.norm_q = nn.LayerNorm(width, eps=1e-6)
            self.norm_kv = nn.LayerNorm(width, eps=1e-6)
            self.cross_attn = CrossAttention(width, heads, use_sdpa)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, hidden)

    def forward(self, x: Tensor, kv: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x))
        if self.did:
            x = x + self.cross_attn(self.norm_q(x), self.norm_kv(kv))
        return x + self.mlp(self.norm2(x))


class WeightNormLinear(nn.Module):
    """A Linear whose matrix [out, in] has columns of length weight_g, one per INPUT feature, fixed."""

    def __init__(self, width: int, pixels: int) -> None:
        super().__init__()
        self.weight_v = nn.Parameter(torch.randn(pixels, width) * 0.02)
        self.bias = nn.Parameter(torch.zeros(pixels))
        self.register_buffer("weight_g", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_g * self.weight_v / self.weight_v.norm(dim=0, keepdim=True), self.bias)


class Encoder(nn.Module):
    """The parameters of Eq. 1 and 5; `ReferenceMIRL.forward_encoder` uses them."""

    def __init__(self, config: Any, use_sdpa: bool) -> None:
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(config.channels, config.width, config.patch_size, config.patch_size)
        self.cls_token = nn.Parameter(torch.randn(1, 1, config.width) * 0.02)
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, int(config.width * config.mlp_ratio), use_sdpa)
            for _ in range(config.depth)
        )
        first = 0 if config.did else 1
        self.segment_norms = nn.ModuleDict(
            {str(g): nn.LayerNorm(config.width, eps=1e-6) for g in range(first, config.segments)}
        )
        self.norm = nn.LayerNorm(config.width, eps=1e-6)


class Decoder(nn.Module):
    """The parameters of one decoder."""

    def __init__(self, config: Any, use_sdpa: bool) -> None:
        super().__init__()
        width, pixels = config.decoder_width, config.patch_size**2 * config.channels
        hidden = int(width * config.mlp_ratio)
        if config.variant == "release":
            self.mask_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.blocks = nn.ModuleList(
            Block(
                width,
                config.decoder_heads,
                hidden,
                use_sdpa,
                did=config.did and (i == 0 or config.variant == "release"),
            )
            for i in range(config.decoder_depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, pixels) if config.variant == "paper" else WeightNormLinear(width, pixels)


class ReferenceMIRL(nn.Module):
    """``config`` is anything with the fields of the engine's ModelConfig; ``attention`` is "math" or "sdpa"."""

    def __init__(self, config: Any, attention: str = "math") -> None:
        super().__init__()
        if attention not in ("math", "sdpa"):
            raise ValueError(f"attention is {attention!r}: choose math or sdpa")
        self.config = config
        self.grid = (config.image_height // config.patch_size, config.image_width // config.patch_size)
        use_sdpa = attention == "sdpa"
        self.encoder = Encoder(config, use_sdpa)
        first = 0 if config.did else 1
        self.embeds = nn.ModuleDict(
            {str(g): nn.Linear(config.width, config.decoder_width) for g in range(first, config.segments + 1)}
        )
        if config.variant == "paper":
            self.mask_token = nn.Parameter(torch.randn(1, 1, config.decoder_width) * 0.02)
        self.decoders = nn.ModuleDict({str(g): Decoder(config, use_sdpa) for g in range(1, config.segments + 1)})
        for name, width in (("pos_embed", config.width), ("decoder_pos_embed", config.decoder_width)):
            self.register_buffer(name, sincos(self.grid, width), persistent=False)

    def forward(self, images: Tensor, noise_BN: Tensor) -> ReferenceOutput:
        """images: uint8 [B, H, W, C] or normalised float [B, C, H, W]; the patches of smallest noise are kept."""
        images = self.normalise(images)
        ids_shuffle = noise_BN.argsort(dim=1)
        ids_restore = ids_shuffle.argsort(dim=1)
        num_kept = int(noise_BN.shape[1] * (1 - self.config.mask_ratio))
        mask_BN = ids_restore >= num_kept
        latents = self.forward_encoder(images, ids_shuffle[:, :num_kept])
        embedded = {g: self.embeds[str(g)](latent) for g, latent in latents.items()}
        predictions = tuple(self.forward_decoder(g, embedded, ids_restore) for g in range(1, self.config.segments + 1))
        loss, terms = self.forward_loss(images, predictions, mask_BN)
        return ReferenceOutput(loss, terms, predictions, mask_BN)

    def normalise(self, images: Tensor) -> Tensor:
        """[B, C, H, W] in the dtype of the parameters."""
        dtype = self.pos_embed.dtype
        if images.dtype != torch.uint8:
            return images.to(dtype)
        mean = torch.tensor(self.config.mean, dtype=dtype, device=images.device)
        std = torch.tensor(self.config.std, dtype=dtype, device=images.device)
        return ((images.to(dtype) / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()

    def forward_encoder(self, images: Tensor, ids_keep: Tensor) -> dict[int, Tensor]:
        """LN_g(z_g), each [B, 1 + K, D]."""
        config, encoder = self.config, self.encoder
        x = encoder.patch_embed.proj(images).flatten(2).transpose(1, 2) + self.pos_embed[1:]
        x = x.gather(1, ids_keep[:, :, None].expand(-1, -1, x.shape[2]))
        x = torch.cat([(encoder.cls_token + self.pos_embed[:1]).expand(len(x), -1, -1), x], dim=1)
        latents = {0: encoder.segment_norms["0"](x)} if config.did else {}
        for index, block in enumerate(encoder.blocks, start=1):
            x = block(x)
            g, inside = divmod(index, config.depth // config.segments)
            if inside == 0:
                latents[g] = encoder.norm(x) if g == config.segments else encoder.segment_norms[str(g)](x)
        return latents

    def forward_decoder(self, g: int, embedded: dict[int, Tensor], ids_restore: Tensor) -> Tensor:
        """[B, N, Q] from e_g and, under DID, from kv_g = [e_{g-1}, ..., e_0]."""
        decoder, e = self.decoders[str(g)], embedded[g]
        mask_token = self.mask_token if self.config.variant == "paper" else decoder.mask_token
        missing = ids_restore.shape[1] + 1 - e.shape[1]
        patches = torch.cat([e[:, 1:], mask_token.expand(len(e), missing, -1)], dim=1)
        patches = patches.gather(1, ids_restore[:, :, None].expand(-1, -1, patches.shape[2]))
        x = torch.cat([e[:, :1], patches], dim=1) + self.decoder_pos_embed
        for block in decoder.blocks:
            kv = torch.cat([embedded[j] for j in range(g - 1, -1, -1)], dim=1) if block.did else None
            x = block(x, kv)
        return decoder.head(decoder.norm(x))[:, 1:]

    def forward_loss(self, images: Tensor, predictions: tuple[Tensor, ...], mask_BN: Tensor) -> tuple[Tensor, Tensor]:
        """Eq. 6 and 7; with one decoder or ``multi_decoder`` every decoder stands alone."""
        config, count = self.config, len(predictions)
        size, (rows, columns) = config.patch_size, self.grid
        target = images.reshape(len(images), config.channels, rows, size, columns, size)
        target = target.permute(0, 2, 4, 3, 5, 1).reshape(len(images), rows * columns, -1)
        if config.norm_pix:
            mean, variance = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
            target = (target - mean) / (variance + 1e-6).sqrt()
        if count == 1 or config.objective == "multi_decoder":
            sums = list(predictions)
        else:
            sums = [predictions[g] + predictions[count - 1 - g] for g in range(count // 2)]
        terms = []
        for total in sums:
            error = (target - total).square().mean(-1)
            terms.append((error * mask_BN).sum() / mask_BN.sum())
        return sum(terms) / len(terms), torch.stack(terms).detach()


def sincos(grid: tuple[int, int], width: int) -> Tensor:
    """MAE's fixed positions [1 + N, width]: zeros for the class token; first half the column, second half the row."""

    def encode(position: np.ndarray) -> np.ndarray:
        angle = np.outer(position, 1 / 10000 ** (np.arange(width // 4) / (width / 4)))
        return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)

    row, column = np.mgrid[: grid[0], : grid[1]]
    table = np.concatenate([encode(column.reshape(-1)), encode(row.reshape(-1))], axis=1)
    return torch.from_numpy(np.concatenate([np.zeros((1, width)), table])).float()
