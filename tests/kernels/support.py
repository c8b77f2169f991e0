"""What the kernel tests share: where they run, float64 truth by plain loops, and errors measured against it.

The same test files run in up to three ways: CPU tensors through plain torch (this process), CPU tensors through the
interpreted Triton kernels (the process that test_interpreted.py starts), GPU tensors through the compiled kernels.
"""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from mirl.kernels.triton_import import INTERPRETED

# The interpreter's bfloat16 arithmetic is wrong, so bfloat16 kernels are tested on a GPU; float64 is plain torch's.
CPU_DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.bfloat16, torch.float64)
GPU_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def places() -> list:
    """(device, dtype) of every way this process can run the ops; GPU entries are skipped, with a reason, without it."""
    cpu = [pytest.param("cpu", dtype, id=f"cpu-{_name(dtype)}") for dtype in CPU_DTYPES]
    gpu = [pytest.param("cuda", dtype, id=f"cuda-{_name(dtype)}", marks=pytest.mark.gpu) for dtype in GPU_DTYPES]
    return cpu if INTERPRETED else cpu + gpu


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def assert_near(
    actual: Tensor, truth: Tensor, *, roundings: float = 1, sums: float = 1e-6, size: float = 0, name: str = ""
) -> None:
    """|actual - truth| <= roundings * u * |truth| + sums * max |truth|, elementwise, u the unit roundoff of the dtype.

    `roundings`: how often a value on the way is rounded to actual's dtype. `sums`: float32 arithmetic before that,
    relative to the largest value, or to `size` where terms of that size cancel; 1e-6 is 16 float32 roundings, more than
    a chain of a few adds and multiplies makes. For float64 the same limits hold with room: that path is exact to 1e-15.
    NaN fails: it means an element nobody wrote.
    """
    assert actual.shape == truth.shape, f"{name} has shape {list(actual.shape)}, not {list(truth.shape)}"
    truth = truth.detach().double().cpu()
    actual_64 = actual.detach().double().cpu()
    assert not actual_64.isnan().any(), f"{name}: {int(actual_64.isnan().sum())} elements are NaN (unwritten?)"
    limit = 1.01 * roundings * unit_roundoff(actual.dtype) * truth.abs() + sums * max(size, float(truth.abs().max()))
    excess = (actual_64 - truth).abs() - limit
    assert (excess <= 0).all(), f"{name}: off by up to {float((actual_64 - truth).abs().max()):.3e} beyond the limit"


def random_masks(batch: int, patches: int, kept: int, device: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """ids_keep [B, K], ids_masked [B, M] (sorted), ids_restore [B, N]."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(batch, patches, generator=generator).argsort(dim=1)
    keep, masked = order[:, :kept].sort(dim=1).values, order[:, kept:].sort(dim=1).values
    restore = torch.cat([keep, masked], dim=1).argsort(dim=1)
    return keep.to(device), masked.to(device), restore.to(device)


def random_images(
    batch: int, height: int, width: int, channels: int, layout: str, device: str, seed: int = 0
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (batch, height, width, channels), dtype=torch.uint8, generator=generator).to(device)
    return images if layout == "BHWC" else images.permute(0, 3, 1, 2).contiguous()


def channel_statistics(channels: int) -> tuple[list[float], list[float]]:
    return [0.3 + 0.05 * c for c in range(channels)], [0.2 + 0.03 * c for c in range(channels)]


def normalised_patches(images: Tensor, patch: int, layout: str, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """All patches [B, N, Q] in float64, by four loops: the definition, written to be read and not to be fast."""
    images = (images if layout == "BHWC" else images.permute(0, 2, 3, 1)).double().cpu()
    if len(mean):
        images = (images / 255 - torch.tensor(mean).double()) / torch.tensor(std).double()
    batch, height, width, _ = images.shape
    samples = []
    for b in range(batch):
        rows = []
        for top in range(0, height, patch):
            for left in range(0, width, patch):
                rows.append(images[b, top : top + patch, left : left + patch, :].reshape(-1))
        samples.append(torch.stack(rows))
    return torch.stack(samples)


def leaf(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A leaf with the tensor's values, and a float64 CPU leaf with the same (rounded) values."""
    return tensor.detach().clone().requires_grad_(), tensor.detach().double().cpu().requires_grad_()


def randn(*shape: int, device: str, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)
