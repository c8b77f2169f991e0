"""One AdamW step in one pass, against the formula in float64 and against torch's own optimiser over several steps.

Bounds: moments and weight are a dozen float32 roundings from the formula, relative to the terms that are added up. The
step that is taken off the weight is a quotient of them, so its error is relative to the step.
"""

import math

import pytest
import torch
from torch import Tensor

from mirl import kernels
from mirl.kernels.flat_adamw import Coefficients
from tests.kernels.support import assert_near, places, randn

SIZES = [1, 5, 1023, 1024, 3001]
BETAS, EPS, LR = (0.9, 0.95), 1e-8, 1e-2
GUARD = 7.0
KINDS = ("master", "exp_avg", "exp_avg_sq", "weight")


def flat(values: Tensor, dtype: torch.dtype, gap: int = 0) -> Tensor:
    """A part of a larger buffer, as a rank owns one: what lies before and behind is `GUARD`."""
    before = 8 + gap
    whole = torch.full((before + len(values) + 8,), GUARD, dtype=dtype, device=values.device)
    part = whole[before : before + len(values)]
    part.copy_(values)
    return part


def guards(part: Tensor) -> Tensor:
    whole = part._base
    assert whole is not None
    first = part.storage_offset()
    return torch.cat([whole[:first], whole[first + len(part) :]])


def buffers(values: int, device: str, dtype: torch.dtype, gap: int = 0) -> dict[str, Tensor]:
    """Gradient, state and weight as they are somewhere in a training."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    drawn = [randn(values, device=device, dtype=wide, seed=seed) for seed in range(4)]
    return {
        "grad": flat(drawn[0], dtype, gap),
        "master": flat(drawn[1], wide),
        "exp_avg": flat(0.3 * drawn[2], wide),
        "exp_avg_sq": flat(drawn[3].square(), wide),
        "weight": flat(torch.full_like(drawn[0], float("nan")), dtype, gap),
    }


def step(found: dict[str, Tensor], norm: Tensor, numbers: Coefficients) -> None:
    kernels.flat_adamw(*(found[name] for name in ("grad", *KINDS)), norm, numbers)


def formula(found: dict[str, Tensor], number: int, decay: float, scale: float) -> dict[str, Tensor]:
    """Algorithm 2 of Loshchilov and Hutter, in float64."""
    grad, master, exp_avg, exp_avg_sq = (found[name].double().cpu() for name in ("grad", *KINDS[:3]))
    grad = grad * scale
    exp_avg = BETAS[0] * exp_avg + (1 - BETAS[0]) * grad
    exp_avg_sq = BETAS[1] * exp_avg_sq + (1 - BETAS[1]) * grad**2
    first, second = exp_avg / (1 - BETAS[0] ** number), exp_avg_sq / (1 - BETAS[1] ** number)
    taken = LR * first / (second.sqrt() + EPS)
    return {"master": master - LR * decay * master - taken, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}


@pytest.mark.parametrize("device, dtype", places())
@pytest.mark.parametrize("values", SIZES)
@pytest.mark.parametrize("decay, clip, average", [(0.0, 0.0, 1.0), (0.3, 0.5, 1 / 3), (0.3, 1e6, 1.0), (0.0, 0.5, 0.5)])
def test_one_step(device, dtype, values, decay, clip, average):
    found = buffers(values, device, dtype, gap=values % 3)  # a rank's part may lie anywhere
    norm = (found["grad"].double() * average).norm().to(found["master"].dtype)
    scale = average / max(1.0, (float(norm) + 1e-6) / clip) if clip else average
    assert clip != 0.5 or values == 1 or scale < average, "nothing is clipped"
    wanted = formula(found, 3, decay, scale)
    numbers = Coefficients.of_step(3, lr=LR, betas=BETAS, eps=EPS, weight_decay=decay, average=average, clip=clip)
    step(found, norm, numbers)
    for name, truth in wanted.items():
        assert_near(found[name], truth, roundings=12, name=name)
    assert torch.equal(found["weight"], found["master"].to(dtype))
    assert all((guards(part) == GUARD).all() for part in found.values()), "something was written beside the buffers"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_many_steps_are_those_of_torch(device, clip):
    """Two groups, one with weight decay, 12 steps. Both round in each step, a few units each: 1e-6 of the largest."""
    sizes, decays = (1300, 70), (0.05, 0.0)
    ours = [buffers(size, device, torch.float32) for size in sizes]
    for found in ours:
        found["exp_avg"].zero_(), found["exp_avg_sq"].zero_()
    parameters = [torch.nn.Parameter(found["master"].clone()) for found in ours]
    groups = [{"params": [p], "weight_decay": decay} for p, decay in zip(parameters, decays, strict=True)]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS, fused=True)
    for number in range(1, 13):
        for index, (found, parameter) in enumerate(zip(ours, parameters, strict=True)):
            found["grad"].copy_(randn(len(parameter), device=device, dtype=torch.float32, seed=10 * number + index))
            parameter.grad = found["grad"].clone()
        norm = torch.cat([parameter.grad for parameter in parameters]).norm()
        if clip:
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        for found, decay in zip(ours, decays, strict=True):
            step(found, norm, Coefficients.of_step(
                number, lr=LR, betas=BETAS, eps=EPS, weight_decay=decay, clip=clip
            ))  # fmt: skip
    for found, parameter in zip(ours, parameters, strict=True):
        state = optimizer.state[parameter]
        for name, truth in (("master", parameter), ("exp_avg", state["exp_avg"]), ("exp_avg_sq", state["exp_avg_sq"])):
            assert_near(found[name], truth, roundings=12 * 6, sums=1e-6, name=name)
        moved = (parameter - buffers(len(parameter), device, torch.float32)["master"]).abs().max()
        assert moved > 10 * LR / 2, "nothing was trained"


@pytest.mark.parametrize("device, dtype", places())
@pytest.mark.parametrize("norm", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_leaves_everything_as_it_was(device, dtype, norm):
    found = buffers(1500, device, dtype)
    found["weight"].copy_(found["master"])
    found["grad"][700] = norm
    before = {name: found[name].clone() for name in KINDS}
    numbers = Coefficients.of_step(2, lr=LR, betas=BETAS, eps=EPS, weight_decay=0.1, clip=1.0)
    step(found, torch.tensor(norm, device=device, dtype=found["master"].dtype), numbers)
    assert all(torch.equal(found[name], before[name]) for name in KINDS)


def test_of_step_counts_from_one():
    numbers = Coefficients.of_step(1, lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.5)
    assert numbers.step_size == pytest.approx(1.0) and numbers.correction == pytest.approx(0.1)
    assert numbers.decay == pytest.approx(0.95) and (numbers.average, numbers.clip) == (1.0, 0.0)


def test_refuses():
    found, numbers = (
        buffers(8, "cpu", torch.float32),
        Coefficients.of_step(1, lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0),
    )
    norm = torch.ones(())
    for changed, message in [
        ({"master": torch.zeros(9)}, "master_N has shape"),
        ({"exp_avg": torch.zeros(16)[::2]}, "a flat buffer has no gaps"),
        ({"exp_avg_sq": torch.zeros(8, dtype=torch.bfloat16)}, "exp_avg_sq_N has dtype torch.bfloat16"),
        ({"weight": torch.zeros(8, dtype=torch.int32)}, "weight_N has dtype torch.int32"),
    ]:
        with pytest.raises(ValueError, match=message):
            step(found | changed, norm, numbers)
    with pytest.raises(ValueError, match="norm has shape"):
        step(found, torch.ones(1), numbers)
