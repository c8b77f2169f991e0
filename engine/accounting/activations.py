"""Formulas give the activations of one image in a training step.

They count the bytes of the tensors that autograd keeps for the backward pass under all exact skips. Attention is fused
(xformers or SDPA) or written out ("math", a CPU's first choice), which keeps its S x S weights as well. They add the
short-lived tensors of the moment when the most is kept: those made from the predictions, a group of blocks that is
recomputed, gradients on their way through a block. Values count as multiples of tokens times width; LayerNorm and
attention statistics, ids and images are the rest. Kernels' work space and the allocator's rounding come on top: 5 to
10 %.

Letters: T = 1 + K tokens of the encoder, S = 1 + N of a decoder, M masked, D and E widths, F and f hidden widths, G
segments.
"""

from __future__ import annotations

from dataclasses import dataclass

from mirl.engine.models.checkpointing import CheckpointPlan
from mirl.engine.models.config import ModelConfig
from mirl.engine.models.objectives.objective import objective_terms

VALUE_BYTES = {"bf16": 2, "fp32": 4}
STATISTICS_BYTES = 4


@dataclass(frozen=True)
class Activations:
    """The fields are bytes of one image.

    Autograd keeps ``encoder``, and ``decoders`` with their heads and loss. The others live for a moment. ``loss_work``:
    while the loss is computed. ``decoder_work``: in the backward pass of a decoder. ``encoder_work``: in that of the
    encoder, when nothing of the decoders is left.
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


def activations(
    config: ModelConfig,
    checkpointing: str | int = "none",
    precision: str = "bf16",
    *,
    math: bool = False,
    recompute: bool = False,
) -> Activations:
    """Count the activations of one image, in the forms of recomputation that `MIRL.set_activation_checkpointing` knows.

    Under recomputation the inputs of all groups of blocks are kept, and the inside of a group only while it is
    recomputed. ``math``: attention is written out and keeps its weights. ``recompute``: the outputs of LayerNorm and
    GELU are made again (`mirl.engine.models.Execution`). With it and without it, compiled regions keep as much as eager
    code. UserError on an unknown form.
    """
    plan = CheckpointPlan.make(checkpointing)
    tokens, width, dec, hidden = 1 + config.num_kept, config.width, config.decoder_width, config.decoder_mlp_width
    sources = config.segments + (1 if config.did else 0)
    loss_gradient = len(objective_terms(config)) * config.num_masked * config.patch_pixels

    # The encoder keeps the pixels of kept patches, z_G, and every LN_g(z_g).
    encoder = config.num_kept * config.patch_pixels + (1 + sources) * tokens * width
    # The decoders keep input and output of their last norms, the gradient of the predictions, keys and values of every
    # kv_g, and e_g before and after the norm that all decoders share.
    decoders = 2 * config.segments * config.num_masked * dec + loss_gradient
    decoders += sum(_cross_values(config, g, math=math) for g in range(1, config.segments + 1))
    decoders += 2 * config.segments * tokens * dec if config.did else 0

    block, statistics = encoder_block_values(config, math=math, recompute=recompute), (0.0, 0.0)
    if plan.group == 0:
        encoder += config.built_depth * block
        decoders += config.segments * sum(
            decoder_block_values(config, i, math=math, recompute=recompute) for i in range(config.decoder_depth)
        )
        statistics = _statistics(config)
        encoder_inside, decoder_runs = 0.0, [(config.decoder_depth - 1, config.decoder_depth)]
    else:
        encoder_runs = list(plan.groups(0, config.segment_depth))
        encoder += config.segments * len(encoder_runs) * tokens * width
        encoder_inside = max(last - first for first, last in encoder_runs) * block
        # A decoder's first group keeps e_g, each further group its full sequence.
        decoder_runs = list(plan.groups(0, config.decoder_depth))
        decoders += config.segments * (tokens + (len(decoder_runs) - 1) * (1 + config.num_patches)) * dec

    def unrolled(first: int, last: int) -> float:
        """Count the inside of a recomputed group, and the gradients on their way through its last block."""
        inside = 0.0
        if plan.group != 0:
            inside = sum(decoder_block_values(config, i, math=math) for i in range(first, last))
        return inside + _rows(config, last - 1) * ((2 if recompute else 1) * hidden + dec)

    # A decoder's backward pass holds the scaled gradients of the predictions. The encoder's holds the gradients of
    # every LN_g(z_g), and those on their way through a block.
    decoder_work = loss_gradient + max(unrolled(first, last) for first, last in decoder_runs)
    made_again = config.mlp_width if recompute else 0
    encoder_work = encoder_inside + tokens * (sources * width + config.mlp_width + made_again + width)
    loss_work = config.segments * config.num_masked * config.patch_pixels
    size = VALUE_BYTES[precision]
    return Activations(
        encoder=size * encoder + STATISTICS_BYTES * statistics[0],
        decoders=size * decoders + STATISTICS_BYTES * statistics[1],
        loss_work=size * loss_work,
        decoder_work=size * decoder_work,
        encoder_work=size * encoder_work,
    )


def classifier_activations(
    config: ModelConfig,
    checkpointing: str | int = "none",
    precision: str = "bf16",
    *,
    math: bool = False,
    recompute: bool = False,
) -> Activations:
    """Count the activations of one image in fine-tuning: every block of the encoder sees all patches, without decoders.

    The head is left out: it sees one row an image. Arguments and errors as for `activations`.
    """
    plan = CheckpointPlan.make(checkpointing)
    tokens, width = 1 + config.num_patches, config.width
    block = encoder_block_values(config, tokens, math=math, recompute=recompute)
    kept = config.num_patches * config.patch_pixels
    work, statistics = tokens * (2 * width + (2 if recompute else 1) * config.mlp_width), 0.0
    if plan.group == 0:
        kept += config.depth * block
        statistics = config.depth * tokens * (4 + config.heads)
    else:
        runs = list(plan.groups(0, config.depth))
        kept += len(runs) * tokens * width
        work += max(last - first for first, last in runs) * block
    size = VALUE_BYTES[precision]
    return Activations(
        encoder=size * kept + STATISTICS_BYTES * statistics, decoders=0.0, loss_work=0.0, decoder_work=0.0,
        encoder_work=size * work,
    )  # fmt: skip


def segmenter_activations(
    config: ModelConfig,
    classes: int,
    head_channels: int = 0,
    checkpointing: str | int = "none",
    precision: str = "bf16",
    *,
    math: bool = False,
    recompute: bool = False,
) -> Activations:
    """Count the activations of one crop in the training of a segmenter.

    Every block of the encoder sees all patches. The pyramid, the heads and the loss at the size of the crop come on
    top. A convolution with its norm and ReLU keeps the norm's input, as float32, and the output of ReLU. Arguments and
    errors as for `activations`.
    """
    encoder = classifier_activations(config, checkpointing, precision, math=math, recompute=recompute)
    size, patches, width = VALUE_BYTES[precision], config.num_patches, config.width
    made = head_channels or width
    tower = STATISTICS_BYTES + size
    # The pyramid keeps the four taken maps, both deconvolutions of the first with norm and GELU between, the
    # deconvolution of the second, and the pooled map.
    kept = patches * width * (4 * size + 4 * (STATISTICS_BYTES + 2 * size) + 16 * size + 4 * size + size / 4 + 2)
    kept += 21 * patches * made * (2 * tower + size)  # laterals, their sums, and the convolutions after them
    kept += patches / 4 * ((width + 4 * made) * size + made * tower)  # the last map, joined with the pooled ones
    kept += 16 * patches * made * (4 * size + tower + size)  # all maps joined, fused, and with dropout
    kept += patches * 256 * (tower + size)
    # Each head keeps the log-softmax of its logits, brought to the size of the crop, in float32.
    logits = STATISTICS_BYTES * config.image_height * config.image_width * classes
    return Activations(
        encoder=encoder.encoder, decoders=kept + 2 * logits, loss_work=0.0, decoder_work=2 * logits,
        encoder_work=encoder.encoder_work,
    )  # fmt: skip


def encoder_block_values(
    config: ModelConfig, tokens: int | None = None, *, math: bool = False, recompute: bool = False
) -> float:
    """Count an encoder block's values.

    A token has input and output of two norms (4 D), qkv (3 D), attention (1 D), and the MLP before and after GELU (2
    F).
    ``tokens``: by default those of pre-training, 1 + K. ``math``: adds a weight per head and pair of tokens.
    ``recompute``: leaves out the outputs of norms and GELU, 2 D + F.
    """
    tokens = tokens or 1 + config.num_kept
    made_again = 2 * config.width + config.mlp_width if recompute else 0
    kept = tokens * (8 * config.width + 2 * config.mlp_width - made_again)
    return kept + (config.heads * tokens**2 if math else 0)


def decoder_block_values(config: ModelConfig, index: int, *, math: bool = False, recompute: bool = False) -> float:
    """Count the values of a decoder's block ``index``, without the keys and values of its kv_g.

    The last block goes on with M rows.
    """
    dec, hidden = config.decoder_width, config.decoder_mlp_width
    kept, tokens, masked = 1 + config.num_kept, 1 + config.num_patches, config.num_masked
    first, rows = index == 0, _rows(config, index)
    # Input and output of norm1: for the visible tokens if the masked ones come from the table, else for all.
    total = 2 * (kept if first else tokens) * dec
    # q of the rows that go on (a later last block gathers them out of norm1's output), k and v of all rows.
    total += rows * dec + 2 * tokens * dec + (masked * dec if rows == masked and not first else 0)
    # Attention; input and output of norm2; the MLP before and after GELU.
    total += rows * (3 * dec + 2 * hidden)
    total += rows * tokens * config.decoder_heads if math else 0
    if index < config.did_blocks:
        total += rows * 4 * dec  # input and output of norm_q, q, attention
    if recompute:
        total -= rows * (dec + hidden)  # norm2 and GELU
        total -= rows * dec if index < config.did_blocks else 0  # norm_q
        total -= tokens * dec if not first and rows == tokens else 0  # norm1, if all its rows go on together
    return total


def _rows(config: ModelConfig, index: int) -> int:
    """Count the rows with which block ``index`` of a decoder goes on after its self-attention."""
    return config.num_masked if index == config.decoder_depth - 1 else 1 + config.num_patches


def _cross_values(config: ModelConfig, g: int, *, math: bool = False) -> float:
    """Count the projected keys and values of kv_g in blocks with DID; under ``math`` also attention's weights."""
    keys = g * (1 + config.num_kept)
    queries = sum(_rows(config, index) for index in range(config.did_blocks))
    weights = queries * keys * config.decoder_heads if math else 0
    return config.did_blocks * keys * 2 * config.decoder_width + weights


def _statistics(config: ModelConfig) -> tuple[float, float]:
    """Count the statistics of the encoder and of the decoders.

    Each norm keeps mean and deviation of a row, each attention one value per row and head.
    """
    kept, tokens = 1 + config.num_kept, 1 + config.num_patches
    encoder = config.built_depth * kept * (4 + config.heads)
    decoders = config.segments * config.decoder_depth * tokens * (4 + config.decoder_heads)
    return encoder, decoders + config.segments * config.did_blocks * tokens * (2 + config.decoder_heads)
