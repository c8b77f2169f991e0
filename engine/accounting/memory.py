"""Formulas give the memory of a training step on one GPU: model states by ZeRO stage, activations by micro-batch.

States take these bytes per parameter with AdamW on R ranks, under the files of ds_configs/:

| part                                    | bf16 | fp32 | shared by the R ranks                            |
|-----------------------------------------|------|------|--------------------------------------------------|
| weights                                 | 2    | 4    | in stage 3, but see below                        |
| master weights and two moments, float32 | 12   | 12   | in all                                           |
| flat gradients of stages 1 and 2        | 2    | 4    | no; 4 in bf16 too if micro-batches add up        |
| gradients of stage 3, float32           | 4    | 4    | yes                                              |

Stage 3 gathers the weights on top of its share, and lets no weight go before the step has passed 1e9 of them. Its
gradients travel in a bucket of 2e8 values whatever the size of the model.

`mirl.engine.accounting.activations` counts the activations.
"""

from __future__ import annotations

from mirl.engine.accounting.activations import VALUE_BYTES, activations
from mirl.engine.accounting.flops import pretraining_parameters
from mirl.engine.distributed.flat_gradients import most_waiting
from mirl.engine.models.config import ModelConfig
from mirl.errors import UserError

GIB = 2**30
ZERO_STAGES = (1, 2, 3)
BUCKET_VALUES = 200_000_000
MOST_GATHERED = 1_000_000_000  # stage3_max_live_parameters


def state_bytes(
    config: ModelConfig,
    zero_stage: int,
    ranks: int,
    precision: str = "bf16",
    *,
    accumulation: int = 1,
    bucket: int = BUCKET_VALUES,
) -> float:
    """Return the `parameter_bytes` of a model that is pre-trained."""
    return parameter_bytes(
        pretraining_parameters(config), zero_stage, ranks, precision, accumulation=accumulation, bucket=bucket
    )


def parameter_bytes(
    parameters: int,
    zero_stage: int,
    ranks: int,
    precision: str = "bf16",
    *,
    accumulation: int = 1,
    bucket: int = BUCKET_VALUES,
) -> float:
    """Count weights, gradients, optimiser states and the bucket of stage 3 on one rank, by the table above.

    ``accumulation``: micro-batches of a step. UserError on an unknown stage or no rank.
    """
    if zero_stage not in ZERO_STAGES:
        raise UserError(f"zero_stage is {zero_stage}: choose one of {', '.join(map(str, ZERO_STAGES))}")
    if ranks < 1:
        raise UserError(f"ranks is {ranks}: give 1 or more")
    size = VALUE_BYTES[precision]
    total = (size + 12 / ranks) * parameters
    if zero_stage < 3:
        return total + (size if accumulation == 1 else 4) * parameters
    if ranks > 1:
        total += size * (parameters / ranks + min(parameters, MOST_GATHERED) - parameters)
    return total + 4 / ranks * parameters + size * bucket


def reduction_bytes(
    parameters: int,
    zero_stage: int,
    ranks: int,
    precision: str = "bf16",
    *,
    accumulation: int = 1,
    bucket: int = BUCKET_VALUES,
    on_gpu: bool = True,
) -> float:
    """Count the copies of gradients at the end of the backward pass, when activations are gone.

    In stage 3 they are those of a bucket. Otherwise they are the last gradients on their way into the flat buffer, or a
    rank's share of the buffer in float32, whichever is more.
    """
    size = VALUE_BYTES[precision]
    if zero_stage == 3:
        return min(bucket, parameters) * (size + 4 / ranks)
    share = 4 / ranks * parameters if precision == "bf16" and accumulation == 1 else 0
    return max(size * most_waiting(parameters, on_gpu=on_gpu), share)


def activation_bytes(
    config: ModelConfig, micro_batch: int, checkpointing: str | int = "none", precision: str = "bf16"
) -> float:
    """Count the most that ``micro_batch`` images take at a time, the uint8 pixels of the batch included."""
    pixels = config.image_height * config.image_width * config.channels
    return micro_batch * (activations(config, checkpointing, precision).peak + pixels)


def step_gib(
    config: ModelConfig,
    micro_batch: int,
    *,
    zero_stage: int,
    ranks: int,
    checkpointing: str | int = "none",
    precision: str = "bf16",
    accumulation: int = 1,
    bucket: int = BUCKET_VALUES,
) -> float:
    """Count the GiB of one GPU: states and activations, or states and the later copies of gradients, if more."""
    parameters, gradients = pretraining_parameters(config), {"accumulation": accumulation, "bucket": bucket}
    states = parameter_bytes(parameters, zero_stage, ranks, precision, **gradients)
    work = activation_bytes(config, micro_batch, checkpointing, precision)
    return (states + max(work, reduction_bytes(parameters, zero_stage, ranks, precision, **gradients))) / GIB
