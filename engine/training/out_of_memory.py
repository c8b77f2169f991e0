"""What is said when memory runs out, wherever in a run: what the run takes, and what would take less."""

from __future__ import annotations

from typing import Any

import torch

from mirl.engine.accounting import free_memory
from mirl.engine.distributed.ds_config import read_ds_config
from mirl.engine.training.fitting import FootprintOf, Need, gib, smaller_micro_batches
from mirl.engine.training.plan import RunPlan
from mirl.errors import UserError

# Words of torch's allocator of host memory, of the C++ library and of cuBLAS; CUDA's allocator has a class of errors.
_WORDS = ("can't allocate memory", "not enough memory", "std::bad_alloc", "CUBLAS_STATUS_ALLOC_FAILED")
# Of a thread that gets no stack, and of oneDNN, which does not say what it could not have.
_WHERE_LIMITED = (
    "can't start new thread", "Resource temporarily unavailable", "could not create a", "could not execute a",
)  # fmt: skip


def is_out_of_memory(error: BaseException, *, limited: bool | None = None) -> bool:
    """Whether ``error`` says that memory could not be had, on a GPU or on the host.

    limited: the address space was bounded when it came; None: find out whether it is now.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    # Without such a limit these words have other causes: a limit of processes, a missing instruction.
    limited = free_memory.addresses_are_limited() if limited is None else limited
    return any(word in str(error) for word in ((*_WORDS, *_WHERE_LIMITED) if limited else _WORDS))


def explained(error: BaseException | None, plan: RunPlan[Any] | None, footprint_of: FootprintOf, step: int) -> bool:
    """Raise in place of an error that says that memory ran out one that says what would take less.

    For an ExitStack: False lets any other error go on its way. ``plan``: as it fits into memory, None before that is
    known. ``step``: steps that the run has made.
    """
    if error is None or not is_out_of_memory(error):
        return False
    if plan is None:
        raise UserError(f"memory ran out before the run was planned: give it more memory ({_said(error)})") from error
    when = f"after step {step}" if step else "before or in the first step"
    raise explain(error, plan, footprint_of, when=when) from error


def explain(error: BaseException, plan: RunPlan[Any], footprint_of: FootprintOf, *, when: str) -> UserError:
    """The error of a run that ran out of memory: one paragraph with the estimated need of this run and of smaller ones.

    ``when``: "after step 12". Asks no other rank for anything: those may be waiting in a step.
    """
    need = Need(plan, footprint_of)
    micro = plan.micro_batch
    whole = need(micro)
    ways = [(f"--micro-batch {size}", need(size)) for size in smaller_micro_batches(plan, need)[:1]]
    run = plan.config.run
    if run.activation_checkpointing == "none" and not run.recompute_pointwise:
        ways += _changed(need, micro, "--recompute-pointwise", {"run.recompute_pointwise": True})
    if run.activation_checkpointing != "every":
        changes = {"run.activation_checkpointing": "every", "run.recompute_pointwise": False}
        ways += _changed(need, micro, "--activation-checkpointing every", changes)
    alone = " with one rank, which has nobody to share with" if plan.ranks.world_size == 1 else ""
    for stage in range(max(2, need.place.zero_stage + 1), 4):
        flag = f"--deepspeed_config zero{stage}"
        ways.append((flag + alone, need.placed(read_ds_config(f"zero{stage}"), micro)))
    texts = [f"{flag}: {gib(size)} ({_change(size - whole)})" for flag, size in ways]
    otherwise = "; ".join(texts) or "nothing of these is left, so give a smaller --model or --image-size"
    return UserError(
        f"memory ran out {when} with micro-batch {micro}, for which {gib(whole)} were estimated. Estimated in its "
        f"place, not measured: {otherwise}. The batch stays the same; whole checkpoints are intact, and --resume auto "
        f"goes on from them ({_said(error)})"
    )


def _change(size: float) -> str:
    return f"{gib(abs(size))} {'less' if size < 0 else 'more'}"


def _said(error: BaseException) -> str:
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:200]}" if words else type(error).__name__


def _changed(need: Need, micro: int, flag: str, changes: dict[str, Any]) -> list[tuple[str, float]]:
    try:
        return [(flag, need.changed(changes, micro))]
    except UserError:  # it does not go with another setting
        return []
