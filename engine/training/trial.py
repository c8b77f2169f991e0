"""`--micro-batch auto`: the estimated micro-batch is tried by a step before the run begins, and halved where it fails.

The estimate (`mirl.engine.training.fitting`) knows what tensors hold. It does not know how an allocator cuts memory to
pieces, what a library keeps for itself, or what another program takes a moment later. A step that is really made does.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar

import torch

from mirl.engine.accounting.free_memory import FreeMemory, bounded_by, free_host_memory
from mirl.engine.distributed.ds_engine import TrainEngine
from mirl.engine.distributed.launch import Ranks
from mirl.engine.training.compiling import LossOfImages, trial_step
from mirl.engine.training.fitting import FootprintOf, Need, smaller_micro_batches
from mirl.engine.training.out_of_memory import explain, is_out_of_memory
from mirl.engine.training.plan import RunPlan

T = TypeVar("T")


class TooLarge(Exception):
    """A step with the planned micro-batch does not fit; ``smaller`` is to be planned with. Raised on every rank."""

    def __init__(self, smaller: int, remark: str) -> None:
        super().__init__(remark)
        self.smaller, self.remark = smaller, remark


def with_smaller(attempt: Callable[[int | None, list[str]], T], ranks: Ranks) -> T:
    """``attempt(at_most, tried)`` with an ever smaller micro-batch, from None on, until it does not raise TooLarge.

    ``tried``: a line for the log on each that was too large.
    """
    at_most: int | None = None
    tried: list[str] = []
    while True:
        try:
            return attempt(at_most, tried)
        except TooLarge as error:
            at_most = error.smaller
            tried.append(error.remark)
        # What was built is unreachable only now, when the exception and its frames are gone.
        gc.collect()
        if ranks.device.type == "cuda":
            torch.cuda.empty_cache()


def try_micro_batch(engine: TrainEngine, plan: RunPlan[Any], footprint_of: FootprintOf, loss_of: LossOfImages) -> str:
    """Make a forward and a backward pass of ``plan.micro_batch`` random images, on every rank; returns a line to log.

    Weights, buffers, optimiser state and random streams are as before, and no image of the data is read. All of the
    state is in memory meanwhile, both moments too, with every gradient at once. The optimiser's own step, which comes
    when the activations are gone, is not made: it would change the weights.

    Under ZeRO 3 no step is made: its passes gather weights from the other ranks, and a rank whose memory ran out would
    leave them waiting.

    Raises:
        TooLarge: it did not fit on some rank, and there is a smaller one.
        UserError: it did not fit, and there is none.
    """
    micro, ranks = plan.micro_batch, plan.ranks
    if engine.stage == 3:
        return f"micro-batch {micro} as estimated: no trial step under ZeRO 3, whose passes wait for all ranks"
    free = free_host_memory(ranks.local_world_size, of_limits=False)
    ranks.barrier()  # or one would count what another's trial takes
    failure = _failure(engine, micro, ranks.device, free, loss_of)
    failed = [rank for rank, one in enumerate(ranks.gather(failure is not None)) if one]
    if not failed:
        return f"micro-batch {micro}: a trial step fits into memory"
    smaller = [size for size in smaller_micro_batches(plan, Need(plan, footprint_of)) if 2 * size <= micro]
    where = "" if ranks.world_size == 1 else f" on rank {failed[0]}"
    if smaller:
        raise TooLarge(smaller[0], f"micro-batch {micro} ran out of memory in a trial step{where}")
    told = explain(failure or MemoryError(), plan, footprint_of, when=f"in a trial step{where}")
    told.of_all_ranks = True
    raise told


def _failure(
    engine: TrainEngine, micro: int, device: torch.device, free: FreeMemory, loss_of: LossOfImages
) -> BaseException | None:
    """Why a trial step did not fit, without the frames that hold its tensors."""
    buffers = {name: buffer.clone() for name, buffer in engine.module.named_buffers()}
    if device.type == "cpu":
        torch.zeros(2**20).add_(1)  # starts torch's threads: libgomp ends the process where they get no stack
    try:
        with bounded_by(free) if device.type == "cpu" else nullcontext():
            trial_step(engine.module, micro, device, loss_of)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error, limited=device.type == "cpu" or None):
            raise
        return type(error)(str(error))
    finally:
        with torch.no_grad():
            for name, buffer in engine.module.named_buffers():
                buffer.copy_(buffers[name])
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
    return None
