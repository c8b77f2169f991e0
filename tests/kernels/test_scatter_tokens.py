import pytest
import torch

from mirl import kernels
from tests.kernels.support import assert_near, leaf, places, randn, random_masks, unit_roundoff

# (B, N, K, E): one sample, one visible, all but one visible, odd widths, a 14 x 10 grid, more samples than programs.
SHAPES = [(2, 9, 4, 64), (1, 4, 1, 36), (3, 7, 6, 24), (1, 140, 35, 96), (40, 3, 1, 8), (2, 6, 2, 1100)]


def scatter_truth(x, keep, fill, pos, patches):
    """Row by row, from ids_keep alone."""
    samples = []
    for b in range(len(keep)):
        place = {int(n): k for k, n in enumerate(keep[b])}
        rows = [x[b, 0]]
        for n in range(patches):
            rows.append(x[b, 1 + place[n]] if n in place else (fill if fill.dim() == 1 else fill[n]))
        samples.append(torch.stack(rows))
    return torch.stack(samples) + (0 if pos is None else pos)


@pytest.mark.parametrize("device, dtype", places())
@pytest.mark.parametrize("fill_kind", ["token", "table"])
@pytest.mark.parametrize("with_pos", [True, False], ids=["pos", "no_pos"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_backward(device, dtype, fill_kind, with_pos, shape):
    batch, patches, kept, width = shape
    keep, _, restore = random_masks(batch, patches, kept, device)
    x, x_64 = leaf(randn(batch, 1 + kept, width, device=device, dtype=dtype, seed=1))
    fill_shape = (width,) if fill_kind == "token" else (patches, width)
    fill, fill_64 = leaf(randn(*fill_shape, device=device, dtype=torch.float32, seed=2))
    pos, pos_64 = leaf(randn(1 + patches, width, device=device, dtype=torch.float32, seed=3))
    grad = randn(batch, 1 + patches, width, device=device, dtype=dtype, seed=4)
    out = kernels.scatter_tokens(x, keep, restore, fill, pos if with_pos else None)
    truth = scatter_truth(x_64, keep, fill_64, pos_64 if with_pos else None, patches)
    out.backward(grad)
    truth.backward(grad.double().cpu())
    assert_near(out, truth, name="out")  # one float32 add, rounded once
    assert_near(x.grad, x_64.grad, roundings=0, sums=0, name="dx")  # rows of the incoming gradient, as they are
    assert_near(fill.grad, fill_64.grad, sums=2e-6, name="dfill")  # float32 sums of up to 120 rows of order 1
    if with_pos:
        # Plain torch adds the B rows of a position in the output's dtype or better.
        assert_near(pos.grad, pos_64.grad, sums=1e-6 + 2 * unit_roundoff(dtype), name="dpos")


@pytest.mark.parametrize("device, dtype", places())
def test_strided_inputs(device, dtype):
    keep, _, restore = random_masks(2, 6, 3, device)
    x = randn(2, 5, 20, device=device, dtype=dtype, seed=1)[:, 1:]
    transposed = randn(2, 20, 4, device=device, dtype=dtype, seed=2).transpose(1, 2)
    fill = randn(20, 2, device=device, dtype=dtype, seed=3)[:, 0]
    for tokens in (x, transposed):
        strided, plain = tokens.detach().requires_grad_(), tokens.detach().contiguous().requires_grad_()
        outs = [kernels.scatter_tokens(t, keep, restore, fill) for t in (strided, plain)]
        assert torch.equal(*outs)
        for out in outs:
            out.sum().backward()
        assert torch.equal(strided.grad, plain.grad)
        assert strided.grad.sum() == strided.numel()


@pytest.mark.parametrize("device, dtype", places())
def test_without_gradient_of_the_fill(device, dtype):
    keep, _, restore = random_masks(2, 6, 3, device)
    x = randn(2, 4, 16, device=device, dtype=dtype, seed=1).requires_grad_()
    grad = randn(2, 7, 16, device=device, dtype=dtype, seed=2)
    kernels.scatter_tokens(x, keep, restore, torch.zeros(16, device=device)).backward(grad)
    rows = torch.cat([torch.zeros_like(keep[:, :1]), keep + 1], dim=1)
    assert torch.equal(x.grad, torch.take_along_dim(grad, rows[..., None], dim=1))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch, patches, width", [(64, 196, 384), (256, 196, 512), (16, 576, 512)])
def test_large(batch, patches, width, dtype):
    kept = patches // 4
    keep, masked, restore = random_masks(batch, patches, kept, "cuda")
    x = randn(batch, 1 + kept, width, device="cuda", dtype=dtype, seed=1).requires_grad_()
    fill = randn(width, device="cuda", dtype=torch.float32, seed=2).requires_grad_()
    pos = randn(1 + patches, width, device="cuda", dtype=torch.float32, seed=3)
    grad = randn(batch, 1 + patches, width, device="cuda", dtype=dtype, seed=4)
    out = kernels.scatter_tokens(x, keep, restore, fill, pos)
    out.backward(grad)
    everything = torch.cat([x[:, 1:].double(), fill.double().expand(batch, patches - kept, -1)], dim=1)
    truth = torch.cat([x[:, :1].double(), torch.take_along_dim(everything, restore[..., None], 1)], dim=1) + pos
    masked_grad = torch.take_along_dim(grad[:, 1:], masked[..., None], dim=1)
    assert_near(out, truth, name="out")
    assert_near(fill.grad, masked_grad.double().sum((0, 1)), sums=1e-5, name="dfill")  # float32 sum of 37632 rows


def test_debug_mode_refuses_ids():
    kernels.set_debug(True)
    x, fill = torch.zeros(1, 3, 8), torch.zeros(8)
    with pytest.raises(ValueError, match="ids_keep_BK repeats"):
        kernels.scatter_tokens(x, torch.tensor([[1, 1]]), torch.tensor([[0, 1, 2]]), fill)
    with pytest.raises(ValueError, match=r"ids_restore_BN holds ids from 0 to 3"):
        kernels.scatter_tokens(x, torch.tensor([[0, 1]]), torch.tensor([[0, 1, 3]]), fill)
    with pytest.raises(ValueError, match="at odds with ids_keep_BK"):
        kernels.scatter_tokens(x, torch.tensor([[0, 1]]), torch.tensor([[1, 0, 2]]), fill)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"fill": torch.zeros(7)}, "fill has shape"),
        ({"fill": torch.zeros(2, 8)}, r"\[N, E\]"),
        ({"pos_1NE": torch.zeros(3, 8)}, r"\[1\+N, E\]"),
        ({"ids_keep_BK": torch.tensor([[0]])}, r"\[B, K\]"),
        ({"x_B1KE": torch.zeros(1, 3, 8, dtype=torch.int64)}, "dtype torch.int64"),
    ],
)
def test_refuses(change, message):
    arguments = {
        "x_B1KE": torch.zeros(1, 3, 8),
        "ids_keep_BK": torch.tensor([[0, 1]]),
        "ids_restore_BN": torch.tensor([[0, 1, 2]]),
        "fill": torch.zeros(8),
    }
    with pytest.raises(ValueError, match=message):
        kernels.scatter_tokens(**(arguments | change))
