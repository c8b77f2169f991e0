"""The pieces of a transformer block, under timm's key names, with the parts of them that the exact skips need.

Letters: B batch, S positions of x, R positions that ask (queries), T positions that answer, D width,
H heads, d = D / H.

LayerNorm (eps 1e-6), softmax and attention take their statistics in float32 (float64 for float64), whatever the dtype.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels import AttentionBackend, attention

NORM_EPS = 1e-6


def layer_norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=NORM_EPS)


class QKVLinear(nn.Linear):
    """Queries, keys and values in one matrix [3D, D], of which a caller can ask for the queries or the rest alone."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 3 * width)

    def forward(self, x_BSD: Tensor, part: Literal["qkv", "q", "kv"] = "qkv") -> Tensor:
        """[B, S, D] -> [B, S, 3D], [B, S, D] or [B, S, 2D]."""
        if part == "qkv":
            return F.linear(x_BSD, self.weight, self.bias)
        # split, not a slice: its backward writes the gradient of the whole matrix once
        sizes = (self.in_features, 2 * self.in_features)
        which = 0 if part == "q" else 1
        return F.linear(x_BSD, self.weight.split(sizes)[which], self.bias.split(sizes)[which])


class HeadedAttention(nn.Module):
    """What self- and cross-attention share: heads, the resolved backend, and the output projection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = width // heads
        self.backend: AttentionBackend | str = "auto"  # MIRL.resolve_attention sets what it resolved
        self.proj = nn.Linear(width, width)

    def split_heads(self, x_BSD: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, H, d], a view."""
        return x_BSD.unflatten(-1, (self.heads, self.head_dim))

    def attend(self, q_BRD: Tensor, kv_BT2D: Tensor) -> Tensor:
        """[B, R, D] queries over [B, T, 2D] keys and values -> [B, R, D], projected. Any strides in B, R, T."""
        k_BTD, v_BTD = kv_BT2D.chunk(2, dim=-1)
        out_BRHd = attention(
            self.split_heads(q_BRD), self.split_heads(k_BTD), self.split_heads(v_BTD), backend=self.backend
        )
        return self.proj(out_BRHd.flatten(2))


class Attention(HeadedAttention):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.qkv = QKVLinear(width)

    def forward(self, x_BSD: Tensor) -> Tensor:
        q_BSD, kv_BS2D = self.split_qkv(self.qkv(x_BSD))
        return self.attend(q_BSD, kv_BS2D)

    @staticmethod
    def split_qkv(qkv_BS3D: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S, 3D] -> views [B, S, D] and [B, S, 2D]."""
        width = qkv_BS3D.shape[-1] // 3
        q_BSD, kv_BS2D = qkv_BS3D.split((width, 2 * width), dim=-1)
        return q_BSD, kv_BS2D


class CrossAttention(HeadedAttention):
    """Multi-head attention whose keys and values come from elsewhere; `kv` projects them, `forward` asks."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)

    def forward(self, x_BRD: Tensor, kv_BT2D: Tensor) -> Tensor:
        return self.attend(self.q(x_BRD), kv_BT2D)


class Mlp(nn.Module):
    """Linear, erf-GELU, Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_BSD)))


class Block(nn.Module):
    """Pre-norm encoder block: x += SelfAttn(LN x); x += MLP(LN x). ``drop_path`` is its rate of stochastic depth."""

    def __init__(self, width: int, heads: int, mlp_width: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = layer_norm(width)
        self.attn = Attention(width, heads)
        self.norm2 = layer_norm(width)
        self.mlp = Mlp(width, mlp_width)
        self.drop_path = drop_path

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = x_BSD + self.drop(self.attn(self.norm1(x_BSD)))
        return x_BSD + self.drop(self.mlp(self.norm2(x_BSD)))

    def drop(self, branch_BSD: Tensor) -> Tensor:
        """Stochastic depth: in training, drop an image's branch with probability ``drop_path``, scale the others."""
        if not self.training or self.drop_path == 0:
            return branch_BSD
        keep = 1 - self.drop_path
        kept_B11 = torch.empty(len(branch_BSD), 1, 1, dtype=branch_BSD.dtype, device=branch_BSD.device).bernoulli_(keep)
        return branch_BSD * (kept_B11 / keep)
