"""The pieces of a transformer block, under timm's key names, with the parts of them that the exact skips need.

A block takes the residual stream as a sum (x, delta) that is not yet added up, and returns one: so every addition meets
the LayerNorm that follows it, and the two can be one pass.

Letters: B batch, S positions of x, R positions that ask (queries), T positions that answer, D width,
H heads, d = D / H.

LayerNorm (eps 1e-6), softmax and attention take their statistics in float32 (float64 for float64), whatever the dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from mirl.engine.models.execution import Execution, Regions, apply_keeping_input, fusing
from mirl.kernels import AttentionBackend, attention, bias_gelu, residual_layer_norm

NORM_EPS = 1e-6


def layer_norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=NORM_EPS)


class ResidualNorm(nn.LayerNorm):
    """The LayerNorm that follows a residual addition: (x, delta) -> (x + delta, LN(x + delta))."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=NORM_EPS)
        self.execution = Execution()

    def forward(self, x_BSD: Tensor, delta_BSD: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``delta_BSD`` None: nothing to add, x itself is the first result."""
        if fusing(self.execution.fused_norm, self.execution.norm_in_regions):
            # Under autocast a branch is bfloat16 and the residual stream is not.
            delta_BSD = None if delta_BSD is None else delta_BSD.to(x_BSD.dtype)
            return residual_layer_norm(x_BSD, delta_BSD, self.weight, self.bias, self.eps)
        total_BSD = x_BSD if delta_BSD is None else x_BSD + delta_BSD
        return total_BSD, super().forward(total_BSD)

    def feed(self, consumer: Callable[[Tensor], Tensor], total_BSD: Tensor, normed_BSD: Tensor) -> Tensor:
        """``consumer(normed)``, which keeps ``total`` for its backward pass under `Execution.recompute`."""
        if not self.execution.recompute:
            return consumer(normed_BSD)
        return apply_keeping_input(lambda total: self.forward(total)[1], consumer, total_BSD, normed_BSD)


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
        """[B, R, D] queries over [B, T, 2D] keys and values -> [B, R, D], not yet projected. Any strides in B, R, T."""
        k_BTD, v_BTD = kv_BT2D.chunk(2, dim=-1)
        out_BRHd = attention(
            self.split_heads(q_BRD), self.split_heads(k_BTD), self.split_heads(v_BTD), backend=self.backend
        )
        return out_BRHd.flatten(2)


class Attention(HeadedAttention):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.qkv = QKVLinear(width)

    def forward(self, qkv_BS3D: Tensor) -> Tensor:
        """Of what `qkv` gave, projected: [B, S, D]."""
        return self.proj(self.attend(*self.split_qkv(qkv_BS3D)))

    @staticmethod
    def split_qkv(qkv_BS3D: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S, 3D] -> views [B, S, D] and [B, S, 2D]."""
        width = qkv_BS3D.shape[-1] // 3
        q_BSD, kv_BS2D = qkv_BS3D.split((width, 2 * width), dim=-1)
        return q_BSD, kv_BS2D


class CrossAttention(HeadedAttention):
    """Multi-head attention whose keys and values come from elsewhere: `q` and `kv` project, `attend` asks."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)


class HiddenLinear(nn.Linear):
    """A Linear that can leave its bias to the GELU after it."""

    def forward(self, x_BSD: Tensor, add_bias: bool = True) -> Tensor:
        return F.linear(x_BSD, self.weight, self.bias if add_bias else None)


class Mlp(nn.Module):
    """Linear, erf-GELU, Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = HiddenLinear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.execution = Execution()

    def forward(self, normed_BSD: Tensor) -> Tensor:
        return self.finish(self.fc1(normed_BSD, not self._fused()))

    def _fused(self) -> bool:
        return fusing(self.execution.fused_gelu, self.execution.gelu_in_regions)

    def finish(self, hidden_BSF: Tensor) -> Tensor:
        """GELU and the second Linear, from what `fc1` gave."""
        fused = self._fused()

        def activate(hidden_BSF: Tensor) -> Tensor:
            return bias_gelu(hidden_BSF, self.fc1.bias) if fused else F.gelu(hidden_BSF)

        if not self.execution.recompute:
            return self.fc2(activate(hidden_BSF))
        return apply_keeping_input(activate, self.fc2, hidden_BSF, activate(hidden_BSF))

    def after(self, norm: ResidualNorm, total_BSD: Tensor, normed_BSD: Tensor) -> Tensor:
        """``self(normed)``, with the recomputation of ``norm``."""
        add_bias = not self._fused()
        return self.finish(norm.feed(lambda y_BSD: self.fc1(y_BSD, add_bias), total_BSD, normed_BSD))


class Block(nn.Module):
    """Pre-norm encoder block: x += SelfAttn(LN x); x += MLP(LN x). ``drop_path`` is its rate of stochastic depth.

    ``parts``: consecutive sequences of a batch that are of one image, which is dropped or kept as a whole.
    """

    def __init__(self, width: int, heads: int, mlp_width: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = ResidualNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = ResidualNorm(width)
        self.mlp = Mlp(width, mlp_width)
        self.drop_path = drop_path
        self.parts = 1
        self.regions = Regions()

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD, delta_BSD = self.branches(x_BSD)
        return x_BSD + delta_BSD

    def branches(self, x_BSD: Tensor, delta_BSD: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The block of x + delta, as such a sum again: what went into the MLP's branch, and what came out of it."""
        # Drawn here, so that a compiled region has no random numbers and no rate of its own.
        attention_scale_B11, mlp_scale_B11 = self.drop_scale(x_BSD), self.drop_scale(x_BSD)
        return self.regions.get(Block.compute)(self, x_BSD, delta_BSD, attention_scale_B11, mlp_scale_B11)

    def compute(
        self, x_BSD: Tensor, delta_BSD: Tensor | None, attention_scale_B11: Tensor | None, mlp_scale_B11: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """`branches`, as a compiled region sees it."""
        x_BSD, y_BSD = self.norm1(x_BSD, delta_BSD)
        branch_BSD = self.attn(self.norm1.feed(self.attn.qkv, x_BSD, y_BSD))
        if attention_scale_B11 is not None:
            branch_BSD = branch_BSD * attention_scale_B11
        x_BSD, y_BSD = self.norm2(x_BSD, branch_BSD)
        branch_BSD = self.mlp.after(self.norm2, x_BSD, y_BSD)
        return x_BSD, branch_BSD if mlp_scale_B11 is None else branch_BSD * mlp_scale_B11

    def drop_scale(self, x_BSD: Tensor) -> Tensor | None:
        """Stochastic depth: in training 0 with probability ``drop_path`` an image, else 1 / (1 - ``drop_path``)."""
        if not self.training or self.drop_path == 0:
            return None
        keep = 1 - self.drop_path
        scale_B11 = x_BSD.new_empty(len(x_BSD) // self.parts, 1, 1).bernoulli_(keep) / keep
        return scale_B11 if self.parts == 1 else scale_B11.repeat_interleave(self.parts, dim=0)
