"""Memory of a training step on one GPU, by formula: model states by ZeRO stage, activations by micro-batch.

States, bytes per parameter, bfloat16 with float32 master weights, AdamW and float32 gradient accumulation, R ranks:

| part                                     | bytes | shared by the R ranks from ZeRO stage |
|------------------------------------------|-------|---------------------------------------|
| weights, bfloat16                        | 2     | 3                                     |
| gradients as the backward pass writes them, bfloat16 | 2 | 2                             |
| gradients as they add up, float32        | 4     | 2                                     |
| master weights and two moments, float32  | 12    | 1                                     |

Activations: bytes of the tensors that autograd keeps for the backward pass, under fused attention (xformers or SDPA;
math keeps S x S weights as well) and all exact skips. `activation_values` counts them as multiples of tokens times
width; LayerNorm and attention statistics, ids and images are the rest. Kernels' work space and the allocator's rounding
come on top: 5 to 10 %.

Letters: T = 1 + K tokens of the encoder, S = 1 + N of a decoder, M masked, D and E widths, F and f hidden widths, G
segments.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.flops import pretraining_parameters
from engine.models.config import ModelConfig

GIB = 2**30
ZERO_STAGES = (0, 1, 2, 3)
VALUE_BYTES = 2
STATISTICS_BYTES = 4


@dataclass(frozen=True)
class ActivationValues:
    """Values (not bytes) that one image keeps; ``statistics`` are float32, the others in the dtype of the run."""

    encoder: float
    decoders: float
    outputs: float
    statistics: float

    @property
    def bytes(self) -> float:
        return VALUE_BYTES * (self.encoder + self.decoders + self.outputs) + STATISTICS_BYTES * self.statistics


def activation_values(config: ModelConfig, checkpointing: str | int = "none") -> ActivationValues:
    """Of one image, in the forms of activation checkpointing that `MIRL.set_activation_checkpointing` knows.

    With checkpointing: the inputs of all recomputed runs, and the inside of the largest run, which exists while it is
    recomputed.
    """
    tokens, width, dec = 1 + config.num_kept, config.width, config.decoder_width
    block = encoder_block_values(config)
    if checkpointing == "none":
        encoder = config.depth * block
        decoders = sum(decoder_values(config, g) for g in range(1, config.segments + 1))
        statistics = _statistics(config)
    else:
        run = {"every": 1, "segments": config.segment_depth}.get(str(checkpointing)) or int(checkpointing)
        run = min(run, config.segment_depth)
        runs = config.segments * -(-config.segment_depth // run)
        encoder = runs * tokens * width
        # A decoder's first run keeps e_g, each further one its full sequence.
        decoder_run = config.decoder_depth if checkpointing == "segments" else min(run, config.decoder_depth)
        decoder_runs = -(-config.decoder_depth // decoder_run)
        decoders = config.segments * (tokens + (decoder_runs - 1) * (1 + config.num_patches)) * dec
        decoders += sum(_cross_values(config, g) for g in range(1, config.segments + 1))
        largest_decoder = decoder_values(config, config.segments) - _cross_values(config, config.segments)
        inside = max(run * block, largest_decoder * decoder_run / config.decoder_depth)
        encoder, statistics = encoder + inside, 0.0
    # Pixels of kept patches; z_G; every LN_g(z_g); e_g twice (before and after the norm that all decoders share).
    sources = config.segments + (1 if config.did else 0)
    encoder += config.num_kept * config.patch_pixels + tokens * width + sources * tokens * width
    if config.did:
        decoders += 2 * config.segments * tokens * dec
    return ActivationValues(encoder, decoders, _output_values(config), statistics)


def encoder_block_values(config: ModelConfig) -> float:
    """Per token: input and output of two norms 4 D, qkv 3 D, attention 1 D, and the MLP before and after GELU 2 F."""
    return (1 + config.num_kept) * (8 * config.width + 2 * config.mlp_width)


def decoder_values(config: ModelConfig, g: int) -> float:
    """The blocks of decoder g, with the keys and values of its kv_g; the last block goes on with M rows."""
    dec, hidden = config.decoder_width, config.decoder_mlp_width
    kept, tokens, masked = 1 + config.num_kept, 1 + config.num_patches, config.num_masked
    total = _cross_values(config, g)
    for index in range(config.decoder_depth):
        first, last = index == 0, index == config.decoder_depth - 1
        rows = masked if last else tokens
        # Input and output of norm1: of the visible tokens where the rest comes from the table, else of all.
        total += 2 * (kept if first else tokens) * dec
        # q of the rows that go on (gathered out of norm1's output in a later last block), k and v of all.
        total += rows * dec + 2 * tokens * dec + (masked * dec if last and not first else 0)
        # Attention; input and output of norm2; the MLP before and after GELU.
        total += rows * (3 * dec + 2 * hidden)
        if index < config.did_blocks:
            total += rows * 4 * dec  # input and output of norm_q, q, attention
    return total


def _cross_values(config: ModelConfig, g: int) -> float:
    """Projected keys and values of kv_g, in each block with DID."""
    return config.did_blocks * g * (1 + config.num_kept) * 2 * config.decoder_width


def _output_values(config: ModelConfig) -> float:
    """Input and output of the decoders' last norms, and one gradient of the predictions for each term of the loss."""
    terms = max(config.segments // 2, 1) if config.objective == "mirl" else config.segments
    return config.num_masked * (2 * config.segments * config.decoder_width + terms * config.patch_pixels)


def _statistics(config: ModelConfig) -> float:
    """Mean and deviation of a row for each norm, one value per row and head for each attention."""
    kept, tokens = 1 + config.num_kept, 1 + config.num_patches
    encoder = config.depth * kept * (4 + config.heads)
    decoders = config.segments * config.decoder_depth * tokens * (4 + config.decoder_heads)
    return encoder + decoders + config.segments * config.did_blocks * tokens * (2 + config.decoder_heads)


def state_bytes(config: ModelConfig, zero_stage: int, ranks: int) -> float:
    """Weights, gradients and optimiser states of one rank; the table above. ValueError on an unknown stage or no
    rank."""
    if zero_stage not in ZERO_STAGES:
        raise ValueError(f"zero_stage is {zero_stage}: choose one of {', '.join(map(str, ZERO_STAGES))}")
    if ranks < 1:
        raise ValueError(f"ranks is {ranks}: give 1 or more")
    per_parameter = 0.0
    for size, shared_from in ((2, 3), (2 + 4, 2), (12, 1)):
        per_parameter += size / ranks if zero_stage >= shared_from else size
    return per_parameter * pretraining_parameters(config)


def activation_bytes(config: ModelConfig, micro_batch: int, checkpointing: str | int = "none") -> float:
    """Of ``micro_batch`` images, the uint8 pixels of the batch included."""
    pixels = config.image_height * config.image_width * config.channels
    return micro_batch * (activation_values(config, checkpointing).bytes + pixels)


def step_gib(
    config: ModelConfig, micro_batch: int, *, zero_stage: int, ranks: int, checkpointing: str | int = "none"
) -> float:
    """States and activations together, GiB of one GPU."""
    return (state_bytes(config, zero_stage, ranks) + activation_bytes(config, micro_batch, checkpointing)) / GIB
