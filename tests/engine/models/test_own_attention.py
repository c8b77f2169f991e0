"""The model under our attention kernels: the same loss and gradients, of the bias in qkv too, and what is past them."""

from __future__ import annotations

import pytest
import torch

from mirl import kernels
from mirl.engine.models import Execution, layers
from mirl.kernels import AttentionBackend
from tests.engine.models.helpers import gradients, make_inputs, make_model, tiny_config

OWN, MATH = (AttentionBackend(name, "for a test") for name in ("own", "math"))
SIZES = {"width": 64, "heads": 2, "decoder_width": 64, "decoder_heads": 2}


def loss_and_gradients(model, backend, recompute=False):
    images, noise = make_inputs(model.config)
    model.set_attention(backend, images.device, torch.float64)
    model.set_execution(Execution(recompute=recompute))
    loss = model(images, noise=noise).loss
    return loss.detach(), gradients(model, loss)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("variant", ["paper", "release"])
def test_loss_and_gradients_are_those_of_math(variant, recompute):
    model = make_model(tiny_config(variant=variant, **SIZES))
    loss, grads = loss_and_gradients(model, OWN, recompute)
    expected_loss, expected = loss_and_gradients(model, MATH, recompute)
    assert torch.allclose(loss, expected_loss, rtol=1e-12)
    assert grads.keys() == expected.keys()
    for name, grad in expected.items():
        # The gradient of a bias of keys is zero but for rounding.
        assert torch.allclose(grads[name], grad, rtol=1e-8, atol=1e-12), name


def test_attention_makes_the_gradients_of_all_biases_in_q_k_and_v(monkeypatch):
    """What the projections made too would be there twice."""
    given = []
    attend = layers.packed_attention

    def noted(q, kv, heads, *, bias, kv_bias_2D, **options):
        given.append((bias is not None, kv is None, kv_bias_2D is not None))
        return attend(q, kv, heads, bias=bias, kv_bias_2D=kv_bias_2D, **options)

    monkeypatch.setattr(layers, "packed_attention", noted)
    model = make_model(tiny_config(**SIZES))
    _, expected = loss_and_gradients(model, MATH)
    assert not any(own or cross for own, _, cross in given)
    given.clear()
    _, grads = loss_and_gradients(model, OWN)
    # Self-attention of all rows, which are packed, and of the last block's masked rows; cross-attention.
    assert set(given) == {(True, True, False), (True, False, False), (True, False, True)}
    for name, grad in expected.items():
        assert torch.allclose(grads[name], grad, rtol=1e-8, atol=1e-12), name


def test_under_zero_3_biases_are_left_to_their_own_layers(monkeypatch):
    """ZeRO 3 has a parameter whole in the pass of its own layer only; it marks each with ``ds_id``."""
    given = []
    attend = layers.packed_attention

    def noted(q, kv, heads, *, bias, kv_bias_2D, **options):
        given.append(bias is None and kv_bias_2D is None)
        return attend(q, kv, heads, bias=bias, kv_bias_2D=kv_bias_2D, **options)

    monkeypatch.setattr(layers, "packed_attention", noted)
    model = make_model(tiny_config(**SIZES))
    _, expected = loss_and_gradients(model, MATH)
    given.clear()
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id = number
    _, grads = loss_and_gradients(model, OWN)
    assert given and all(given)
    for name, grad in expected.items():
        assert torch.allclose(grads[name], grad, rtol=1e-8, atol=1e-12), name


def test_what_is_past_the_limits_is_computed_by_another():
    """Heads of 8 and 12: ours would refuse, the model goes on."""
    model = make_model(tiny_config())
    loss, grads = loss_and_gradients(model, AttentionBackend("own", "for a test", otherwise="math"))
    expected_loss, expected = loss_and_gradients(model, MATH)
    assert torch.equal(loss, expected_loss) and all(torch.equal(grads[name], grad) for name, grad in expected.items())
    with pytest.raises(ValueError, match="own attention has limits: its heads have a size of 32, not 8"):
        kernels.attention(*[torch.zeros(1, 4, 3, 8)] * 3, backend=OWN)


def test_separate_queries_keys_and_values_are_taken_too():
    q, k, v = (torch.randn(2, 9, 2, 32, dtype=torch.float64, requires_grad=True) for _ in range(3))
    for backend in (OWN, MATH):
        out = kernels.attention(q, k, v, backend=backend)
        grads = torch.autograd.grad(out.square().sum(), (q, k, v))
        if backend is OWN:
            first = (out, *grads)
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(first, (out, *grads), strict=True))
