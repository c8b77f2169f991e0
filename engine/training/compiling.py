"""Compiled regions: the bodies of the blocks through torch.compile, each kind once, checked against eager before use.

| region                 | what is in it                                               | graphs              |
|------------------------|-------------------------------------------------------------|---------------------|
| `Block.compute`        | an encoder block                                            | first of a segment, |
|                        |                                                             | others              |
| `DecoderBlock.ask`     | end of self-attention, norm, queries of the cross-attention | one per row count   |
| `DecoderBlock.finish`  | end of the last attention, norm, MLP                        | one per row count   |

So a model of any depth and number of decoders has `expected_graphs` graphs for each image size that it is trained with,
all of them made in the trial steps. What has other shapes in every decoder (cross-attention over kv_g) stays outside.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch._dynamo
import torch._functorch.config as functorch_config
from torch import Tensor

from mirl.engine.configuration.config import COMPILES
from mirl.engine.distributed.launch import Ranks
from mirl.engine.models import MIRL
from mirl.engine.models.compute_choices import ComputeChoices
from mirl.engine.models.execution import Regions
from mirl.engine.models.layers import HeadedAttention, Mlp, ResidualNorm
from mirl.engine.models.resizing import at_image_size
from mirl.errors import UserError
from mirl.kernels import AttentionBackend, set_inlined

# Of loss and gradients, relative. In bfloat16 the compiler rounds at fewer places than eager (two parts in a hundred
# after 48 blocks); float32 differs by the order of sums. A wrong graph is off by the size of the gradient itself.
TOLERANCE = {torch.bfloat16: 0.1, torch.float32: 1e-3, torch.float64: 1e-6}
# Share of the activations of a region that may be kept, for ``Execution.recompute``: where the compiler's partitioner
# keeps what `apply_keeping_input` keeps, the inputs of LayerNorm and GELU. Without it a region keeps what eager keeps.
RECOMPUTE_BUDGET = 0.8
# Of one method and image size: more is a region that changes from call to call. torch's default, for one size.
MOST_GRAPHS = 8
# Inductor's own search: templates of matrix products in many tilings beside the library's, each timed, and what follows
# a product (a bias, a GELU) in its epilogue where that is timed to be faster.
SEARCH = {
    "max_autotune_gemm": True, "max_autotune_gemm_backends": "ATEN,TRITON,CPP", "epilogue_fusion": True,
    "benchmark_epilogue_fusion": True,
}  # fmt: skip


@dataclass(frozen=True)
class CompileChoice:
    """Whether regions are compiled, and why; ``search``: with Inductor's search over their products."""

    on: bool
    reason: str
    search: bool = False

    def __str__(self) -> str:
        return f"{'on' if self.on else 'off'} ({self.reason})"


def choose_compile(requested: str, device: torch.device, zero_stage: int) -> CompileChoice:
    """``requested``: auto, on, off or max. What cannot work is off whatever was asked, with the reason."""
    if requested not in COMPILES:
        raise UserError(f"compile is {requested!r}: choose one of {', '.join(COMPILES)}")
    if requested == "off":
        return CompileChoice(False, "as asked")
    if zero_stage == 3:
        return CompileChoice(False, "ZeRO-3 gathers parameters in hooks, which no graph can hold")
    if requested in ("on", "max"):
        return CompileChoice(True, "as asked", search=requested == "max")
    if device.type == "cuda":
        return CompileChoice(True, "auto on a GPU")
    return CompileChoice(False, "auto on a CPU: measured no faster, see benchmarks/LOG.md")


def expected_graphs(model: ComputeChoices) -> int:
    """Graphs that the regions of ``model`` compile to, by the count of the table above."""
    config = model.config
    # A block is the first of its segment or not, and drops paths or not: the very first never does.
    kinds = {
        (index % config.segment_depth == 0, index > 0 and config.drop_path > 0) for index in range(config.built_depth)
    }
    encoder = len(kinds)
    if not isinstance(model, MIRL):
        return encoder
    masked_last = model.skips.masked_only_tail
    rows = ["all"] * (config.decoder_depth - 1) + ["masked" if masked_last else "all"]
    did = [index < config.did_blocks for index in range(config.decoder_depth)]
    asks = {row for row, dense in zip(rows, did, strict=True) if dense}
    finishes = set(zip(rows, did, strict=True))
    return encoder + len(asks) + len(finishes)


def compile_regions(
    model: ComputeChoices, batch: int, device: torch.device, *, backend: str = "inductor", search: bool = False,
    sizes: Sequence[tuple[int, int]] = (),
) -> CompileChoice:  # fmt: skip
    """Compile the regions of ``model`` for training steps of ``batch`` images, and take one such step with and without.

    ``sizes``: (height, width) of the images that it will be trained with, a step and a compilation for each; none: its
    own. The step is a forward and a backward pass on random pixels; no parameter and no ``.grad`` is changed. Whatever
    goes wrong (no compiler, a graph break, a result that differs) leaves the model eager and comes back as the reason.
    ``model.execution.recompute`` holds inside the regions too. ``search``: with `SEARCH`; see `search_regions`.

    Kernels of ours that stand in regions are launched by the compiler itself; where that fails they are operators that
    it calls, and where that fails too, the model stays eager.
    """
    done = f"{expected_graphs(model)} graphs, a trial step agrees with eager"
    if len(sizes) > 1:
        done = f"{expected_graphs(model)} graphs for each of {len(sizes)} image sizes, trial steps agree with eager"
    sizes = sizes or [(model.config.image_height, model.config.image_width)]
    told = ""
    if _has_kernels_in_regions(model) and set_inlined(True):
        problem = _compile_and_compare(model, batch, device, backend, sizes, search=search)
        if problem is None:
            return CompileChoice(True, done, search)
        told = f"; our kernels as operators of their own, for inlined: {problem}"
        torch._dynamo.reset()
    set_inlined(False)
    problem = _compile_and_compare(model, batch, device, backend, sizes, search=search)
    if problem is None:
        return CompileChoice(True, f"{done}{told}", search)
    model.set_regions(None)
    return CompileChoice(False, f"FELL BACK TO EAGER: {problem}")


def _has_kernels_in_regions(model: ComputeChoices) -> bool:
    executions = [module.execution for module in model.modules() if isinstance(module, ResidualNorm | Mlp)]
    attentions = [module.backend for module in model.modules() if isinstance(module, HeadedAttention)]
    return any(execution.norm_in_regions or execution.gelu_in_regions for execution in executions) or any(
        isinstance(backend, AttentionBackend) and backend.name == "own" for backend in attentions
    )


def _compile_and_compare(
    model: ComputeChoices, batch: int, device: torch.device, backend: str, sizes: Sequence[tuple[int, int]], *,
    search: bool,
) -> str | None:  # fmt: skip
    """Take a step of each size without compiled regions and with them, which stay; returns what is wrong with it."""
    # No break is tolerated: a region in pieces would be slower than eager without anyone knowing.
    regions = Regions(lambda method: torch.compile(method, backend=backend, dynamic=False, fullgraph=True), batch)
    for height, width in sizes:
        with at_image_size(model, height, width):
            model.set_regions(None)
            expected = trial_step(model, batch, device)
            model.set_regions(regions)
            problem = _compiled_step(model, batch, device, expected, search=search, most=MOST_GRAPHS * len(sizes))
        if problem is not None:
            return f"{problem}{f' at {height}x{width}' if len(sizes) > 1 else ''}"
    return None


def _compiled_step(
    model: ComputeChoices, batch: int, device: torch.device, expected: tuple[Tensor, ...], *, search: bool, most: int
) -> str | None:
    """Take a step with the regions that are set; returns what is wrong with it. ``most``: graphs of one method."""
    budget = RECOMPUTE_BUDGET if model.execution is not None and model.execution.recompute else 1.0
    try:
        with ExitStack() as settings:
            settings.enter_context(functorch_config.patch(activation_memory_budget=budget))
            settings.enter_context(torch._dynamo.config.patch(recompile_limit=most))
            if search:
                import torch._inductor.config as inductor_config

                settings.enter_context(inductor_config.patch(SEARCH))
            return _difference(trial_step(model, batch, device), expected, model.weight_dtype)
    except Exception as error:  # noqa: BLE001 - anything from a missing g++ to an internal assertion of the compiler
        cause = getattr(error, "inner_exception", error)  # what a backend raised, which torch wraps
        first_line = (str(cause).strip() or "no message").splitlines()[0]
        return f"{type(cause).__name__}: {first_line[:200]}"


def search_regions(
    model: ComputeChoices, batch: int, ranks: Ranks, *, backend: str = "inductor",
    sizes: Sequence[tuple[int, int]] = (),
) -> CompileChoice:  # fmt: skip
    """`compile_regions` with Inductor's search, which rank 0 makes once, for all ranks; they call this together.

    The others compile afterwards, from what rank 0 wrote to the cache of the compiler: they are sent it, or share its
    folder. Two searches of the same product would end in different tilings, and take their time twice. Where the
    search fails on any rank, the regions of all are compiled without it, and the reason says so.
    """
    begin = time.perf_counter()
    mine, cache = None, None
    if ranks.is_main:
        mine = compile_regions(model, batch, ranks.device, backend=backend, search=True, sizes=sizes)
        cache = saved_cache() if mine.on and ranks.world_size > 1 else None
    seconds = time.perf_counter() - begin
    first, cache, seconds = ranks.broadcast((mine, cache, seconds))
    if first.on and not ranks.is_main:
        if cache is not None:
            torch.compiler.load_cache_artifacts(cache)
        mine = compile_regions(model, batch, ranks.device, backend=backend, search=True, sizes=sizes)
    found = ranks.gather(mine)
    problems = [f"rank {rank}: {each.reason}" for rank, each in enumerate(found) if each is not None and not each.on]
    if not problems:
        others = f", {ranks.world_size - 1} others from its cache" if ranks.world_size > 1 else ""
        return replace(first, reason=f"{first.reason}; products searched in {seconds:.0f} s on rank 0{others}")
    torch._dynamo.reset()  # or what was found would be taken again
    plain = compile_regions(model, batch, ranks.device, backend=backend, sizes=sizes)
    reason = problems[0].replace("FELL BACK TO EAGER: ", "")
    return replace(plain, reason=f"{plain.reason}; WITHOUT THE SEARCH OF PRODUCTS, which failed on {reason}")


def saved_cache() -> bytes | None:
    """What this process has compiled so far, as the compiler's cache keeps it; None where it keeps nothing."""
    saved: tuple[bytes, Any] | None = torch.compiler.save_cache_artifacts()
    return None if saved is None else saved[0]


LossOfImages = Callable[[Tensor, torch.Generator], Tensor]


def trial_step(
    model: ComputeChoices, batch: int, device: torch.device, loss_of: LossOfImages | None = None
) -> tuple[Tensor, ...]:
    """Loss and gradients of one step on random pixels; no parameter, ``.grad`` or random stream is touched.

    ``loss_of``: in place of the model's `ComputeChoices.trial_loss`.
    """
    config = model.config
    generator = torch.Generator().manual_seed(0)
    shape = (batch, config.image_height, config.image_width, config.channels)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)  # stochastic depth
        loss = (loss_of or model.trial_loss)(images, generator)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Not backward(): hooks of a distributed engine must not see these gradients.
    return loss.detach(), *torch.autograd.grad(loss, parameters)


def _difference(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], dtype: torch.dtype) -> str | None:
    tolerance = TOLERANCE[dtype]
    loss_error = float((actual[0] - expected[0]).abs() / expected[0].abs())
    squares = [
        (float((a.float() - e.float()).square().sum()), float(e.float().square().sum()))
        for a, e in zip(actual[1:], expected[1:], strict=True)
    ]
    gradient_error = (sum(error for error, _ in squares) / sum(norm for _, norm in squares)) ** 0.5
    # Written so that NaN is a difference.
    if loss_error <= tolerance and gradient_error <= tolerance:
        return None
    return (
        f"a trial step differs from eager by {loss_error:.1e} in the loss and {gradient_error:.1e} in the gradient, "
        f"{tolerance:g} is allowed in {str(dtype).removeprefix('torch.')}"
    )
