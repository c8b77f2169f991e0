"""`--micro-batch auto`: the estimated micro-batch is tried by a step before the run begins, and halved where it fails.

The estimate (`mirl.engine.training.fitting`) knows what tensors hold. It does not know how an allocator cuts memory to
pieces, what a library keeps for itself, or what another program takes a moment later. A step that is really made does.
"""

from __future__ import annotations

from typing import Any

import torch

from mirl.engine.distributed.ds_engine import TrainEngine
from mirl.engine.training.compiling import trial_step
from mirl.engine.training.fitting import FootprintOf, Need, smaller_micro_batches
from mirl.engine.training.out_of_memory import explain, is_out_of_memory
from mirl.engine.training.plan import RunPlan


class TooLarge(Exception):
    """A step with the planned micro-batch does not fit; ``smaller`` is to be planned with. Raised on every rank."""

    def __init__(self, smaller: int, remark: str) -> None:
        super().__init__(remark)
        self.smaller, self.remark = smaller, remark


def try_micro_batch(engine: TrainEngine, plan: RunPlan[Any], footprint_of: FootprintOf) -> str:
    """Make a forward and a backward pass of ``plan.micro_batch`` random images, on every rank; returns a line to log.

    Weights, optimiser state and random streams are as before, and all of them are in memory meanwhile, with every
    gradient at once, which is more than a step of the run has. Under ZeRO 3 no step is made: its passes gather weights
    from the other ranks, and a rank whose memory ran out would leave them waiting. Heads of segmenters and detectors,
    which may wait for other ranks too, are left out.

    Raises:
        TooLarge: it did not fit on some rank, and there is a smaller one.
        UserError: it did not fit, and there is none.
    """
    micro, ranks = plan.micro_batch, plan.ranks
    if engine.stage == 3:
        return f"micro-batch {micro} as estimated: no trial step under ZeRO 3, whose passes wait for all ranks"
    failure = _failure(engine, micro, ranks.device)
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


def _failure(engine: TrainEngine, micro: int, device: torch.device) -> BaseException | None:
    """Why a trial step did not fit, without the frames that hold its tensors."""
    try:
        trial_step(engine.module, micro, device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return type(error)(str(error))
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
    return None
