"""The pieces of a transformer block, under timm's key names, with the parts of them that the exact skips need.

A block takes the residual stream as a sum (x, delta) that is not yet added up, and returns one: so every addition meets
the LayerNorm that follows it, and the two can be one pass. The bias of the Linear that made delta may be left to that
pass too; it then goes beside delta.

Letters: B batch, S positions of x, R positions that ask (queries), T positions that answer, D width,
H heads, d = D / H.

LayerNorm (eps 1e-6), softmax and attention take their statistics in float32 (float64 for float64), whatever the dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from mirl.engine.models.execution import Execution, Regions, apply_keeping_input, fusing
from mirl.engine.models.linear_parts import linear_parts
from mirl.kernels import AttentionBackend, bias_gelu, packed_attention, residual_layer_norm, sums_bias

NORM_EPS = 1e-6


def layer_norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=NORM_EPS)


class ResidualNorm(nn.LayerNorm):
    """The LayerNorm that follows a residual addition: (x, delta) -> (x + delta, LN(x + delta)).

    ``after_linear``: delta is what a Linear made.
    """

    def __init__(self, width: int, after_linear: bool = True) -> None:
        super().__init__(width, eps=NORM_EPS)
        self.after_linear = after_linear
        self.execution = Execution()

    def adds_bias(self, in_region: bool) -> bool:
        """Whether the bias of the Linear before it is better left to it. ``in_region``: it will be compiled.

        A parameter that ZeRO-3 has sharded is there in its own layer's pass alone.
        """
        fused = self.execution.norm_in_regions if in_region else self.execution.fused_norm
        return fused and self.execution.bias_in_norm and not hasattr(self.weight, "ds_id")

    def forward(
        self, x_BSD: Tensor, delta_BSD: Tensor | None = None, delta_bias_D: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``delta_BSD`` None: nothing to add, x itself is the first result. ``delta_bias_D``: to be added to delta."""
        if fusing(self.execution.fused_norm, self.execution.norm_in_regions):
            # Under autocast a branch is bfloat16 and the residual stream is not.
            delta_BSD = None if delta_BSD is None else delta_BSD.to(x_BSD.dtype)
            return residual_layer_norm(x_BSD, delta_BSD, self.weight, self.bias, self.eps, delta_bias_D)
        total_BSD = add_branch(x_BSD, delta_BSD, delta_bias_D)
        return total_BSD, super().forward(total_BSD)

    def feed(self, consumer: Callable[[Tensor], Tensor], total_BSD: Tensor, normed_BSD: Tensor) -> Tensor:
        """``consumer(normed)``, which keeps ``total`` for its backward pass under `Execution.recompute`."""
        if not self.execution.recompute:
            return consumer(normed_BSD)
        return apply_keeping_input(lambda total: self.forward(total)[1], consumer, total_BSD, normed_BSD)


class StreamNorm(ResidualNorm):
    """The LayerNorm of a residual stream for those who read it: ``norm(x)`` is LN(x).

    Of an open sum, ``norm(x, delta, delta_bias)``, it gives what `ResidualNorm` gives.
    """

    def forward(self, x_BSD: Tensor, delta_BSD: Tensor | None = None, delta_bias_D: Tensor | None = None) -> Any:
        total_BSD, normed_BSD = super().forward(x_BSD, delta_BSD, delta_bias_D)
        return normed_BSD if delta_BSD is None else (total_BSD, normed_BSD)


# x, delta and a bias that delta lacks, if any: a residual stream that is still to be added up.
Branch = tuple[Tensor, Tensor | None, Tensor | None]


def add_branch(x_BSD: Tensor, delta_BSD: Tensor | None, delta_bias_D: Tensor | None) -> Tensor:
    """x + delta, x + (delta + bias) where the Linear that made delta left its bias, or x where there is no delta."""
    if delta_BSD is None:
        return x_BSD
    return x_BSD + (delta_BSD if delta_bias_D is None else delta_BSD + delta_bias_D)


class OpenLinear(nn.Linear):
    """A Linear that can leave its bias to the kernel after it."""

    def forward(self, x_BSD: Tensor, add_bias: bool = True) -> Tensor:
        return F.linear(x_BSD, self.weight, self.bias if add_bias else None)


class QKVLinear(nn.Linear):
    """Queries, keys and values in one matrix [3D, D], parts of which a caller can ask for different positions."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 3 * width)

    def forward(self, x_BSD: Tensor, *, bias_gradient: bool = True) -> Tensor:
        """[B, S, D] -> [B, S, 3D]. ``bias_gradient`` False: left to who reads it."""
        return F.linear(x_BSD, self.weight, self.bias if bias_gradient else self.bias.detach())

    def of_several(
        self, *asked: tuple[Tensor, Literal["qkv", "q", "kv"]], bias_gradient: bool = True
    ) -> tuple[Tensor, ...]:
        """Of each tensor [..., D] the part that is named beside it; together the parts are all of the matrix."""
        width = self.in_features
        rows = {"qkv": (0, 3 * width), "q": (0, width), "kv": (width, 3 * width)}
        bias_3D = self.bias if bias_gradient else self.bias.detach()
        return linear_parts(self.weight, bias_3D, [x for x, _ in asked], [rows[part] for _, part in asked])


class HeadedAttention(nn.Module):
    """What self- and cross-attention share: heads, the resolved backend, and the output projection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = width // heads
        self.backend: AttentionBackend | str = "auto"  # MIRL.resolve_attention sets what it resolved
        self.proj = OpenLinear(width, width)

    def attend(
        self,
        q_BRD: Tensor,
        kv_BT2D: Tensor | None = None,
        *,
        bias: Tensor | None = None,
        kv_bias_2D: Tensor | None = None,
    ) -> Tensor:
        """[B, R, D] queries over [B, T, 2D] keys and values -> [B, R, D], not yet projected. Any strides in B, R, T.

        Without ``kv_BT2D`` all three are in [B, S, 3D]. The biases: see `mirl.kernels.packed_attention`.
        """
        return packed_attention(q_BRD, kv_BT2D, self.heads, backend=self.backend, bias=bias, kv_bias_2D=kv_bias_2D)

    def takes_bias(self, queries: int, keys: int) -> bool:
        """Tell whether `attend` makes the gradients of the biases of so many queries and keys.

        It leaves them to the Linear layers under ZeRO 3, which has a parameter whole in the pass of its own layer only.
        """
        if not isinstance(self.backend, AttentionBackend) or hasattr(self.proj.weight, "ds_id"):
            return False
        return sums_bias(self.backend.name, queries, keys, self.head_dim)


class Attention(HeadedAttention):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.qkv = QKVLinear(width)

    def project(self, x_BSD: Tensor) -> Tensor:
        """Queries, keys and values for `forward`: [B, S, 3D]."""
        return self.qkv(x_BSD, bias_gradient=not self.takes_bias(x_BSD.shape[1], x_BSD.shape[1]))

    def forward(self, qkv_BS3D: Tensor, add_bias: bool = True) -> Tensor:
        """Of what `project` gave, which may have left the gradient of its bias to this: [B, S, D].

        ``add_bias``: that of the projection.
        """
        bias_3D = self.qkv.bias if self.takes_bias(qkv_BS3D.shape[1], qkv_BS3D.shape[1]) else None
        return self.proj(self.attend(qkv_BS3D, bias=bias_3D), add_bias)


class QueryLinear(nn.Linear):
    """A Linear that can leave the gradient of its bias to the attention after it."""

    def forward(self, x_BSD: Tensor, bias_gradient: bool = True) -> Tensor:
        return F.linear(x_BSD, self.weight, self.bias if bias_gradient else self.bias.detach())


class CrossAttention(HeadedAttention):
    """Multi-head attention whose keys and values come from elsewhere: `q` and `kv` project, `attend` asks."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.q = QueryLinear(width, width)
        self.kv = nn.Linear(width, 2 * width)


class HiddenLinear(OpenLinear):
    """The first of an `Mlp`, which can leave its bias to the GELU after it."""


class Mlp(nn.Module):
    """Linear, erf-GELU, Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = HiddenLinear(width, hidden)
        self.fc2 = OpenLinear(hidden, width)
        self.execution = Execution()

    def forward(self, normed_BSD: Tensor) -> Tensor:
        return self.finish(self.fc1(normed_BSD, not self._fused()))

    def _fused(self) -> bool:
        return fusing(self.execution.fused_gelu, self.execution.gelu_in_regions)

    def finish(self, hidden_BSF: Tensor, add_bias: bool = True) -> Tensor:
        """GELU and the second Linear, from what `fc1` gave. ``add_bias``: of the second."""
        fused = self._fused()

        def last(active_BSF: Tensor) -> Tensor:
            return self.fc2(active_BSF, add_bias)

        def activate(hidden_BSF: Tensor) -> Tensor:
            return bias_gelu(hidden_BSF, self.fc1.bias) if fused else F.gelu(hidden_BSF)

        if not self.execution.recompute:
            return last(activate(hidden_BSF))
        return apply_keeping_input(activate, last, hidden_BSF, activate(hidden_BSF))

    def after(self, norm: ResidualNorm, total_BSD: Tensor, normed_BSD: Tensor, add_bias: bool = True) -> Tensor:
        """``self(normed)``, with the recomputation of ``norm``. ``add_bias``: of the second Linear."""
        first = not self._fused()
        return self.finish(norm.feed(lambda y_BSD: self.fc1(y_BSD, first), total_BSD, normed_BSD), add_bias)


class Block(nn.Module):
    """Pre-norm encoder block: x += SelfAttn(LN x); x += MLP(LN x). ``drop_path`` is its rate of stochastic depth.

    ``leaves_bias``: False where some block of the model drops paths, so that the biases go the same way in all blocks.
    ``parts``: consecutive sequences of a batch that are of one image, which is dropped or kept as a whole.
    """

    def __init__(
        self, width: int, heads: int, mlp_width: int, drop_path: float = 0.0, leaves_bias: bool = True
    ) -> None:
        super().__init__()
        self.norm1 = ResidualNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = ResidualNorm(width)
        self.mlp = Mlp(width, mlp_width)
        self.drop_path, self.leaves_bias = drop_path, leaves_bias
        self.parts = 1
        self.regions = Regions()

    def forward(self, x_BSD: Tensor) -> Tensor:
        return add_branch(*self.branches(x_BSD))

    def branches(
        self, x_BSD: Tensor, delta_BSD: Tensor | None = None, delta_bias_D: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The block of x + (delta + bias), as such a sum again: what went into the MLP's branch, what came out of it,
        and the bias that it lacks, if any.
        """
        # Drawn here, so that a compiled region has no random numbers and no rate of its own.
        scales_B11 = (self.drop_scale(x_BSD), self.drop_scale(x_BSD))
        compute = self.regions.get(Block.compute)
        leave = self.leaves_bias and self.norm2.adds_bias(compute is not Block.compute)
        x_BSD, delta_BSD = compute(self, x_BSD, delta_BSD, delta_bias_D, leave, *scales_B11)
        return x_BSD, delta_BSD, self.mlp.fc2.bias if leave else None

    def compute(
        self,
        x_BSD: Tensor,
        delta_BSD: Tensor | None,
        delta_bias_D: Tensor | None,
        leave_bias: bool,
        attention_scale_B11: Tensor | None,
        mlp_scale_B11: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """`branches`, as a compiled region sees it. ``leave_bias``: of both branches, to the norms after them."""
        x_BSD, y_BSD = self.norm1(x_BSD, delta_BSD, delta_bias_D)
        branch_BSD = self.attn(self.norm1.feed(self.attn.project, x_BSD, y_BSD), not leave_bias)
        if attention_scale_B11 is not None:
            branch_BSD = branch_BSD * attention_scale_B11
        x_BSD, y_BSD = self.norm2(x_BSD, branch_BSD, self.attn.proj.bias if leave_bias else None)
        branch_BSD = self.mlp.after(self.norm2, x_BSD, y_BSD, not leave_bias)
        return x_BSD, branch_BSD if mlp_scale_B11 is None else branch_BSD * mlp_scale_B11

    def drop_scale(self, x_BSD: Tensor) -> Tensor | None:
        """Stochastic depth: in training 0 with probability ``drop_path`` an image, else 1 / (1 - ``drop_path``)."""
        if not self.training or self.drop_path == 0:
            return None
        keep = 1 - self.drop_path
        scale_B11 = x_BSD.new_empty(len(x_BSD) // self.parts, 1, 1).bernoulli_(keep) / keep
        return scale_B11 if self.parts == 1 else scale_B11.repeat_interleave(self.parts, dim=0)
