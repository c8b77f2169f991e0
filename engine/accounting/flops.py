"""Formulas give the parameters and floating-point operations of a model.

A FLOP is one multiplication or one addition: a matrix product [r, i] x [i, o] has 2 r i o. Element-wise work, norms and
softmax are left out, as torch's FlopCounterMode leaves them out. The tests hold formulas and counter equal on the plain
eager reference.

Letters: B batch, N patches, K kept, M masked, T = 1 + K, S = 1 + N, L depth, D width, E decoder width, G segments, Q
pixels of a patch, F and f hidden widths of the MLPs of encoder and decoder.
"""

from __future__ import annotations

from dataclasses import dataclass

from mirl.engine.models.config import ModelConfig
from mirl.engine.models.skips import ExactSkips

CLASSES = 1000
"""The paper's parameter counts include a classification head of so many outputs."""

PLAIN = ExactSkips(
    visible_only_projection=False,
    masked_only_tail=False,
    kv_prefix=False,
    shared_loss_gradient=False,
    mask_token_table=False,
)


@dataclass(frozen=True)
class ForwardFlops:
    """The fields count FLOPs of the forward pass on one image."""

    patch_projection: float
    encoder: float
    embeds: float
    decoders: float
    heads: float
    teacher: float = 0.0

    @property
    def total(self) -> float:
        """Sum the trained model, without the teacher of the feature loss."""
        return self.patch_projection + self.encoder + self.embeds + self.decoders + self.heads

    @property
    def training(self) -> float:
        """Count the forward and backward pass without recomputation.

        A product of the forward pass has two in the backward pass, one for the gradient of each factor, but pixels need
        no gradient. The teacher has a forward pass only. The VGG-16 of the perceptual loss is not counted.
        """
        return 3 * self.total - self.patch_projection + self.teacher


def forward_flops(config: ModelConfig, skips: ExactSkips = PLAIN) -> ForwardFlops:
    """Count one image's forward pass. By default this is the plain form, without exact skips.

    Utilisation is quoted on the FLOPs that the exact skips leave, and beside it on the plain form.
    """
    width, dec = config.width, config.decoder_width
    kept_tokens = 1 + config.num_kept
    projected = config.num_kept if skips.visible_only_projection else config.num_patches
    predicted = config.num_masked if skips.masked_only_tail else 1 + config.num_patches
    sources = config.segments + (1 if config.did else 0)
    return ForwardFlops(
        patch_projection=2 * projected * config.patch_pixels * width,
        encoder=config.built_depth * encoder_block_flops(config, kept_tokens),
        embeds=2 * sources * kept_tokens * width * dec,
        decoders=sum(decoder_flops(config, g, skips) for g in range(1, config.segments + 1)),
        heads=2 * config.segments * predicted * dec * (config.patch_pixels + (width if config.feature_loss else 0)),
        teacher=_teacher_flops(config) if config.feature_loss else 0.0,
    )


def _teacher_flops(config: ModelConfig) -> float:
    """Count the encoder on all patches."""
    projection = 2 * config.num_patches * config.patch_pixels * config.width
    return projection + config.built_depth * encoder_block_flops(config, 1 + config.num_patches)


def encoder_block_flops(config: ModelConfig, tokens: int) -> float:
    """Count q, k, v, proj and the MLP on every token, and the two products of attention."""
    weights = tokens * (4 * config.width**2 + 2 * config.width * config.mlp_width)
    return 2 * weights + 4 * tokens**2 * config.width


def decoder_flops(config: ModelConfig, g: int, skips: ExactSkips) -> float:
    """Count the blocks of decoder g, whose kv_g has g * (1 + K) tokens."""
    dec, hidden = config.decoder_width, config.decoder_mlp_width
    tokens, kept = 1 + config.num_patches, 1 + config.num_kept
    total = 0.0
    for index in range(config.decoder_depth):
        tail = skips.masked_only_tail and index == config.decoder_depth - 1
        table = skips.mask_token_table and index == 0
        rows = config.num_masked if tail else tokens
        # Rows in the products with q and with k, v: the batch shares the table's own N rows, which are left out here.
        asked, answered = (kept, kept) if table else (rows, tokens)
        if table and tail:
            asked = 0
        macs = asked * dec**2 + answered * 2 * dec**2 + rows * (dec**2 + 2 * dec * hidden) + 2 * rows * tokens * dec
        if index < config.did_blocks:
            macs += rows * 2 * dec**2 + g * kept * 2 * dec**2 + 2 * rows * g * kept * dec
        total += 2 * macs
    return total


def training_flops_per_image(config: ModelConfig, skips: ExactSkips = PLAIN) -> float:
    """Count the FLOPs of one forward and backward pass on one image, without recomputation."""
    return forward_flops(config, skips).training


def classifier_flops(config: ModelConfig, classes: int) -> ForwardFlops:
    """Count the encoder as a classifier of all patches, with its head of ``classes`` outputs."""
    return ForwardFlops(
        patch_projection=2 * config.num_patches * config.patch_pixels * config.width,
        encoder=config.depth * encoder_block_flops(config, 1 + config.num_patches),
        embeds=0.0,
        decoders=0.0,
        heads=2 * config.width * classes,
    )


def classifier_macs(config: ModelConfig) -> float:
    """Count the multiply-adds of a classifier's weights as the paper does: the "FLOPs" of its Table 1.

    The count leaves out the two products of attention, which have no weights. The paper cuts its own models' figures
    off after the printed digit (33.58 G is 33.5 G), and prints 59.7 G for vit_l, which is 59.65 G here.
    """
    tokens = 1 + config.num_patches
    blocks = config.depth * tokens * (4 * config.width**2 + 2 * config.width * config.mlp_width)
    return blocks + config.num_patches * config.patch_pixels * config.width + config.width * CLASSES


def classifier_parameters(config: ModelConfig) -> int:
    """Count the encoder as a classifier, as the paper does: learned positions, one norm, a 1000-way head."""
    width = config.width
    tokens = (1 + config.num_patches) * width + width
    return (
        _patch_projection(config)
        + tokens
        + config.depth * _block(width, config.mlp_width)
        + 2 * width
        + (width + 1) * CLASSES
    )


def encoder_parameters(config: ModelConfig) -> int:
    """Count the trained parameters of the encoder while it is pre-trained, the norms of its segments included."""
    norms = config.segments + (1 if config.did else 0)
    blocks = config.built_depth * _block(config.width, config.mlp_width)
    return _patch_projection(config) + config.width + blocks + norms * 2 * config.width


def decoder_parameters(config: ModelConfig) -> int:
    """Count the trained parameters of the decoders, with the Linear_g and the mask tokens."""
    dec, count = config.decoder_width, config.segments
    sources = count + (1 if config.did else 0)
    cross = 4 * dec**2 + 4 * dec + 2 * 2 * dec
    decoder = config.decoder_depth * _block(dec, config.decoder_mlp_width) + config.did_blocks * cross
    decoder += 2 * dec + (dec + 1) * (config.patch_pixels + (config.width if config.feature_loss else 0))
    mask_tokens = dec if config.variant == "paper" else count * dec
    return sources * (config.width + 1) * dec + count * decoder + mask_tokens


def pretraining_parameters(config: ModelConfig) -> int:
    """Count all trained parameters of the model that is pre-trained."""
    return encoder_parameters(config) + decoder_parameters(config)


def _patch_projection(config: ModelConfig) -> int:
    return (config.patch_pixels + 1) * config.width


def _block(width: int, hidden: int) -> int:
    """Count attention, MLP and two norms."""
    return 4 * width**2 + 4 * width + 2 * width * hidden + width + hidden + 4 * width


def segmenter_flops(config: ModelConfig, classes: int, head_channels: int) -> ForwardFlops:
    """Count one image of a segmenter (`mirl.engine.transfer.segmentation`).

    The encoder sees all patches. Every convolution of pyramid and heads counts, the auxiliary head included.
    """
    width, patches, made = config.width, config.num_patches, head_channels or config.width
    tokens = 1 + patches
    # Places of the four maps: 16, 4, 1 and 1/4 of the patches.
    pyramid = patches * width**2 * (4 + 16 + 4)
    pooled = sum(side**2 for side in (1, 2, 3, 6)) * width * made + patches / 4 * 9 * (width + 4 * made) * made
    laterals = (16 + 4 + 1) * patches * (width * made + 9 * made**2)
    fused = 16 * patches * (9 * 4 * made**2 + made * classes)
    auxiliary = patches * (9 * width * 256 + 256 * classes)
    return ForwardFlops(
        patch_projection=2 * patches * config.patch_pixels * width,
        encoder=config.depth * encoder_block_flops(config, tokens),
        embeds=0.0,
        decoders=2 * pyramid,
        heads=2 * (pooled + laterals + fused + auxiliary),
    )


def segmenter_parameters(config: ModelConfig, classes: int, head_channels: int) -> int:
    """Count the trained parameters of a segmenter: the encoder without its last norm, the pyramid, and both heads."""
    width, made = config.width, head_channels or config.width
    encoder = _patch_projection(config) + width + config.depth * _block(width, config.mlp_width)
    pyramid = 3 * (4 * width**2 + width) + 2 * width
    norms = 2 * made * (4 + 1 + 6 + 1)
    head = 4 * width * made + 9 * (width + 4 * made) * made + 3 * (width * made + 9 * made**2) + 36 * made**2
    return encoder + pyramid + norms + head + (made + 1) * classes + 9 * width * 256 + 512 + 257 * classes
