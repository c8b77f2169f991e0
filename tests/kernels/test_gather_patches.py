import pytest
import torch

from mirl import kernels
from tests.kernels.support import (
    assert_near,
    channel_statistics,
    normalised_patches,
    places,
    random_images,
    random_masks,
)

# (B, grid height, grid width, K, P, C): one image, one patch kept, all but one kept, 14 x 10 grid, 1 and 5 channels.
SHAPES = [(2, 3, 4, 3, 16, 3), (1, 2, 2, 1, 8, 1), (3, 2, 3, 5, 14, 5), (1, 14, 10, 35, 2, 3), (2, 2, 2, 2, 7, 3)]


@pytest.mark.parametrize("device, dtype", places())
@pytest.mark.parametrize("layout", ["BHWC", "BCHW"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(device, dtype, layout, shape):
    batch, rows, columns, kept, patch, channels = shape
    images = random_images(batch, rows * patch, columns * patch, channels, layout, device)
    keep, _, _ = random_masks(batch, rows * columns, kept, device)
    mean, std = channel_statistics(channels)
    out = kernels.gather_patches(images, keep, patch_size=patch, mean=mean, std=std, layout=layout, dtype=dtype)
    truth = torch.take_along_dim(normalised_patches(images, patch, layout, mean, std), keep.cpu()[..., None], dim=1)
    assert out.dtype == dtype
    assert_near(out, truth, name="pixels")  # one rounding to dtype after two float32 operations


@pytest.mark.parametrize("device, dtype", places())
def test_float_images_are_taken_as_they_are(device, dtype):
    images = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(1)).to(device)
    keep, _, _ = random_masks(2, 6, 2, device)
    out = kernels.gather_patches(images, keep, patch_size=8, layout="BCHW", dtype=dtype)
    truth = torch.take_along_dim(normalised_patches(images, 8, "BCHW", [], []), keep.cpu()[..., None], dim=1)
    assert_near(out, truth, sums=0, name="pixels")  # a copy: only the rounding to dtype


@pytest.mark.parametrize("device, dtype", places())
def test_strided_images(device, dtype):
    """A crop of a larger batch in channels-last memory, named BCHW: nothing in it is contiguous."""
    whole = random_images(2, 40, 40, 3, "BHWC", device)
    images = whole[:, 4:36, 8:40].permute(0, 3, 1, 2)
    keep, _, _ = random_masks(2, 4, 2, device)
    mean, std = channel_statistics(3)
    options = {"patch_size": 16, "mean": mean, "std": std, "layout": "BCHW", "dtype": dtype}
    assert torch.equal(
        kernels.gather_patches(images, keep, **options), kernels.gather_patches(images.contiguous(), keep, **options)
    )


def test_worked_example():
    images = torch.arange(16, dtype=torch.uint8).view(1, 4, 4, 1)
    out = kernels.gather_patches(images, torch.tensor([[1]]), patch_size=2, mean=[0.0], std=[1.0])
    assert torch.allclose(out * 255, torch.tensor([[[2.0, 3, 6, 7]]]), rtol=1e-6)  # two float32 roundings


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("side", [224, 384])
def test_large(side, dtype):
    images = random_images(64, side, side, 3, "BHWC", "cuda")
    patches = (side // 16) ** 2
    keep, _, _ = random_masks(64, patches, patches // 4, "cuda")
    mean, std = channel_statistics(3)
    out = kernels.gather_patches(images, keep, patch_size=16, mean=mean, std=std, dtype=dtype)
    truth = torch.take_along_dim(normalised_patches(images, 16, "BHWC", mean, std), keep.cpu()[..., None], dim=1)
    assert_near(out, truth, name="pixels")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"patch_size": 5}, "patch_size=5"),
        ({"layout": "BWHC"}, "layout is 'BWHC'"),
        ({"mean": None}, "uint8 images need mean and std"),
        ({"std": [1.0]}, "std 1 values"),
        ({"std": [1.0, 0.0, 1.0]}, "above 0"),
        ({"dtype": torch.int32}, "dtype is torch.int32"),
    ],
)
def test_refuses(change, message):
    options = {"patch_size": 16, "mean": [0.5] * 3, "std": [0.2] * 3} | change
    with pytest.raises(ValueError, match=message):
        kernels.gather_patches(torch.zeros(1, 32, 32, 3, dtype=torch.uint8), torch.tensor([[0]]), **options)


def test_refuses_statistics_of_float_images():
    with pytest.raises(ValueError, match="taken as normalised"):
        kernels.gather_patches(torch.zeros(1, 32, 32, 3), torch.tensor([[0]]), patch_size=16, mean=[0.0], std=[1.0])
