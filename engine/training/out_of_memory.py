"""What is said when memory runs out, wherever in a run: what the run takes, and what would take less."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from mirl.engine.accounting import free_memory
from mirl.engine.training.fitting import FootprintOf, Need, gib, smaller_micro_batches
from mirl.engine.training.plan import RunPlan
from mirl.errors import UserError

# Words of torch's allocator of host memory, of the C++ library and of cuBLAS; CUDA's allocator has a class of errors.
_OF_THREADS = ("can't start new thread", "Resource temporarily unavailable")
_WORDS = ("can't allocate memory", "not enough memory", "std::bad_alloc", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory could not be had, on a GPU or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    # A thread needs a stack; without a limit of addresses it is a limit of processes that it meets.
    words = (*_WORDS, *_OF_THREADS) if free_memory.addresses_are_limited() else _WORDS
    return any(word in str(error) for word in words)


def explain(error: BaseException, plan: RunPlan[Any], footprint_of: FootprintOf, *, when: str) -> UserError:
    """The error of a run that ran out of memory: one paragraph with the estimated need of this run and of smaller ones.

    ``when``: "at step 12". Asks no other rank for anything: those may be waiting in a step.
    """
    need = Need(plan, footprint_of)
    micro = plan.micro_batch
    ways = [f"--micro-batch {size} {gib(need(size))}" for size in smaller_micro_batches(plan, need)[:1]]
    run = plan.config.run
    if run.activation_checkpointing == "none" and not run.recompute_pointwise:
        ways += _changed(need, micro, "--recompute-pointwise", {"run.recompute_pointwise": True})
    if run.activation_checkpointing != "every":
        changes = {"run.activation_checkpointing": "every", "run.recompute_pointwise": False}
        ways += _changed(need, micro, "--activation-checkpointing every", changes)
    stage = need.place.zero_stage
    for other in (2, 3):
        if other > stage:
            size = need.placed(dataclasses.replace(need.place, zero_stage=other), micro)
            alone = " (with one rank there is nobody to share with)" if plan.ranks.world_size == 1 else ""
            ways.append(f"--deepspeed_config zero{other} {gib(size)}{alone}")
    words = " ".join(str(error).split())
    said = f"{type(error).__name__}: {words[:200]}" if words else type(error).__name__
    return UserError(
        f"memory ran out {when} with micro-batch {micro}, for which {gib(need(micro))} were estimated. Estimates of "
        f"what takes less: {'; '.join(ways) or 'none; give a smaller --model or --image-size'}. The batch and the "
        f"results stay the same; whole checkpoints are intact, and --resume auto goes on from them ({said})"
    )


def _changed(need: Need, micro: int, flag: str, changes: dict[str, Any]) -> list[str]:
    try:
        return [f"{flag} {gib(need.changed(changes, micro))}"]
    except UserError:  # it does not go with another setting
        return []
