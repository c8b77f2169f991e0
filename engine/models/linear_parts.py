"""Several products with parts of one matrix are one node of the graph, which writes one gradient of that matrix.

If each product were a node, each would return a gradient of its part, to be copied beside the others or added to them.
That would cost two launches a product, and the matrix would be read and written again.

Letters: P rows of the whole matrix, p those of one part, E width of the inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mirl.kernels.dispatch import uses_triton


def linear_parts(
    weight_PE: Tensor, bias_P: Tensor, inputs: Sequence[Tensor], parts: Sequence[tuple[int, int]]
) -> tuple[Tensor, ...]:
    """Multiply each of ``inputs`` [..., E] with its rows ``first`` to ``last`` - 1 of the matrix: [..., p].

    parts: (first, last) of each input. Two parts are equal or have no row in common, and all together are the whole
    matrix. Differentiable in matrix, bias and inputs, once. ValueError for other parts.
    """
    covered = sorted(set(parts))
    ends = [0, *(last for _, last in covered)]
    if [first for first, _ in covered] != ends[:-1] or ends[-1] != len(weight_PE) or len(parts) != len(inputs):
        raise ValueError(f"parts {list(parts)} of {len(inputs)} inputs do not make up {len(weight_PE)} rows")
    tensors = [weight_PE, bias_P, *inputs]
    device_type = weight_PE.device.type
    if torch.is_autocast_enabled(device_type):
        # Autocast does not look inside a custom function.
        tensors = [tensor.to(torch.get_autocast_dtype(device_type)) for tensor in tensors]
    return _LinearParts.apply(tuple(parts), *tensors)


class _LinearParts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, parts: tuple[tuple[int, int], ...], weight_PE: Tensor, bias_P: Tensor, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.parts = parts
        ctx.save_for_backward(weight_PE, *inputs)
        ctx.set_materialize_grads(False)
        return tuple(
            F.linear(x, weight_PE[first:last], bias_P[first:last])
            for x, (first, last) in zip(inputs, parts, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        weight_PE, *inputs = ctx.saved_tensors
        grad_weight_PE = torch.empty_like(weight_PE)
        # A detached bias gets its gradient elsewhere, in the attention.
        grad_bias_P = weight_PE.new_empty(len(weight_PE)) if ctx.needs_input_grad[2] else None
        grad_inputs: list[Tensor | None] = [None] * len(inputs)
        written: set[tuple[int, int]] = set()
        for i, (grad, x, part) in enumerate(zip(grads, inputs, ctx.parts, strict=True)):
            if grad is None:
                continue
            rows = slice(*part)
            grad_Rp, x_RE = grad.flatten(0, -2), x.flatten(0, -2)
            if ctx.needs_input_grad[3 + i]:
                grad_inputs[i] = (grad_Rp @ weight_PE[rows]).view(x.shape)
            if part in written:
                if uses_triton(weight_PE):
                    grad_weight_PE[rows].addmm_(grad_Rp.t(), x_RE)
                else:  # a CPU keeps the bits of a product and an addition
                    grad_weight_PE[rows].add_(grad_Rp.t() @ x_RE)
                if grad_bias_P is not None:
                    grad_bias_P[rows].add_(grad_Rp.sum(0))
            else:
                torch.mm(grad_Rp.t(), x_RE, out=grad_weight_PE[rows])
                if grad_bias_P is not None:
                    torch.sum(grad_Rp, 0, out=grad_bias_P[rows])
                written.add(part)
        for part in set(ctx.parts) - written:  # nobody asked for these rows
            grad_weight_PE[slice(*part)].zero_()
            if grad_bias_P is not None:
                grad_bias_P[slice(*part)].zero_()
        return None, grad_weight_PE, grad_bias_P, *grad_inputs
