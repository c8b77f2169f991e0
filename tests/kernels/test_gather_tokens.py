import pytest
import torch

from mirl import kernels
from tests.kernels.support import assert_near, leaf, places, randn, random_masks

# (B, N, K, D): one sample, one token, all but one, widths that are no power of two, a 14 x 10 grid, wider than a tile.
SHAPES = [(2, 9, 4, 64), (1, 4, 1, 36), (3, 7, 6, 24), (1, 140, 35, 96), (2, 5, 3, 1100), (2, 6, 6, 1)]


def gather_truth(x, ids):
    return torch.stack([torch.stack([x[b, int(n)] for n in ids[b]]) for b in range(len(ids))])


def assemble_truth(x, ids, pos, cls):
    samples = []
    for b in range(len(ids)):
        rows = [cls] + [x[b, k] + pos[int(n)] for k, n in enumerate(ids[b])]
        samples.append(torch.stack(rows))
    return torch.stack(samples)


@pytest.mark.parametrize("device, dtype", places())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gather(device, dtype, shape):
    batch, patches, kept, width = shape
    keep, _, _ = random_masks(batch, patches, kept, device)
    x, x_64 = leaf(randn(batch, patches, width, device=device, dtype=dtype, seed=1))
    grad = randn(batch, kept, width, device=device, dtype=dtype, seed=2)
    out, truth = kernels.gather_tokens(x, keep), gather_truth(x_64, keep)
    out.backward(grad)
    truth.backward(grad.double().cpu())
    # Copies, forward and backward: equal to the last bit.
    assert_near(out, truth, roundings=0, sums=0, name="out")
    assert_near(x.grad, x_64.grad, roundings=0, sums=0, name="dx")


@pytest.mark.parametrize("device, dtype", places())
@pytest.mark.parametrize("use", ["both", "passed", "rows"])
@pytest.mark.parametrize("shape", SHAPES[::2], ids=str)
def test_gather_and_pass_on(device, dtype, shape, use):
    batch, patches, kept, width = shape
    keep, _, _ = random_masks(batch, patches, kept, device)
    x, x_64 = leaf(randn(batch, patches, width, device=device, dtype=dtype, seed=1))
    grads = [randn(batch, rows, width, device=device, dtype=dtype, seed=rows) for rows in (patches, kept)]
    chosen = {"both": [0, 1], "passed": [0], "rows": [1]}[use]
    outputs, truths = kernels.gather_tokens_passing_on(x, keep), (x_64, gather_truth(x_64, keep))
    for output, truth in zip(outputs, truths, strict=True):
        assert_near(output, truth, roundings=0, sums=0)
    torch.autograd.backward([outputs[i] for i in chosen], [grads[i] for i in chosen])
    torch.autograd.backward([truths[i] for i in chosen], [grads[i].double().cpu() for i in chosen])
    assert_near(x.grad, x_64.grad, name="dx")  # one sum, rounded once


@pytest.mark.parametrize("device, dtype", places())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_assemble(device, dtype, shape):
    batch, patches, kept, width = shape
    keep, _, _ = random_masks(batch, patches, kept, device)
    x, x_64 = leaf(randn(batch, kept, width, device=device, dtype=dtype, seed=1))
    pos, pos_64 = leaf(randn(patches, width, device=device, dtype=torch.float32, seed=2))
    cls, cls_64 = leaf(randn(width, device=device, dtype=torch.float32, seed=3))
    grad = randn(batch, 1 + kept, width, device=device, dtype=dtype, seed=4)
    out, truth = kernels.assemble_tokens(x, keep, pos, cls), assemble_truth(x_64, keep, pos_64, cls_64)
    out.backward(grad)
    truth.backward(grad.double().cpu())
    assert_near(out, truth, name="out")  # float32 sum, rounded once
    assert_near(x.grad, x_64.grad, roundings=0, sums=0, name="dx")  # rows of the incoming gradient, as they are
    # Sums over B <= 3 samples. Plain torch keeps the class token's gradient in the token dtype: one rounding an add.
    loose = 0 if dtype in (torch.float32, torch.float64) else 3 * torch.finfo(dtype).eps
    assert_near(pos.grad, pos_64.grad, sums=1e-6 + loose, name="dpos")
    assert_near(cls.grad, cls_64.grad, sums=1e-6 + loose, name="dcls")


@pytest.mark.parametrize("device, dtype", places())
def test_strided_inputs(device, dtype):
    """Tokens without their class token (a slice), transposed tokens, and a gradient that is one value expanded."""
    keep, _, _ = random_masks(2, 6, 3, device)
    base = randn(2, 7, 20, device=device, dtype=dtype, seed=1)
    transposed = randn(2, 20, 6, device=device, dtype=dtype, seed=2).transpose(1, 2)
    for x in (base[:, 1:], transposed):
        assert torch.equal(kernels.gather_tokens(x, keep), kernels.gather_tokens(x.contiguous(), keep))
        strided, plain = x.detach().requires_grad_(), x.detach().contiguous().requires_grad_()
        for tokens in (strided, plain):
            kernels.gather_tokens(tokens, keep).sum().backward()
        assert torch.equal(strided.grad, plain.grad)
        assert strided.grad.sum() == 2 * 3 * 20


def test_class_token_and_positions_in_other_dtypes():
    keep, _, _ = random_masks(2, 6, 3, "cpu")
    x = randn(2, 3, 8, device="cpu", dtype=torch.float16, seed=1)
    pos, cls = (randn(*s, device="cpu", dtype=torch.float32, seed=2) for s in ((6, 8), (8,)))
    assert kernels.assemble_tokens(x, keep, pos, cls).dtype == torch.float16


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch, patches, width", [(64, 196, 384), (64, 196, 768), (16, 576, 1024)])
def test_large(batch, patches, width, dtype):
    keep, _, _ = random_masks(batch, patches, patches // 4, "cuda")
    x = randn(batch, patches, width, device="cuda", dtype=dtype, seed=1).requires_grad_()
    grad = randn(batch, patches // 4, width, device="cuda", dtype=dtype, seed=2)
    out = kernels.gather_tokens(x, keep)
    out.backward(grad)
    index = keep[..., None].expand(-1, -1, width)
    assert torch.equal(out, x.detach().gather(1, index))
    assert torch.equal(x.grad, torch.zeros_like(x).scatter(1, index, grad))


def test_refuses_ids():
    x = torch.zeros(2, 4, 8)
    with pytest.raises(ValueError, match="int64"):
        kernels.gather_tokens(x, torch.zeros(2, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"ids_BK has shape \[3, 2\]"):
        kernels.gather_tokens(x, torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="only 4 to choose from"):
        kernels.gather_tokens(x, torch.zeros(2, 5, dtype=torch.int64))


@pytest.mark.parametrize(
    "ids, message", [([[0, 4]], r"\[0, 4\)"), ([[-1, 2]], r"\[0, 4\)"), ([[2, 2]], "repeats an id in batch row 0")]
)
def test_debug_mode_refuses_ids(ids, message):
    kernels.set_debug(True)
    with pytest.raises(ValueError, match=message):
        kernels.gather_tokens(torch.zeros(1, 4, 8), torch.tensor(ids))
    with pytest.raises(ValueError, match=message):
        kernels.assemble_tokens(torch.zeros(1, 2, 8), torch.tensor(ids), torch.zeros(4, 8), torch.zeros(8))
