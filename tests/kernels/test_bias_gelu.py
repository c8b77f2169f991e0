import pytest
import torch
from torch.nn import functional as F

from mirl import kernels
from mirl.kernels.triton_import import INTERPRETED
from tests.kernels.support import assert_near, leaf, places, randn, unit_roundoff

SHAPES = [((1,), 36), ((2, 3), 5), ((70, 3), 96), ((2, 9), 1536), ((1, 2), 1100)]


@pytest.mark.parametrize("device, dtype", places())
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("leading, features", SHAPES, ids=str)
def test_forward_backward(device, dtype, with_bias, leading, features):
    x, x_64 = leaf(2 * randn(*leading, features, device=device, dtype=dtype, seed=1))
    bias, bias_64 = leaf(randn(features, device=device, dtype=torch.float32, seed=2))
    grad = randn(*leading, features, device=device, dtype=dtype, seed=3)
    out = kernels.bias_gelu(x, bias if with_bias else None)
    truth = F.gelu(x_64 + bias_64 if with_bias else x_64)
    out.backward(grad)
    truth.backward(grad.double().cpu())
    assert out.dtype == dtype
    # Far below 0 the GELU is a difference of nearly equal numbers: relative to the largest value, not to itself.
    assert_near(out, truth, sums=2e-6, name="out")
    # Without a bias, torch's 16-bit CPU GELU rounds intermediate results too: two more roundings of the largest.
    assert_near(x.grad, x_64.grad, sums=2e-6 + 2 * unit_roundoff(dtype), name="dx")
    if with_bias:
        assert_near(bias.grad, bias_64.grad, sums=4e-6, name="dbias")  # float32 sums of up to 210 rows


@pytest.mark.parametrize("device, dtype", places())
def test_extremes(device, dtype):
    """exp(-u^2 / 2) underflows to 0 and erf saturates: the identity and 0 remain, with slopes 1 and 0."""
    x = torch.tensor([[-60000.0, -30.0, 0.0, 30.0, 200.0]], device=device, dtype=dtype, requires_grad=True)
    out = kernels.bias_gelu(x)
    out.sum().backward()
    assert out.tolist() == [[0, 0, 0, 30, 200]]
    # float64 can still hold the slope at -30, about 1e-194.
    assert torch.allclose(x.grad, x.new_tensor([[0, 0, 0.5, 1, 1]]), rtol=0, atol=1e-190)


@pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="the polynomial exists in Triton only")
def test_phi_is_right_to_2e_7():
    x = torch.linspace(-8, 8, 40960, device="cpu" if INTERPRETED else "cuda").view(-1, 256).requires_grad_()
    out = kernels.bias_gelu(x)
    out.sum().backward()
    x_64 = x.detach().double()
    phi_64 = 0.5 * torch.erfc(-x_64 * 0.5**0.5)
    rounding = unit_roundoff(torch.float32) * phi_64  # of the product with x
    assert ((out.detach() / x_64 - phi_64).abs() - rounding).max() < 2e-7
    slope_64 = phi_64 + x_64 * torch.exp(-(x_64**2) / 2) / (2 * torch.pi) ** 0.5
    assert (x.grad - slope_64).abs().max() < 3e-7  # one more float32 rounding of a number up to 1.13


@pytest.mark.parametrize("device, dtype", places())
def test_strided_input(device, dtype):
    x = randn(6, 40, device=device, dtype=dtype, seed=1)[:, ::2]
    bias = randn(20, device=device, dtype=dtype, seed=2)
    assert torch.equal(kernels.bias_gelu(x, bias), kernels.bias_gelu(x.contiguous(), bias))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("features", [1536, 3072])
def test_large(features, dtype):
    x, x_64 = leaf(2 * randn(64, 197, features, device="cuda", dtype=dtype, seed=1))
    bias, bias_64 = leaf(randn(features, device="cuda", dtype=torch.float32, seed=2))
    out, truth = kernels.bias_gelu(x, bias), F.gelu(x_64 + bias_64)
    out.sum().backward()
    truth.sum().backward()
    assert_near(out, truth, sums=2e-6, name="out")
    assert_near(x.grad, x_64.grad, sums=2e-6, name="dx")
    assert_near(bias.grad, bias_64.grad, sums=1e-5, name="dbias")  # float32 sums of 12608 rows


def test_refuses():
    with pytest.raises(ValueError, match="bias_F has shape"):
        kernels.bias_gelu(torch.zeros(2, 8), torch.zeros(7))
    with pytest.raises(ValueError, match="dtype torch.int64"):
        kernels.bias_gelu(torch.zeros(2, 8, dtype=torch.int64))
