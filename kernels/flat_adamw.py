"""Take an AdamW step over flat buffers in one pass: gradient in, fp32 weights and both moments updated, weights out.

Letters: N values of one parameter group that this rank owns. Clipping, the average over ranks and the check for values
that are not finite are part of the pass: it reads the norm of the gradient on the device, scales each value by it, and
writes nothing at all if the norm is not finite.

Bytes at least, of each value: gradient 2, weight and moments 3 * 4 read; weight and moments 3 * 4, compute weight 2
written, so 28. The norm is computed before this pass and reads the gradient once more. Separate passes (to float32,
norm, clipping, AdamW, to bfloat16) move 44, with clipping 52.

The steps of the formula are those of torch.optim.AdamW (Loshchilov and Hutter, 2019), in float32. The coefficients are
formed in float64 on the host; torch's fused kernel forms some in float32.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mirl.kernels.checks import FLOAT_DTYPES, check_device, check_shape
from mirl.kernels.dispatch import uses_triton
from mirl.kernels.launch import ceil_div, on_device_of
from mirl.kernels.registration import KernelOp
from mirl.kernels.triton_import import tl, triton

# Four values a thread: 16-byte accesses of float32, 8-byte ones of bfloat16, both without gaps in a warp.
TILE, WARPS = 1024, 8


@dataclass(frozen=True, kw_only=True)
class Coefficients:
    """These are the numbers of one step of one parameter group, formed in float64.

    decay: factor of the weight. step_size: learning rate over the first bias correction. correction: root of the
    second bias correction. average: one over the number of ranks whose gradients were added up. clip: largest norm, 0
    for none.
    """

    decay: float
    beta1: float
    beta2: float
    step_size: float
    correction: float
    eps: float
    average: float = 1.0
    clip: float = 0.0

    @classmethod
    def of_step(
        cls, step: int, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float,
        average: float = 1.0, clip: float = 0.0,
    ) -> "Coefficients":  # fmt: skip
        """Form the numbers of AdamW's ``step``-th step, counted from 1."""
        return cls(
            decay=1 - lr * weight_decay, beta1=betas[0], beta2=betas[1], step_size=lr / (1 - betas[0] ** step),
            correction=math.sqrt(1 - betas[1] ** step), eps=eps, average=average, clip=clip,
        )  # fmt: skip


@torch.no_grad()
def flat_adamw_reference(
    grad_N: Tensor, master_N: Tensor, exp_avg_N: Tensor, exp_avg_sq_N: Tensor, weight_N: Tensor, norm: Tensor,
    numbers: Coefficients,
) -> None:  # fmt: skip
    if not math.isfinite(float(norm)):
        return
    scaled_N = grad_N.to(master_N.dtype) * _scale(norm, numbers)
    exp_avg_N.mul_(numbers.beta1).add_(scaled_N * (1 - numbers.beta1))
    exp_avg_sq_N.mul_(numbers.beta2).add_(scaled_N * (1 - numbers.beta2) * scaled_N)
    denominator_N = exp_avg_sq_N.sqrt().div_(numbers.correction).add_(numbers.eps)
    master_N.mul_(numbers.decay).sub_(exp_avg_N * numbers.step_size / denominator_N)
    weight_N.copy_(master_N)


def _scale(norm: Tensor, numbers: Coefficients) -> Tensor | float:
    """Return the factor of the gradients: DeepSpeed's clipping times the average over ranks."""
    if numbers.clip == 0:
        return numbers.average
    return numbers.average / ((norm + 1e-6) / numbers.clip).clamp(min=1.0)


@triton.jit
def _flat_adamw_kernel(
    grad_ptr, master_ptr, exp_avg_ptr, exp_avg_sq_ptr, weight_ptr, norm_ptr, values,
    decay, beta1, beta2, rest1, rest2, step_size, correction, eps, average, clip,
    CLIPS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    offset = tl.program_id(0).to(tl.int64) * TILE + tl.max_contiguous(tl.arange(0, TILE), 4)
    mask = offset < values
    norm = tl.load(norm_ptr)
    grad = tl.load(grad_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    master = tl.load(master_ptr + offset, mask=mask, other=0.0)
    exp_avg = tl.load(exp_avg_ptr + offset, mask=mask, other=0.0)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + offset, mask=mask, other=0.0)
    scale = average
    if CLIPS:
        scale = average / tl.maximum((norm + 1e-6) / clip, 1.0)
    grad = grad * scale
    exp_avg = exp_avg * beta1 + grad * rest1
    exp_avg_sq = exp_avg_sq * beta2 + grad * rest2 * grad
    denominator = tl.sqrt_rn(exp_avg_sq) / correction + eps
    master = master * decay - exp_avg * step_size / denominator
    # NaN and infinity less themselves are NaN: then nothing is written. The interpreter needs the test as a vector.
    mask = mask & (tl.zeros((TILE,), tl.float32) + (norm - norm) == 0.0)
    tl.store(master_ptr + offset, master, mask=mask)
    tl.store(exp_avg_ptr + offset, exp_avg, mask=mask)
    tl.store(exp_avg_sq_ptr + offset, exp_avg_sq, mask=mask)
    tl.store(weight_ptr + offset, master.to(weight_ptr.dtype.element_ty), mask=mask)


def _flat_adamw(
    grad_N: Tensor, master_N: Tensor, exp_avg_N: Tensor, exp_avg_sq_N: Tensor, weight_N: Tensor, norm: Tensor,
    decay: float, beta1: float, beta2: float, step_size: float, correction: float, eps: float, average: float,
    clip: float,
) -> None:  # fmt: skip
    with on_device_of(grad_N):
        _flat_adamw_kernel[(ceil_div(grad_N.numel(), TILE),)](
            grad_N, master_N, exp_avg_N, exp_avg_sq_N, weight_N, norm, grad_N.numel(),
            decay, beta1, beta2, 1 - beta1, 1 - beta2, step_size, correction, eps, average, clip or 1.0,
            CLIPS=clip > 0, TILE=TILE, num_warps=WARPS,
        )  # fmt: skip


WRITTEN = ("master_N", "exp_avg_N", "exp_avg_sq_N", "weight_N")
flat_adamw_op = KernelOp(_flat_adamw, lambda *arguments: None, mutates=WRITTEN)


def flat_adamw(
    grad_N: Tensor, master_N: Tensor, exp_avg_N: Tensor, exp_avg_sq_N: Tensor, weight_N: Tensor, norm: Tensor,
    numbers: Coefficients,
) -> None:  # fmt: skip
    """Take one AdamW step in place: ``master_N`` and both moments are updated, ``weight_N`` is ``master_N`` rounded.

    If ``norm`` is NaN or infinite, nothing is written. No gradient is recorded.

    grad_N: sum of the ranks' gradients, any float dtype. master_N, exp_avg_N, exp_avg_sq_N: float32. weight_N: any
    float dtype. All [N] and contiguous. norm: float32 [], the norm of the averaged gradient of all groups and ranks.
    With a float64 ``grad_N``, which is for the reference only, moments, master and norm are float64.
    Example: one step from zero moments, lr 0.1 and no decay moves a weight by 0.1 against the sign of its gradient.
    Raises: ValueError for wrong shapes, dtypes, devices, or a buffer with gaps.
    Source: "Decoupled Weight Decay Regularization", Loshchilov and Hutter, 2019, algorithm 2.
    """
    state = {"master_N": master_N, "exp_avg_N": exp_avg_N, "exp_avg_sq_N": exp_avg_sq_N}
    buffers: dict[str, Any] = {"grad_N": grad_N, **state, "weight_N": weight_N}
    check_shape("norm", norm, (), "[]")
    check_device(grad_N, norm=norm, **buffers)
    for name, buffer in buffers.items():
        check_shape(name, buffer, (grad_N.numel(),), "[N]")
        if not buffer.is_contiguous():
            raise ValueError(f"{name} has stride {buffer.stride(0)}; a flat buffer has no gaps: use contiguous()")
    exact = grad_N.dtype == torch.float64  # only the reference computes in it
    for name, buffer in {**state, "norm": norm}.items():
        if buffer.dtype != (torch.float64 if exact else torch.float32):
            raise ValueError(f"{name} has dtype {buffer.dtype}; float32 is needed")
    for name in ("grad_N", "weight_N"):
        if buffers[name].dtype not in FLOAT_DTYPES:
            raise ValueError(f"{name} has dtype {buffers[name].dtype}; a float dtype is needed")
    if not grad_N.numel():
        return
    if not uses_triton(grad_N):
        flat_adamw_reference(grad_N, master_N, exp_avg_N, exp_avg_sq_N, weight_N, norm, numbers)
        return
    flat_adamw_op(
        grad_N, master_N, exp_avg_N, exp_avg_sq_N, weight_N, norm, numbers.decay, numbers.beta1, numbers.beta2,
        numbers.step_size, numbers.correction, numbers.eps, numbers.average, numbers.clip,
    )  # fmt: skip
