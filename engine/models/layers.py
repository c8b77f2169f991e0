"""The pieces of a transformer block stand under timm's key names, with the methods that the exact skips need.

A block takes the residual stream as an open sum (x, delta), not yet added up, and returns one. So every addition meets
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
    """This LayerNorm follows a residual addition: (x, delta) -> (x + delta, LN(x + delta)).

    ``after_linear``: delta is the output of a Linear.
    """

    def __init__(self, width: int, after_linear: bool = True) -> None:
        super().__init__(width, eps=NORM_EPS)
        self.after_linear = after_linear
        self.execution = Execution()

    def adds_bias(self, in_region: bool) -> bool:
        """Say whether the Linear before this norm should leave its bias to it.

        ``in_region``: the norm will run in a compiled region. Under ZeRO-3 no bias is left: a sharded parameter is
        whole in its own layer's pass alone.
        """
        fused = self.execution.norm_in_regions if in_region else self.execution.fused_norm
        return fused and self.execution.bias_in_norm and not hasattr(self.weight, "ds_id")

    def forward(
        self, x_BSD: Tensor, delta_BSD: Tensor | None = None, delta_bias_D: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return sum and norm. ``delta_BSD`` None: x itself is the sum. ``delta_bias_D``: a bias to add to delta."""
        if fusing(self.execution.fused_norm, self.execution.norm_in_regions):
            # Under autocast a branch is bfloat16 and the residual stream is not.
            delta_BSD = None if delta_BSD is None else delta_BSD.to(x_BSD.dtype)
            return residual_layer_norm(x_BSD, delta_BSD, self.weight, self.bias, self.eps, delta_bias_D)
        total_BSD = add_branch(x_BSD, delta_BSD, delta_bias_D)
        return total_BSD, super().forward(total_BSD)

    def feed(self, consumer: Callable[[Tensor], Tensor], total_BSD: Tensor, normed_BSD: Tensor) -> Tensor:
        """Return ``consumer(normed)``, which keeps ``total`` for its backward pass under `Execution.recompute`."""
        if not self.execution.recompute:
            return consumer(normed_BSD)
        return apply_keeping_input(lambda total: self.forward(total)[1], consumer, total_BSD, normed_BSD)


class StreamNorm(ResidualNorm):
    """This LayerNorm hands a residual stream to its readers: ``norm(x)`` is LN(x).

    For an open sum, ``norm(x, delta, delta_bias)`` returns the same as `ResidualNorm`.
    """

    def forward(self, x_BSD: Tensor, delta_BSD: Tensor | None = None, delta_bias_D: Tensor | None = None) -> Any:
        total_BSD, normed_BSD = super().forward(x_BSD, delta_BSD, delta_bias_D)
        return normed_BSD if delta_BSD is None else (total_BSD, normed_BSD)


# An open sum is a residual stream that is still to be added up: x, delta, and a bias that delta lacks, if any.
Branch = tuple[Tensor, Tensor | None, Tensor | None]


def add_branch(x_BSD: Tensor, delta_BSD: Tensor | None, delta_bias_D: Tensor | None) -> Tensor:
    """Add up x + delta; x + (delta + bias) if the Linear that made delta left its bias; x alone if delta is None."""
    if delta_BSD is None:
        return x_BSD
    return x_BSD + (delta_BSD if delta_bias_D is None else delta_BSD + delta_bias_D)


class OpenLinear(nn.Linear):
    """This Linear can leave its bias to the kernel after it."""

    def forward(self, x_BSD: Tensor, add_bias: bool = True) -> Tensor:
        return F.linear(x_BSD, self.weight, self.bias if add_bias else None)


class QKVLinear(nn.Linear):
    """One matrix [3D, D] makes queries, keys and values; a caller can ask for parts of it at different positions."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 3 * width)

    def forward(self, x_BSD: Tensor, *, bias_gradient: bool = True) -> Tensor:
        """Project [B, S, D] to [B, S, 3D]. ``bias_gradient`` False leaves the bias's gradient to the reader."""
        return F.linear(x_BSD, self.weight, self.bias if bias_gradient else self.bias.detach())

    def of_several(
        self, *asked: tuple[Tensor, Literal["qkv", "q", "kv"]], bias_gradient: bool = True
    ) -> tuple[Tensor, ...]:
        """Project each tensor [..., D] with the part named beside it; together the parts make up the whole matrix."""
        width = self.in_features
        rows = {"qkv": (0, 3 * width), "q": (0, width), "kv": (width, 3 * width)}
        bias_3D = self.bias if bias_gradient else self.bias.detach()
        return linear_parts(self.weight, bias_3D, [x for x, _ in asked], [rows[part] for _, part in asked])


class HeadedAttention(nn.Module):
    """Self- and cross-attention share the heads, the resolved backend and the output projection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = width // heads
        self.backend: AttentionBackend | str = "auto"  # ComputeChoices sets the resolved backend
        self.proj = OpenLinear(width, width)

    def attend(
        self,
        q_BRD: Tensor,
        kv_BT2D: Tensor | None = None,
        *,
        bias: Tensor | None = None,
        kv_bias_2D: Tensor | None = None,
    ) -> Tensor:
        """Attend with [B, R, D] queries to [B, T, 2D] keys and values, and return [B, R, D], not yet projected.

        Without ``kv_BT2D`` all three are in [B, S, 3D]. Strides in B, R and T are free. The biases: see
        `mirl.kernels.packed_attention`.
        """
        return packed_attention(q_BRD, kv_BT2D, self.heads, backend=self.backend, bias=bias, kv_bias_2D=kv_bias_2D)

    def takes_bias(self, queries: int, keys: int) -> bool:
        """Say whether `attend` makes the gradients of the biases of so many queries and keys.

        It leaves them to the Linear layers under ZeRO 3, which has a parameter whole in the pass of its own layer only.
        """
        if not isinstance(self.backend, AttentionBackend) or hasattr(self.proj.weight, "ds_id"):
            return False
        return sums_bias(self.backend.name, queries, keys, self.head_dim)


class Attention(HeadedAttention):
    """Compute multi-head self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.qkv = QKVLinear(width)

    def project(self, x_BSD: Tensor) -> Tensor:
        """Make queries, keys and values for `forward`: [B, S, 3D]."""
        return self.qkv(x_BSD, bias_gradient=not self.takes_bias(x_BSD.shape[1], x_BSD.shape[1]))

    def forward(self, qkv_BS3D: Tensor, add_bias: bool = True) -> Tensor:
        """Attend with the result of `project`, and project: [B, S, D].

        `project` may have left its bias's gradient to this method. ``add_bias``: whether the output projection adds its
        bias.
        """
        bias_3D = self.qkv.bias if self.takes_bias(qkv_BS3D.shape[1], qkv_BS3D.shape[1]) else None
        return self.proj(self.attend(qkv_BS3D, bias=bias_3D), add_bias)


class QueryLinear(nn.Linear):
    """This Linear can leave the gradient of its bias to the attention after it."""

    def forward(self, x_BSD: Tensor, bias_gradient: bool = True) -> Tensor:
        return F.linear(x_BSD, self.weight, self.bias if bias_gradient else self.bias.detach())


class CrossAttention(HeadedAttention):
    """Keys and values of this multi-head attention come from elsewhere: `q` and `kv` project, `attend` attends."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.q = QueryLinear(width, width)
        self.kv = nn.Linear(width, 2 * width)


class HiddenLinear(OpenLinear):
    """The first Linear of an `Mlp` can leave its bias to the GELU after it."""


class Mlp(nn.Module):
    """Compute Linear, erf-GELU, Linear."""

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
        """Apply GELU and the second Linear to the output of `fc1`. ``add_bias``: whether that Linear adds its bias."""
        fused = self._fused()

        def last(active_BSF: Tensor) -> Tensor:
            return self.fc2(active_BSF, add_bias)

        def activate(hidden_BSF: Tensor) -> Tensor:
            return bias_gelu(hidden_BSF, self.fc1.bias) if fused else F.gelu(hidden_BSF)

        if not self.execution.recompute:
            return last(activate(hidden_BSF))
        return apply_keeping_input(activate, last, hidden_BSF, activate(hidden_BSF))

    def after(self, norm: ResidualNorm, total_BSD: Tensor, normed_BSD: Tensor, add_bias: bool = True) -> Tensor:
        """Return ``self(normed)``, with the recomputation of ``norm``. ``add_bias``: as in `finish`."""
        first = not self._fused()
        return self.finish(norm.feed(lambda y_BSD: self.fc1(y_BSD, first), total_BSD, normed_BSD), add_bias)


class Block(nn.Module):
    """A pre-norm encoder block computes x += SelfAttn(LN x); x += MLP(LN x).

    ``drop_path``: its rate of stochastic depth.
    ``leaves_bias``: False if any block of the model drops paths, so that biases are treated alike in all blocks.
    ``parts``: consecutive sequences of a batch that belong to one image, which is dropped or kept as a whole.
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
        """Run the block on x + (delta + bias) and return an open sum of the same form.

        The sum has the input of the MLP's branch, the branch's output, and the bias that the output lacks, if any.
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
        """Compute `branches` in the form that a region compiles.

        ``leave_bias``: whether both branches leave their biases to the norms after them.
        """
        x_BSD, y_BSD = self.norm1(x_BSD, delta_BSD, delta_bias_D)
        branch_BSD = self.attn(self.norm1.feed(self.attn.project, x_BSD, y_BSD), not leave_bias)
        if attention_scale_B11 is not None:
            branch_BSD = branch_BSD * attention_scale_B11
        x_BSD, y_BSD = self.norm2(x_BSD, branch_BSD, self.attn.proj.bias if leave_bias else None)
        branch_BSD = self.mlp.after(self.norm2, x_BSD, y_BSD, not leave_bias)
        return x_BSD, branch_BSD if mlp_scale_B11 is None else branch_BSD * mlp_scale_B11

    def drop_scale(self, x_BSD: Tensor) -> Tensor | None:
        """Draw stochastic depth's scales: 0 with probability ``drop_path`` an image, else 1 / (1 - ``drop_path``).

        Outside of training, and at rate 0, there are none.
        """
        if not self.training or self.drop_path == 0:
            return None
        keep = 1 - self.drop_path
        scale_B11 = x_BSD.new_empty(len(x_BSD) // self.parts, 1, 1).bernoulli_(keep) / keep
        return scale_B11 if self.parts == 1 else scale_B11.repeat_interleave(self.parts, dim=0)
