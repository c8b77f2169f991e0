import pytest
import torch
from torch.nn import functional as F

from mirl import kernels
from mirl.kernels.column_sum import column_sum
from mirl.kernels.triton_import import INTERPRETED
from tests.kernels.support import assert_near, leaf, places, randn, unit_roundoff

# Leading axes and D: one row, odd widths, the widths of S, E and B, more rows than two programs hold at once.
SHAPES = [((1,), 36), ((2, 3), 5), ((2, 9), 384), ((3, 7), 512), ((2, 5), 768), ((67,), 96), ((1, 2), 1100)]


def check(
    device, dtype, leading, width, with_delta=True, use="both", params=torch.float32, sums=4e-6, with_delta_bias=False
):
    x, x_64 = leaf(randn(*leading, width, device=device, dtype=dtype, seed=1) * 3 + 1)
    delta, delta_64 = leaf(randn(*leading, width, device=device, dtype=dtype, seed=2))
    weight, weight_64 = leaf(randn(width, device=device, dtype=params, seed=3))
    bias, bias_64 = leaf(randn(width, device=device, dtype=params, seed=4))
    delta_bias, delta_bias_64 = leaf(randn(width, device=device, dtype=params, seed=7))
    total, normed = kernels.residual_layer_norm(
        x, delta if with_delta else None, weight, bias, 1e-6, delta_bias if with_delta_bias else None
    )
    assert total.dtype == normed.dtype == dtype
    # The norm is that of the total as it was rounded: the truth starts from those values.
    exact = (x_64 + delta_64) if with_delta else x_64
    exact = exact + delta_bias_64 if with_delta_bias else exact
    rounded = exact + (total.detach().double().cpu() - exact).detach()
    normed_truth = F.layer_norm(rounded, (width,), weight_64, bias_64, 1e-6)
    grad_total, grad_normed = (randn(*leading, width, device=device, dtype=dtype, seed=s) for s in (5, 6))
    outputs = {"both": (total, normed), "total": (total,), "normed": (normed,)}[use]
    grads = {"both": (grad_total, grad_normed), "total": (grad_total,), "normed": (grad_normed,)}[use]
    truths = {"both": (rounded, normed_truth), "total": (rounded,), "normed": (normed_truth,)}[use]
    torch.autograd.backward(outputs, grads)
    torch.autograd.backward(truths, [g.double().cpu() for g in grads])
    # Plain torch rounds delta + bias by itself, which can be larger than the total.
    assert_near(total, exact, name="total", sums=1e-6 + (unit_roundoff(dtype) if with_delta_bias else 0))
    assert_near(normed, normed_truth, sums=sums, name="normed")
    # Plain torch rounds the norm's own gradient to the dtype before it adds the residual's: relative to the largest.
    loose = sums + 3 * unit_roundoff(dtype)
    assert_near(x.grad, x_64.grad, sums=loose, name="dx")
    if with_delta:
        assert_near(delta.grad, delta_64.grad, sums=loose, name="ddelta")
    if with_delta_bias:
        # The kernel sums what it has not rounded yet; plain torch sums rows of rounded gradients.
        rows = 0 if INTERPRETED or device == "cuda" else total.numel() // width
        assert_near(delta_bias.grad, delta_bias_64.grad, sums=sums + rows * unit_roundoff(dtype), name="ddelta_bias")
    if use != "total":
        assert_near(weight.grad, weight_64.grad, sums=sums, name="dweight")
        assert_near(bias.grad, bias_64.grad, sums=sums, name="dbias")


@pytest.mark.parametrize("device, dtype", places())
@pytest.mark.parametrize("with_delta", [True, False], ids=["residual", "norm_only"])
@pytest.mark.parametrize("leading, width", SHAPES, ids=str)
def test_forward_backward(device, dtype, with_delta, leading, width):
    check(device, dtype, leading, width, with_delta)  # 4e-6: float32 means over up to 1100 columns or 67 rows


@pytest.mark.parametrize("device, dtype", places())
@pytest.mark.parametrize("leading, width", SHAPES[::2], ids=str)
def test_bias_of_the_delta(device, dtype, leading, width):
    check(device, dtype, leading, width, with_delta_bias=True)


@pytest.mark.parametrize("device, dtype", places())
@pytest.mark.parametrize("use", ["total", "normed"])
def test_bias_of_the_delta_with_one_output_unused(device, dtype, use):
    check(device, dtype, (2, 9), 48, use=use, with_delta_bias=True)


@pytest.mark.parametrize("device, dtype", places())
@pytest.mark.parametrize("use", ["total", "normed"])
def test_one_output_unused(device, dtype, use):
    check(device, dtype, (2, 9), 48, use=use)


@pytest.mark.parametrize("device, dtype", places())
def test_strided_and_expanded_inputs(device, dtype):
    x = randn(2, 7, 20, device=device, dtype=dtype, seed=1)[:, 1:]
    delta = randn(2, 20, 6, device=device, dtype=dtype, seed=2).transpose(1, 2)
    weight, bias = (randn(20, device=device, dtype=torch.float32, seed=s) for s in (3, 4))
    strided = [t.detach().requires_grad_() for t in (x, delta)]
    plain = [t.detach().contiguous().requires_grad_() for t in (x, delta)]
    for tensors in (strided, plain):
        torch.stack(kernels.residual_layer_norm(*tensors, weight, bias)).sum().backward()
    for a, b in zip(strided, plain, strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("device, dtype", places())
def test_constant_row(device, dtype):
    """Variance 0: the norm is the bias, and nothing is infinite."""
    x = torch.full((3, 32), 5.0, device=device, dtype=dtype, requires_grad=True)
    weight, bias = torch.ones(32, device=device), torch.full((32,), 0.25, device=device)
    _, normed = kernels.residual_layer_norm(x, None, weight, bias)
    normed.square().sum().backward()
    assert torch.equal(normed, torch.full_like(normed, 0.25))
    assert x.grad.isfinite().all()


def test_worked_example():
    total, normed = kernels.residual_layer_norm(
        torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]), torch.ones(2), torch.zeros(2)
    )
    assert total.tolist() == [2, 4]
    assert normed.tolist() == pytest.approx([-1, 1], rel=1e-5)  # 1 / sqrt(1 + 1e-6)


@pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="the second stage exists in Triton only")
@pytest.mark.parametrize("rows, columns", [(1, 1), (129, 33), (260, 64), (7, 500)])
def test_column_sum(rows, columns):
    device = "cpu" if INTERPRETED else "cuda"
    partial = randn(2, rows, columns, device=device, dtype=torch.float32, seed=1)
    # 2e-6: a float32 sum of 260 numbers by halves.
    assert_near(column_sum(partial, torch.float32), partial.double().sum(1), sums=2e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [384, 512, 768, 1024])
def test_large(width, dtype):
    check("cuda", dtype, (64, 197), width, sums=2e-5)  # float32 sums of 12608 rows


def test_refuses():
    x, ones = torch.zeros(2, 8), torch.ones(8)
    with pytest.raises(ValueError, match="delta has shape"):
        kernels.residual_layer_norm(x, torch.zeros(1, 8), ones, ones)
    with pytest.raises(ValueError, match="delta has dtype"):
        kernels.residual_layer_norm(x, x.half(), ones, ones)
    with pytest.raises(ValueError, match="delta_bias_D has shape"):
        kernels.residual_layer_norm(x, x, ones, ones, delta_bias_D=torch.ones(7))
    with pytest.raises(ValueError, match="delta is None: give both"):
        kernels.residual_layer_norm(x, None, ones, ones, delta_bias_D=ones)
    with pytest.raises(ValueError, match="weight_D has shape"):
        kernels.residual_layer_norm(x, None, torch.ones(7), ones)
