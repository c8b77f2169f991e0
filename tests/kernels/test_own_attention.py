"""Short and decoder attention against float64: results and every gradient, at lengths that fill no tile."""

import pytest
import torch

from mirl import kernels
from mirl.kernels.dispatch import uses_triton
from tests.kernels.support import assert_near, leaf, places, randn, unit_roundoff

# On a GPU they are for 16-bit products: in float32 a tile does not fit into the registers.
PLACES = [place for place in places() if place.values != ("cuda", torch.float32)]


def truth(q, k, v, heads):
    q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))
    weights = torch.einsum("bshd,bthd->bhst", q, k).div(q.shape[-1] ** 0.5).softmax(-1)
    return torch.einsum("bhst,bthd->bshd", weights, v).flatten(2)


def loose(dtype):
    """Weights, output and the gradient of scores are rounded to the dtype before the next product."""
    return 4e-6 + 12 * unit_roundoff(dtype)


def compare(out, expected, pairs, grad, dtype):
    out.backward(grad)
    expected.backward(grad.double().cpu())
    assert_near(out, expected, sums=loose(dtype), name="out")
    for name, (x, x_64) in pairs.items():
        assert_near(x.grad, x_64.grad, sums=2 * loose(dtype), size=0.1, name=name)


@pytest.mark.parametrize("device, dtype", PLACES)
@pytest.mark.parametrize("tokens, heads, size", [(50, 2, 32), (7, 3, 64), (64, 1, 64), (1, 2, 32)])
def test_short_attention(device, dtype, tokens, heads, size):
    qkv, qkv_64 = leaf(randn(2, tokens, 3 * heads * size, device=device, dtype=dtype, seed=1))
    grad = randn(2, tokens, heads * size, device=device, dtype=dtype, seed=2)
    expected = truth(*qkv_64.chunk(3, dim=-1), heads)
    compare(kernels.short_attention(qkv, heads), expected, {"dqkv": (qkv, qkv_64)}, grad, dtype)


@pytest.mark.parametrize("device, dtype", PLACES)
@pytest.mark.parametrize("bias_dtype", [None, torch.float32], ids=["same", "float32"])
def test_short_attention_sums_the_gradient_of_the_bias(device, dtype, bias_dtype):
    """What a Linear before it would sum, up to the order of the additions."""
    heads, width = 2, 64
    x, weight = (randn(*shape, device=device, dtype=dtype, seed=3) for shape in ((3, 13, 5), (3 * width, 5)))
    bias = randn(3 * width, device=device, dtype=bias_dtype or dtype, seed=4).requires_grad_()
    grad = randn(3, 13, width, device=device, dtype=dtype, seed=5)
    qkv = (torch.nn.functional.linear(x, weight, bias.detach().to(dtype))).requires_grad_()
    kernels.short_attention(qkv, heads, bias).backward(grad)
    assert bias.grad.dtype == bias.dtype
    # Gradients of k cancel over the keys, so what their sum is measured by is the size of its terms.
    rounded = qkv.grad.double().cpu()
    assert_near(bias.grad, rounded.sum((0, 1)), size=float(rounded.abs().sum((0, 1)).max()))
    (alone,) = torch.autograd.grad(kernels.short_attention(qkv, heads), qkv, grad)
    assert torch.equal(alone, qkv.grad)


@pytest.mark.parametrize("device, dtype", PLACES)
@pytest.mark.parametrize("queries, keys", [(70, 50), (9, 130), (197, 66), (64, 64), (1, 1)])
def test_decoder_attention(device, dtype, queries, keys):
    heads, width = 2, 64
    q, q_64 = leaf(randn(2, queries, width, device=device, dtype=dtype, seed=1))
    # Tokens first, as the prefixes of the densely connected inputs lie.
    buffer, buffer_64 = leaf(randn(keys + 3, 2, 2 * width, device=device, dtype=dtype, seed=2))
    kv, kv_64 = (x[:keys].transpose(0, 1) for x in (buffer, buffer_64))
    grad = randn(2, queries, width, device=device, dtype=dtype, seed=3)
    expected = truth(q_64, *kv_64.chunk(2, dim=-1), heads)
    pairs = {"dq": (q, q_64), "dkv": (buffer, buffer_64)}
    out = kernels.decoder_attention(q, kv, heads)
    if uses_triton(q):
        (laid,) = torch.autograd.grad(out, kv, grad, retain_graph=True)
        assert laid.stride() == kv.stride(), "a copy would have to bring the tokens first again"
    compare(out, expected, pairs, grad, dtype)


@pytest.mark.parametrize("device, dtype", PLACES)
@pytest.mark.parametrize("tokens", [67, 193])
def test_packed_decoder_attention(device, dtype, tokens):
    heads, width = 1, 32
    qkv, qkv_64 = leaf(randn(2, tokens, 3 * width, device=device, dtype=dtype, seed=1))
    grad = randn(2, width, tokens, device=device, dtype=dtype, seed=2).transpose(1, 2)
    expected = truth(*qkv_64.chunk(3, dim=-1), heads)
    compare(kernels.decoder_attention(qkv, None, heads), expected, {"dqkv": (qkv, qkv_64)}, grad, dtype)


@pytest.mark.parametrize("device, dtype", PLACES)
@pytest.mark.parametrize("queries, bias_dtype", [(None, torch.float32), (9, torch.float32), (197, None)])
def test_decoder_attention_makes_the_gradients_of_biases(device, dtype, queries, bias_dtype):
    """Of one bias for all, and of one for the queries beside one for the rest; the other gradients keep their bits."""
    heads, width, keys = 1, 32, 67
    rows = queries or keys
    q = leaf(randn(2, rows, width if queries else 3 * width, device=device, dtype=dtype, seed=1))[0]
    kv = leaf(randn(2, keys, 2 * width, device=device, dtype=dtype, seed=2))[0] if queries else None
    bias = randn(3 * width, device=device, dtype=torch.float32, seed=4)
    grad = randn(2, rows, width, device=device, dtype=dtype, seed=3)
    inputs = [q] if kv is None else [q, kv]
    alone = torch.autograd.grad(kernels.decoder_attention(q, kv, heads), inputs, grad)
    # A zero that is added to all rows before the product, in float64.
    zero_64 = torch.zeros(3 * width, dtype=torch.float64, requires_grad=True)
    parts = [x.detach().double().cpu() for x in inputs]
    q_64, k_64, v_64 = parts[0].chunk(3, -1) if kv is None else (parts[0], *parts[1].chunk(2, -1))
    shifted = (x + zero for x, zero in zip((q_64, k_64, v_64), zero_64.chunk(3), strict=True))
    truth(*shifted, heads).backward(grad.double().cpu())
    size = sum(float(g.double().abs().sum((0, 1)).max()) for g in alone) / 3
    for split in [[3 * width], [width, 2 * width]][: len(inputs)]:
        # Under autocast they may differ: that of keys and values comes out of a product.
        dtypes = [bias_dtype or dtype, dtype]
        biases = [b.to(t).requires_grad_() for b, t in zip(bias.split(split), dtypes, strict=False)]
        out = kernels.decoder_attention(q, kv, heads, *biases)
        found = torch.autograd.grad(out, [*inputs, *biases], grad)
        assert all(torch.equal(a, b) for a, b in zip(alone, found, strict=False))
        assert [x.dtype for x in found[len(inputs) :]] == [x.dtype for x in biases]
        summed = torch.cat(found[len(inputs) :])
        # Those of k cancel over the keys: what a sum is measured by is the size of its terms.
        assert_near(summed, zero_64.grad, sums=loose(dtype), size=size)


@pytest.mark.parametrize("device, dtype", PLACES)
@pytest.mark.parametrize("sign", [1, -1])
def test_scores_far_from_zero_stay_finite(device, dtype, sign):
    """Scores of +-350: their exponentials overflow float32, and zeros stand where there is no key."""
    q = torch.full((1, 3, 32), 8.0, device=device, dtype=dtype)
    kv = torch.cat([sign * q, q / 8], dim=-1).requires_grad_()
    out = kernels.decoder_attention(q.requires_grad_(), kv, 1)
    qkv = torch.cat([q.detach(), kv.detach()], dim=-1).requires_grad_()
    for value, name in ((out, "decoder"), (kernels.short_attention(qkv, 1), "short")):
        assert_near(value, torch.ones(1, 3, 32), roundings=2, name=name)
        value.sum().backward()
    # Zero but for a rounding of weights of a third, times 32, times a key.
    assert q.grad.abs().max() < 0.2 and qkv.grad[..., :64].abs().max() < 0.2
    assert_near(kv.grad[..., 32:], torch.ones(1, 3, 32), roundings=2)
    assert_near(qkv.grad[..., 64:], torch.ones(1, 3, 32), roundings=2)


def test_refuses():
    x = torch.zeros(2, 65, 192)
    with pytest.raises(ValueError, match="1 to 64 tokens, not 65"):
        kernels.short_attention(x, 1)
    with pytest.raises(ValueError, match="32 or 64, not 16"):
        kernels.short_attention(x[:, :5], 4)
    with pytest.raises(ValueError, match="heads is 7"):
        kernels.short_attention(x[:, :5], 7)
    with pytest.raises(ValueError, match=r"bias_3D has shape \[64\]"):
        kernels.short_attention(x[:, :5], 1, x[0, 0, :64])
    q, kv = torch.zeros(1, 5, 32), torch.zeros(1, 5, 64)
    with pytest.raises(ValueError, match=r"bias has shape \[64\]"):
        kernels.decoder_attention(q, kv, 1, kv[0, 0])
    with pytest.raises(ValueError, match=r"kv_bias_2D has shape \[32\]"):
        kernels.decoder_attention(q, kv, 1, q[0, 0], q[0, 0])
    with pytest.raises(ValueError, match="the bias of the queries; give both"):
        kernels.decoder_attention(q, kv, 1, None, kv[0, 0])
    with pytest.raises(ValueError, match="a size of 32, not 64"):
        kernels.decoder_attention(x, None, 1)
    with pytest.raises(ValueError, match="1 to 256 queries, not 257"):
        kernels.decoder_attention(torch.zeros(1, 257, 32), torch.zeros(1, 5, 64), 1)
    with pytest.raises(ValueError, match="1 to 320 keys, not 321"):
        kernels.decoder_attention(torch.zeros(1, 5, 32), torch.zeros(1, 321, 64), 1)
    with pytest.raises(ValueError, match="kv_BT2D has shape"):
        kernels.decoder_attention(torch.zeros(1, 5, 32), torch.zeros(1, 5, 32), 1)
    with pytest.raises(ValueError, match="cast one of them"):
        kernels.decoder_attention(torch.zeros(1, 5, 32), torch.zeros(1, 5, 64).half(), 1)
    with pytest.raises(ValueError, match="heads is 3"):
        kernels.decoder_attention(torch.zeros(1, 5, 32), torch.zeros(1, 5, 64), 3)
