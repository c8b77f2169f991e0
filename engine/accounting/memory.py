"""Memory of a training step on one GPU, by formula: model states by ZeRO stage, activations by micro-batch.

States, bytes per parameter, AdamW, R ranks, under the files of ds_configs/:

| part                                    | bf16 | fp32 | shared by the R ranks                            |
|-----------------------------------------|------|------|--------------------------------------------------|
| weights                                 | 2    | 4    | in stage 3, but see below                        |
| master weights and two moments, float32 | 12   | 12   | in all                                           |
| flat gradients of stages 1 and 2        | 2    | 4    | no; 4 in bf16 too where micro-batches add up     |
| gradients of stage 3, float32           | 4    | 4    | yes                                              |

Stage 3 gathers the weights on top of its share, and lets none go before the step has passed 1e9 of them. Its gradients
travel in a bucket of 2e8 values whatever the size of the model.

Activations: bytes of the tensors that autograd keeps for the backward pass, under fused attention (xformers or SDPA;
math keeps S x S weights as well) and all exact skips, and of those that live for a moment when the most is kept: what
is made of the predictions, a run of blocks that is recomputed, gradients on their way through a block. Values count as
multiples of tokens times width; LayerNorm and attention statistics, ids and images are the rest. Kernels' work space
and the allocator's rounding come on top: 5 to 10 %.

Letters: T = 1 + K tokens of the encoder, S = 1 + N of a decoder, M masked, D and E widths, F and f hidden widths, G
segments.
"""

from __future__ import annotations

from dataclasses import dataclass

from mirl.engine.accounting.flops import pretraining_parameters
from mirl.engine.distributed.flat_gradients import most_waiting
from mirl.engine.models.checkpointing import CheckpointPlan
from mirl.engine.models.config import ModelConfig
from mirl.engine.models.objectives.objective import objective_terms
from mirl.errors import UserError

GIB = 2**30
ZERO_STAGES = (1, 2, 3)
VALUE_BYTES = {"bf16": 2, "fp32": 4}
STATISTICS_BYTES = 4
BUCKET_VALUES = 200_000_000
MOST_GATHERED = 1_000_000_000  # stage3_max_live_parameters


@dataclass(frozen=True)
class Activations:
    """Bytes of one image. What autograd keeps: ``encoder``, ``decoders`` with their heads and loss. What lives for a
    moment: while the loss is computed; in the backward pass of a decoder; in that of the encoder, when nothing of the
    decoders is left.
    """

    encoder: float
    decoders: float
    loss_work: float
    decoder_work: float
    encoder_work: float

    @property
    def kept(self) -> float:
        return self.encoder + self.decoders

    @property
    def peak(self) -> float:
        return max(self.kept + max(self.loss_work, self.decoder_work), self.encoder + self.encoder_work)


def activations(config: ModelConfig, checkpointing: str | int = "none", precision: str = "bf16") -> Activations:
    """Of one image, in the forms of activation checkpointing that `MIRL.set_activation_checkpointing` knows.

    With checkpointing the inputs of all runs are kept, and the inside of a run only while it is recomputed.
    UserError on an unknown form.
    """
    plan = CheckpointPlan.make(checkpointing)
    tokens, width, dec, hidden = 1 + config.num_kept, config.width, config.decoder_width, config.decoder_mlp_width
    sources = config.segments + (1 if config.did else 0)
    loss_gradient = len(objective_terms(config)) * config.num_masked * config.patch_pixels

    # Pixels of kept patches; z_G; every LN_g(z_g).
    encoder = config.num_kept * config.patch_pixels + (1 + sources) * tokens * width
    # Input and output of the decoders' last norms; the gradient of the predictions; keys and values of every kv_g; e_g
    # before and after the norm that all decoders share.
    decoders = 2 * config.segments * config.num_masked * dec + loss_gradient
    decoders += sum(_cross_values(config, g) for g in range(1, config.segments + 1))
    decoders += 2 * config.segments * tokens * dec if config.did else 0

    block, statistics = encoder_block_values(config), (0.0, 0.0)
    if plan.group == 0:
        encoder += config.built_depth * block
        decoders += config.segments * sum(decoder_block_values(config, i) for i in range(config.decoder_depth))
        statistics = _statistics(config)
        encoder_inside, decoder_runs = 0.0, [(config.decoder_depth - 1, config.decoder_depth)]
    else:
        encoder_runs = list(plan.groups(0, config.segment_depth))
        encoder += config.segments * len(encoder_runs) * tokens * width
        encoder_inside = max(last - first for first, last in encoder_runs) * block
        # A decoder's first run keeps e_g, each further one its full sequence.
        decoder_runs = list(plan.groups(0, config.decoder_depth))
        decoders += config.segments * (tokens + (len(decoder_runs) - 1) * (1 + config.num_patches)) * dec

    def unrolled(first: int, last: int) -> float:
        """The inside of a run, where it is recomputed, and the gradients on their way through its last block."""
        inside = sum(decoder_block_values(config, i) for i in range(first, last)) if plan.group != 0 else 0.0
        return inside + _rows(config, last - 1) * (hidden + dec)

    # Gradients of the predictions, scaled; those of every LN_g(z_g), and on their way through a block of the encoder.
    decoder_work = loss_gradient + max(unrolled(first, last) for first, last in decoder_runs)
    encoder_work = encoder_inside + tokens * (sources * width + config.mlp_width + width)
    loss_work = config.segments * config.num_masked * config.patch_pixels
    size = VALUE_BYTES[precision]
    return Activations(
        encoder=size * encoder + STATISTICS_BYTES * statistics[0],
        decoders=size * decoders + STATISTICS_BYTES * statistics[1],
        loss_work=size * loss_work,
        decoder_work=size * decoder_work,
        encoder_work=size * encoder_work,
    )


def encoder_block_values(config: ModelConfig) -> float:
    """Per token: input and output of two norms 4 D, qkv 3 D, attention 1 D, and the MLP before and after GELU 2 F."""
    return (1 + config.num_kept) * (8 * config.width + 2 * config.mlp_width)


def decoder_block_values(config: ModelConfig, index: int) -> float:
    """Block ``index`` of a decoder without the keys and values of its kv_g; the last block goes on with M rows."""
    dec, hidden = config.decoder_width, config.decoder_mlp_width
    kept, tokens, masked = 1 + config.num_kept, 1 + config.num_patches, config.num_masked
    first, rows = index == 0, _rows(config, index)
    # Input and output of norm1: of the visible tokens where the rest comes from the table, else of all.
    total = 2 * (kept if first else tokens) * dec
    # q of the rows that go on (gathered out of norm1's output in a later last block), k and v of all.
    total += rows * dec + 2 * tokens * dec + (masked * dec if rows == masked and not first else 0)
    # Attention; input and output of norm2; the MLP before and after GELU.
    total += rows * (3 * dec + 2 * hidden)
    if index < config.did_blocks:
        total += rows * 4 * dec  # input and output of norm_q, q, attention
    return total


def _rows(config: ModelConfig, index: int) -> int:
    """Rows with which block ``index`` of a decoder goes on after its self-attention."""
    return config.num_masked if index == config.decoder_depth - 1 else 1 + config.num_patches


def _cross_values(config: ModelConfig, g: int) -> float:
    """Projected keys and values of kv_g, in each block with DID."""
    return config.did_blocks * g * (1 + config.num_kept) * 2 * config.decoder_width


def _statistics(config: ModelConfig) -> tuple[float, float]:
    """Of encoder and decoders: mean and deviation of a row for each norm, one value per row and head for each
    attention.
    """
    kept, tokens = 1 + config.num_kept, 1 + config.num_patches
    encoder = config.built_depth * kept * (4 + config.heads)
    decoders = config.segments * config.decoder_depth * tokens * (4 + config.decoder_heads)
    return encoder, decoders + config.segments * config.did_blocks * tokens * (2 + config.decoder_heads)


def state_bytes(
    config: ModelConfig,
    zero_stage: int,
    ranks: int,
    precision: str = "bf16",
    *,
    accumulation: int = 1,
    bucket: int = BUCKET_VALUES,
) -> float:
    """Weights, gradients, optimiser states and the bucket of stage 3 on one rank; the table above. ``accumulation``:
    micro-batches of a step. UserError on an unknown stage or no rank.
    """
    if zero_stage not in ZERO_STAGES:
        raise UserError(f"zero_stage is {zero_stage}: choose one of {', '.join(map(str, ZERO_STAGES))}")
    if ranks < 1:
        raise UserError(f"ranks is {ranks}: give 1 or more")
    parameters, size = pretraining_parameters(config), VALUE_BYTES[precision]
    total = (size + 12 / ranks) * parameters
    if zero_stage < 3:
        return total + (size if accumulation == 1 else 4) * parameters
    if ranks > 1:
        total += size * (parameters / ranks + min(parameters, MOST_GATHERED) - parameters)
    return total + 4 / ranks * parameters + size * bucket


def reduction_bytes(
    config: ModelConfig,
    zero_stage: int,
    ranks: int,
    precision: str = "bf16",
    *,
    accumulation: int = 1,
    bucket: int = BUCKET_VALUES,
) -> float:
    """Copies of gradients at the end of the backward pass, when activations are gone: in stage 3 those of a bucket,
    else the last ones on their way into the flat buffer, or a rank's share of it in float32.
    """
    parameters, size = pretraining_parameters(config), VALUE_BYTES[precision]
    if zero_stage == 3:
        return min(bucket, parameters) * (size + 4 / ranks)
    share = 4 / ranks * parameters if precision == "bf16" and accumulation == 1 else 0
    return max(size * most_waiting(parameters), share)


def activation_bytes(
    config: ModelConfig, micro_batch: int, checkpointing: str | int = "none", precision: str = "bf16"
) -> float:
    """The most that ``micro_batch`` images take at a time, the uint8 pixels of the batch included."""
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
    """States with activations, or with what comes after them if that is more: GiB of one GPU."""
    gradients = {"accumulation": accumulation, "bucket": bucket}
    states = state_bytes(config, zero_stage, ranks, precision, **gradients)
    work = activation_bytes(config, micro_batch, checkpointing, precision)
    return (states + max(work, reduction_bytes(config, zero_stage, ranks, precision, **gradients))) / GIB
