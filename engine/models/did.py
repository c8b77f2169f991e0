"""Densely connected inputs (DID, Eq. 8) are the keys and values that decoder g's cross-attention reads.

kv_g = [e_0, ..., e_{g-1}], e_j [B, T, E] with T = 1 + K, passes a LayerNorm and a Linear E -> 2E of each block that
reads it. Attention does not see the order of its keys, so every kv_g is the beginning of kv_G. Two more facts make the
prefix form:

- LayerNorm is (e - mean) / deviation, which depends on e alone, followed by a scale and a shift, which belong to the
  block. The first part is done once for all blocks.
- Linear(n * scale + shift) = n (W diag(scale))^T + (W shift + b): scale and shift go into the matrix, which is small.

With tokens first, [G * T, B, E], a prefix is contiguous, so each block's projection is one plain matrix product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mirl.engine.models.layers import NORM_EPS
from mirl.kernels.dispatch import uses_triton


def concatenated_inputs(embeddings: Sequence[Tensor]) -> list[Tensor]:
    """Return kv_g for g = 1..G from e_0 ... e_{G-1} [B, T, E], each [B, g * T, E]. This is the plain form."""
    return [torch.cat(embeddings[:g], dim=1) for g in range(1, len(embeddings) + 1)]


def normalised_prefix_buffer(embeddings: Sequence[Tensor]) -> Tensor:
    """Normalise e_0 ... e_{G-1} [B, T, E] without scale and shift, and put tokens first: [G * T, B, E]."""
    buffer_SBE = torch.cat([e_BTE.transpose(0, 1) for e_BTE in embeddings])
    return F.layer_norm(buffer_SBE, buffer_SBE.shape[-1:], eps=NORM_EPS)


def fold_norms(norms: Sequence[nn.LayerNorm], linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor]:
    """Return the matrices [G, F, E] and biases [G, F] of ``linears`` E -> F after the scale and shift of ``norms``.

    A GPU folds all of them together, because an operator on so small a tensor costs a launch and no more. A CPU folds
    them one by one, which keeps the bits of a separate product for each.
    """
    if not uses_triton(linears[0].weight):
        pairs = [(linear.weight * norm.weight, F.linear(norm.bias, linear.weight, linear.bias))
                 for norm, linear in zip(norms, linears, strict=True)]  # fmt: skip
        return torch.stack([weight for weight, _ in pairs]), torch.stack([bias for _, bias in pairs])
    weight_GFE = torch.stack([linear.weight for linear in linears])
    bias_GF = torch.stack([linear.bias for linear in linears])
    scale_GE = torch.stack([norm.weight for norm in norms])
    shift_GE = torch.stack([norm.bias for norm in norms])
    folded_GF = torch.baddbmm(bias_GF.unsqueeze(2), weight_GFE, shift_GE.unsqueeze(2)).squeeze(2)
    return weight_GFE * scale_GE.unsqueeze(1), folded_GF


def project_prefixes(buffer_SBE: Tensor, lengths: Sequence[int], weight_GFE: Tensor, bias_GF: Tensor) -> list[Tensor]:
    """Apply each Linear_i to the first ``lengths[i]`` tokens: [B, lengths[i], F], a view of a tokens-first tensor.

    buffer_SBE: [S, B, E], contiguous. weight_GFE, bias_GF: matrix and bias of each i.
    """
    tensors = [buffer_SBE, weight_GFE, bias_GF]
    device_type = buffer_SBE.device.type
    if torch.is_autocast_enabled(device_type):
        # Autocast does not look inside a custom function.
        tensors = [tensor.to(torch.get_autocast_dtype(device_type)) for tensor in tensors]
    return [out.transpose(0, 1) for out in _PrefixProjection.apply(tuple(lengths), *tensors)]


class _PrefixProjection(torch.autograd.Function):
    """All projections are one node of the graph. So their gradients add up in one buffer, and the gradients of matrices
    and biases are written where they stay.

    If each projection were a node, each would return a gradient of the whole buffer, zeros included, and autograd would
    add them.
    """

    @staticmethod
    def forward(
        ctx: Any, lengths: tuple[int, ...], buffer_SBE: Tensor, weight_GFE: Tensor, bias_GF: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.lengths = lengths
        ctx.save_for_backward(buffer_SBE, weight_GFE)
        ctx.set_materialize_grads(False)
        return tuple(
            F.linear(buffer_SBE[:length], weight, bias)
            for length, weight, bias in zip(lengths, weight_GFE, bias_GF, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        buffer_SBE, weight_GFE = ctx.saved_tensors
        tokens, batch, width = buffer_SBE.shape
        rows_RE = buffer_SBE.view(tokens * batch, width)
        grad_RE: Tensor | None = None
        new = weight_GFE.new_zeros if None in grads else weight_GFE.new_empty
        grad_weight_GFE = new(weight_GFE.shape)
        # Detached biases get their gradients in the attention (MIRL.dense_inputs).
        grad_bias_GF = new(weight_GFE.shape[:2]) if ctx.needs_input_grad[3] else None
        # The longest prefix comes first: it writes the gradient buffer, and the others add to its beginning.
        for i in sorted(range(len(grads)), key=lambda i: -ctx.lengths[i]):
            grad = grads[i]
            if grad is None:
                continue
            length = ctx.lengths[i] * batch
            grad_out = grad.reshape(length, -1)
            torch.mm(grad_out.t(), rows_RE[:length], out=grad_weight_GFE[i])
            if grad_bias_GF is not None:
                torch.sum(grad_out, 0, out=grad_bias_GF[i])
            if grad_RE is None:
                grad_RE = torch.zeros_like(rows_RE) if length < len(rows_RE) else torch.empty_like(rows_RE)
                torch.mm(grad_out, weight_GFE[i], out=grad_RE[:length])
            else:
                beginning_RE = grad_RE[:length]
                torch.addmm(beginning_RE, grad_out, weight_GFE[i], out=beginning_RE)
        grad_buffer = None if grad_RE is None else grad_RE.view_as(buffer_SBE)
        return None, grad_buffer, grad_weight_GFE, grad_bias_GF
