import pytest
import torch

from mirl import kernels
from mirl.kernels.triton_import import INTERPRETED
from tests.kernels.support import (
    assert_near,
    channel_statistics,
    leaf,
    normalised_patches,
    places,
    randn,
    random_images,
    random_masks,
    unit_roundoff,
)

# (B, grid height, grid width, M, P, C): one image, one masked, all but one masked, a 14 x 10 grid, 1 and 5 channels.
SHAPES = [(2, 3, 2, 4, 16, 3), (1, 2, 2, 1, 8, 1), (3, 2, 2, 3, 14, 5), (1, 14, 10, 105, 2, 3)]
FUNCTIONS = {"masked": kernels.masked_residual_mse, "full": kernels.masked_residual_mse_full}


def loss_truth(main, residual, patches, ids, norm_pix, weights, full):
    """Sample by sample, patch by patch, in float64 with autograd."""
    terms = []
    for pair in range(len(main)):
        total, count = 0, 0
        for b in range(len(ids)):
            for m, n in enumerate(int(i) for i in ids[b]):
                target = patches[b, n]
                if norm_pix:
                    target = (target - target.mean()) / (target.var(unbiased=True) + 1e-6).sqrt()
                row = n if full else m
                predicted = main[pair][b, row] + (residual[pair][b, row] if residual else 0)
                total, count = total + (predicted - target).square().sum(), count + target.numel()
        terms.append(total / count)
    return sum(w * t for w, t in zip(weights, terms, strict=True)), torch.stack(terms)


def check(device, dtype, shape, *, form="masked", pairs=2, with_residual=True, norm_pix=True, layout="BHWC"):
    batch, grid_rows, grid_columns, masked, patch, channels = shape
    patches = grid_rows * grid_columns
    images = random_images(batch, grid_rows * patch, grid_columns * patch, channels, layout, device)
    _, ids, _ = random_masks(batch, patches, patches - masked, device)
    mean, std = channel_statistics(channels)
    size = (batch, patches if form == "full" else masked, patch * patch * channels)
    main = [leaf(randn(*size, device=device, dtype=dtype, seed=i)) for i in range(pairs)]
    residual = [
        leaf(randn(*size, device=device, dtype=dtype, seed=9 + i)) for i in range(pairs if with_residual else 0)
    ]
    weights = [0.3, 0.5, 0.2][:pairs]
    loss, terms = FUNCTIONS[form](
        [x for x, _ in main], [x for x, _ in residual], images, ids, patch_size=patch, mean=mean, std=std,
        layout=layout, norm_pix=norm_pix, weights=weights,
    )  # fmt: skip
    truth, terms_truth = loss_truth(
        [x for _, x in main], [x for _, x in residual], normalised_patches(images, patch, layout, mean, std), ids.cpu(),
        norm_pix, weights, form == "full",
    )  # fmt: skip
    scale = 2.0**10 if dtype == torch.float16 else 3.0  # as a loss scale would be: small gradients must survive float16
    (loss * scale).backward()
    (truth * scale).backward()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_near(loss, truth, sums=2e-6, name="loss")  # float32 sums of up to 10^4 squares, by halves
    assert_near(terms, terms_truth, sums=2e-6, name="terms")
    for i, (x, x_64) in enumerate(main + residual):
        # Two roundings: the difference as stored, and as scaled in backward; float16 also has subnormals below 6e-5.
        tiny = 6e-8 / float(x_64.grad.abs().max()) if dtype == torch.float16 else 0
        assert_near(x.grad, x_64.grad, roundings=2 + unit_roundoff(dtype), sums=1e-6 + tiny, name=f"gradient {i}")


@pytest.mark.parametrize("device, dtype", places())
@pytest.mark.parametrize("form", ["masked", "full"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(device, dtype, form, shape):
    check(device, dtype, shape, form=form)


@pytest.mark.parametrize("device, dtype", places())
@pytest.mark.parametrize("pairs", [1, 3])
@pytest.mark.parametrize("with_residual", [True, False], ids=["residual", "main_only"])
@pytest.mark.parametrize("norm_pix", [True, False], ids=["norm_pix", "raw"])
def test_options(device, dtype, pairs, with_residual, norm_pix):
    check(device, dtype, (2, 2, 2, 3, 8, 3), pairs=pairs, with_residual=with_residual, norm_pix=norm_pix)


@pytest.mark.parametrize("device, dtype", places())
def test_channels_first(device, dtype):
    check(device, dtype, (2, 2, 2, 3, 8, 3), layout="BCHW")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["masked", "full"])
def test_large(form, dtype):
    check("cuda", dtype, (32, 14, 14, 147, 16, 3), form=form, pairs=3)


@pytest.mark.parametrize("device, dtype", places())
def test_flat_patch_has_a_finite_target(device, dtype):
    """A patch of one colour has variance 0: the target is 0, not 0 / 0."""
    images = torch.full((1, 16, 16, 3), 77, dtype=torch.uint8, device=device)
    main = torch.zeros(1, 2, 192, device=device, dtype=dtype, requires_grad=True)
    ids = torch.tensor([[0, 3]], device=device)
    loss, _ = kernels.masked_residual_mse([main], [], images, ids, patch_size=8, mean=[0.5] * 3, std=[0.25] * 3)
    loss.backward()
    # (x - mean) of equal float32 values is an ulp at most, divided by sqrt(1e-6): squared, below 1e-6.
    assert 0 <= loss.item() < 1e-6
    assert main.grad.isfinite().all()


@pytest.mark.parametrize("device, dtype", places())
def test_predictions_without_their_class_token(device, dtype):
    """Slices [:, 1:] are read in place, mixed strides are copied: both give what contiguous predictions give."""
    images = random_images(2, 16, 16, 3, "BHWC", device)
    _, ids, _ = random_masks(2, 4, 1, device)
    options = {"patch_size": 8, "mean": [0.5] * 3, "std": [0.25] * 3}
    whole = [randn(2, 4, 192, device=device, dtype=dtype, seed=i) for i in range(2)]
    sliced = [x[:, 1:] for x in whole]
    mixed = [sliced[0], sliced[1].transpose(1, 2).contiguous().transpose(1, 2)]
    expected, _ = kernels.masked_residual_mse(
        [sliced[0].contiguous()], [sliced[1].contiguous()], images, ids, **options
    )
    for main, residual in (sliced, mixed):
        assert torch.equal(kernels.masked_residual_mse([main], [residual], images, ids, **options)[0], expected)


@pytest.mark.parametrize("device, dtype", places())
def test_nothing_is_kept_without_gradients(device, dtype):
    images = random_images(1, 16, 16, 3, "BHWC", device)
    main = randn(1, 3, 192, device=device, dtype=dtype, seed=1).requires_grad_()
    ids = torch.tensor([[0, 1, 2]], device=device)
    options = {"patch_size": 8, "mean": [0.5] * 3, "std": [0.25] * 3}
    with torch.no_grad():
        loss, terms = kernels.masked_residual_mse([main], [], images, ids, **options)
    assert not loss.requires_grad and not terms.requires_grad
    with_gradients, terms = kernels.masked_residual_mse([main], [], images, ids, **options)
    assert with_gradients.requires_grad and not terms.requires_grad
    assert torch.equal(loss, with_gradients)


@pytest.mark.skipif(not INTERPRETED, reason="in-place gradients are those of the Triton kernels")
def test_second_backward_is_refused():
    images = random_images(1, 16, 16, 3, "BHWC", "cpu")
    main = randn(1, 3, 192, device="cpu", dtype=torch.float32, seed=1).requires_grad_()
    loss, _ = kernels.masked_residual_mse(
        [main], [], images, torch.tensor([[0, 1, 2]]), patch_size=8, mean=[0.5] * 3, std=[0.25] * 3
    )
    loss.backward(torch.tensor(2.0), retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("pairs", [1, 2])
@pytest.mark.parametrize("residuals", [True, False])
def test_normalised_images_have_gradients(pairs, residuals):
    """They come without mean and std: as data of 16 bits do, and in the objectives that split frequencies."""
    images = randn(1, 1, 1, 2, device="cpu", dtype=torch.float32, seed=3)
    main = [torch.full((1, 2, 1), 1.0 + i, requires_grad=True) for i in range(pairs)]
    residual = [torch.full((1, 2, 1), 0.5, requires_grad=True) for _ in range(pairs * residuals)]
    loss, _ = kernels.masked_residual_mse(
        main, residual, images, torch.tensor([[0, 1]]), patch_size=1, layout="BCHW", norm_pix=False
    )
    loss.backward()
    for i, prediction in enumerate(main):
        # of (1 / pairs) * mean((main + residual - pixel)^2)
        expected = (1.0 + i + 0.5 * residuals - images.flatten()) / pairs
        torch.testing.assert_close(prediction.grad.flatten(), expected)
    for one, other in zip(residual, main, strict=False):
        assert torch.equal(one.grad, other.grad)


def test_worked_example():
    images = torch.full((1, 1, 1, 1), 3, dtype=torch.uint8)
    main, residual = (torch.full((1, 1, 1), value, requires_grad=True) for value in (1.0, 4.0))
    loss, terms = kernels.masked_residual_mse(
        [main], [residual], images, torch.tensor([[0]]), patch_size=1, mean=[0.0], std=[1 / 255], norm_pix=False
    )
    loss.backward()
    assert [loss.item(), terms.item(), main.grad.item(), residual.grad.item()] == pytest.approx([4, 4, 4, 4], rel=1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"main": []}, "main is empty"),
        ({"residual": [torch.zeros(1, 2, 192)] * 2}, "residual has 2 predictions"),
        ({"weights": [1.0, 1.0]}, "weights has 2 values"),
        ({"main": [torch.zeros(1, 3, 192)]}, r"main\[0\] has shape"),
        ({"residual": [torch.zeros(1, 2, 192).half()]}, "cast one of them"),
        ({"ids_masked_BM": torch.zeros(1, 0, dtype=torch.int64)}, "ids_masked_BM is empty"),
        ({"patch_size": 5}, "patch_size=5"),
    ],
)
def test_refuses(change, message):
    arguments = {
        "main": [torch.zeros(1, 2, 192)],
        "residual": [],
        "images": torch.zeros(1, 16, 16, 3, dtype=torch.uint8),
        "ids_masked_BM": torch.tensor([[0, 1]]),
        "patch_size": 8,
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
    }
    with pytest.raises(ValueError, match=message):
        kernels.masked_residual_mse(**(arguments | change))


def test_debug_mode_refuses_ids():
    kernels.set_debug(True)
    images = torch.zeros(1, 16, 16, 3, dtype=torch.uint8)
    for ids, message in (([[0, 4]], r"\[0, 4\)"), ([[1, 1]], "repeats an id")):
        with pytest.raises(ValueError, match=message):
            kernels.masked_residual_mse(
                [torch.zeros(1, 2, 192)], [], images, torch.tensor(ids), patch_size=8, mean=[0.5] * 3, std=[0.25] * 3
            )
