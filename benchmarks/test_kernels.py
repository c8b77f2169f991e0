"""Each kernel against plain PyTorch, torch.compile of that, and a clone of the same bytes, in one run.

`pytest benchmarks/`; results as documented in benchmarks/README.md. On a CPU the sizes are small and the plain-torch
path of CPU users is measured, not the Triton kernels.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.cases import ATTENTION, KERNELS, Case, Size, counts, sizes
from benchmarks.measure import device, map_tensors, rotated, time_calls

IMPLEMENTATIONS = ("clone", "eager", "compile", "ours")
# Relative to the norm: both round to bfloat16 in other places, or add float32 in another order.
AGREEMENT = {torch.bfloat16: 2e-2, torch.float32: 1e-5}


def attention(size: Size) -> list:
    """Our attention kernels at one size; on a CPU, where plain torch stands in for them, one of them."""
    if size.pixels != 224:
        return []
    return ATTENTION if device().type == "cuda" else ATTENTION[:1]


PARAMETERS = [
    pytest.param(make, direction, size, id=f"{name}-{direction}-{size}".replace(" ", "_"))
    for size in sizes(device())
    for name, make, directions in [*KERNELS, *attention(size)]
    if counts(name, size, sizes(device()))
    for direction in directions
]


def leaves(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors(value, lambda tensor: found.append(tensor) if tensor.requires_grad else tensor)
    return found


def with_gradients(function: Callable[..., Any], grads: Sequence[Tensor]) -> Callable[..., Any]:
    """`function` followed by its backward; returns outputs and gradients of all leaves, detached."""

    def run(*arguments: Any) -> list[Tensor]:
        outputs = function(*arguments)
        outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
        cast = [grad.to(output.dtype) for grad, output in zip(grads, outputs, strict=True)]
        found = torch.autograd.grad(outputs, leaves(arguments), cast)
        return [*(output.detach() for output in outputs), *found]

    return run if grads else lambda *arguments: flat(function(*arguments))


def flat(outputs: Any) -> list[Tensor]:
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


def check_agreement(case: Case, dtype: torch.dtype) -> None:
    """A fast wrong kernel has no speed: the timed inputs must give the same result first. Some write to them."""
    ours = with_gradients(case.ours, case.grads)(*copied(case.arguments))
    eager = with_gradients(case.eager, case.grads)(*copied(case.arguments))
    for mine, theirs in zip(ours, eager, strict=True):
        error = (mine.float() - theirs.float()).norm() / theirs.float().norm()
        assert error < AGREEMENT[dtype], f"{case.name}: differs from eager by {float(error):.1e}"


def copied(arguments: Any) -> Any:
    return map_tensors(arguments, lambda tensor: tensor.detach().clone().requires_grad_(tensor.requires_grad))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("make, direction, size", PARAMETERS)
def test_kernel(benchmark, results, make, direction, size, implementation):
    torch.manual_seed(0)
    torch._dynamo.reset()
    case = make(size, direction == "forward_backward")
    benchmark.group = f"{case.name} {direction} {case.shape}"
    if implementation == "clone":
        half = torch.empty(case.bytes // 2, dtype=torch.uint8, device=device()).random_()
        timing = time_calls(benchmark, torch.clone, rotated((half,)), case.bytes)
    else:
        function = case.ours if implementation == "ours" else case.eager
        if implementation == "ours":
            check_agreement(case, size.dtype)
        if implementation == "compile":
            function = torch.compile(function, dynamic=False)
        timing = time_calls(benchmark, with_gradients(function, case.grads), rotated(case.arguments), case.bytes)
    results.add_kernel(f"{case.name} {direction}", case.shape, size.dtype, case.bytes, implementation, timing)
