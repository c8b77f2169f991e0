"""Products with parts of one matrix, and projections of the densely connected inputs, against plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mirl.engine.models import did, linear_parts
from mirl.engine.models.did import fold_norms, project_prefixes

Q, KV, ALL = (0, 6), (6, 18), (0, 18)


@pytest.fixture(params=[False, True], ids=["as on a cpu", "as on a gpu"])
def way(request, monkeypatch):
    for module in (linear_parts, did):
        monkeypatch.setattr(module, "uses_triton", lambda _: request.param)


def _drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("parts", [(Q, KV), (ALL, ALL), (Q, KV, KV), (KV, Q, KV, Q)])
@pytest.mark.parametrize("unasked", [None, 0])
def test_gradients_of_parts_are_those_of_slices(way, parts, unasked):
    """``unasked``: an output that goes into no loss."""
    torch.manual_seed(0)
    weight, bias = _drawn(18, 5), _drawn(18)
    inputs = [_drawn(2, 3 + i, 5) if i != 1 else _drawn(7, 5) for i in range(len(parts))]
    found = linear_parts.linear_parts(weight, bias, inputs, parts)
    expected = [F.linear(x, weight[slice(*part)], bias[slice(*part)]) for x, part in zip(inputs, parts, strict=True)]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    leaves = [weight, bias, *(x for i, x in enumerate(inputs) if i != unasked)]

    def gradients(outputs):
        loss = sum((i + 1) * y.square().sum() for i, y in enumerate(outputs) if i != unasked)
        return torch.autograd.grad(loss, leaves)

    for one, other in zip(gradients(found), gradients(expected), strict=True):
        # Float64, sums of at most 15 products in another order.
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("parts", [(Q,), (KV, KV), (Q, ALL), ((0, 5), KV), (Q, (6, 17))])
def test_parts_that_are_not_the_matrix_are_refused(parts):
    with pytest.raises(ValueError, match="do not make up 18 rows"):
        linear_parts.linear_parts(_drawn(18, 5), _drawn(18), [_drawn(2, 5)] * len(parts), parts)


@pytest.mark.parametrize("unread", [None, 1, 2])
def test_projected_prefixes_are_those_of_each_norm_and_linear(way, unread):
    """``unread``: a projection that goes into no loss; 2 is the longest."""
    torch.manual_seed(0)
    norms = [nn.LayerNorm(5, dtype=torch.float64) for _ in range(3)]
    linears = [nn.Linear(5, 8, dtype=torch.float64) for _ in range(3)]
    leaves = [parameter for module in (*norms, *linears) for parameter in module.parameters()]
    with torch.no_grad():
        for leaf in leaves:
            leaf.normal_()
    buffer = _drawn(9, 4, 5)
    lengths = [3, 6, 9]
    normed = F.layer_norm(buffer, (5,))
    expected = [
        linear(normed[:length] * norm.weight + norm.bias).transpose(0, 1)
        for norm, linear, length in zip(norms, linears, lengths, strict=True)
    ]
    found = project_prefixes(normed, lengths, *fold_norms(norms, linears))

    def gradients(outputs):
        loss = sum((i + 1) * y.square().sum() for i, y in enumerate(outputs) if i != unread)
        zeros = [torch.zeros_like(leaf) for leaf in (buffer, *leaves)]
        grads = torch.autograd.grad(loss, [buffer, *leaves], retain_graph=True, allow_unused=True)
        return [zero if grad is None else grad for zero, grad in zip(zeros, grads, strict=True)]

    for one, other in zip((*found, *gradients(found)), (*expected, *gradients(expected)), strict=True):
        # Float64, scale and shift of the norm inside or outside of the sums.
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-10)
