"""Masked Image Residual Learning is an encoder, G decoders and their objective, a pure function of images and mask.

Shapes: B batch, N patches, K kept, M masked, G segments, D encoder width, E decoder width, Q pixels of a patch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mirl.engine.models.compute_choices import ComputeChoices
from mirl.engine.models.config import ModelConfig
from mirl.engine.models.decoder import CrossInput, Decoder, DecoderContext
from mirl.engine.models.did import concatenated_inputs, fold_norms, normalised_prefix_buffer, project_prefixes
from mirl.engine.models.encoder import Encoder
from mirl.engine.models.initialise import initialise
from mirl.engine.models.masking import PatchMask, mask_from_noise
from mirl.engine.models.objectives.objective import feature_loss, objective_terms, perceptual_loss, reconstruction_loss
from mirl.engine.models.objectives.perceptual import PerceptualLoss
from mirl.engine.models.positions import sincos_positions
from mirl.engine.models.skips import ExactSkips


class MIRLOutput(NamedTuple):
    """The model returns its loss and what belongs to it.

    loss: scalar; terms: [number of terms], unweighted, in the order of `MIRL.term_names`; both float32.
    predictions: G tensors [B, N, Q] of decoders 1..G if ``full`` was asked for, else None. mask: the mask in use.
    """

    loss: Tensor
    terms: Tensor
    predictions: tuple[Tensor, ...] | None
    mask: PatchMask


class MIRL(ComputeChoices):
    """The model is built from a `ModelConfig` and initialised from torch's global random numbers.

    State dict: ``encoder.*`` with timm's names; ``embeds.g`` is Linear_g (g = 1..G, and 0 under DID); ``decoders.g`` (g
    = 1..G); ``mask_token`` in the paper's variant, ``decoders.g.mask_token`` in the release's. Positions are fixed, so
    the state dict leaves them out.
    """

    decoder_pos_embed: Tensor

    def __init__(self, config: ModelConfig, skips: ExactSkips | None = None) -> None:
        super().__init__(config)
        self.skips = skips or ExactSkips()
        self.terms = objective_terms(config)
        self.encoder = Encoder(config, self.skips.visible_only_projection)
        embedded = range(0 if config.did else 1, config.segments + 1)
        self.embeds = nn.ModuleDict({str(g): nn.Linear(config.width, config.decoder_width) for g in embedded})
        if config.variant == "paper":
            self.mask_token = nn.Parameter(torch.empty(1, 1, config.decoder_width))
        self.decoders = nn.ModuleDict({str(g): Decoder(config, self.skips) for g in range(1, config.segments + 1)})
        positions = sincos_positions(config.grid, config.decoder_width)
        self.register_buffer("decoder_pos_embed", positions, persistent=False)
        self._perceptual: tuple[PerceptualLoss, ...] = ()
        initialise(self)
        if config.head_init == "zero":
            for decoder in self.decoders.values():
                nn.init.zeros_(decoder.head.weight)

    @property
    def term_names(self) -> tuple[str, ...]:
        """Name the terms that `forward` returns: those of the pixels, then "feature" and "vgg" where they are on."""
        extra = [name for name in ("feature", "vgg") if getattr(self.config, f"{name}_loss")]
        return (*(term.name for term in self.terms), *extra)

    def set_perceptual(self, loss: PerceptualLoss) -> None:
        """Set the VGG-16 of ``vgg_loss``. It is no part of the model: not trained, sharded or saved with it."""
        self._perceptual = (loss,)  # a module in a tuple is not registered

    def forward(
        self,
        images: Tensor,
        *,
        noise: Tensor | None = None,
        mask: PatchMask | None = None,
        teacher_features: Tensor | None = None,
        full: bool = False,
    ) -> MIRLOutput:
        """Compute the loss of reconstructing the masked patches of ``images`` from the kept ones.

        images: uint8 [B, H, W, C], normalised inside, or float [B, C, H, W], already normalised.
        noise: float [B, N], the K smallest of a row are kept; or mask: a `PatchMask`. Exactly one of them.
        teacher_features: [B, N, D] of `EmaTeacher`, which ``feature_loss`` predicts for the masked patches.
        full: predict all N patches and return the predictions; the loss stays that of the masked ones. A full pass
        without teacher_features leaves out the feature loss, one without a VGG-16 the perceptual loss.
        Raises ValueError for images, a mask or features of another shape than the model's, or if an extra loss lacks
        what it needs.
        """
        self.choose(images, plain=full)
        mask = self._resolve_mask(images, noise, mask)
        masked_only = self.skips.masked_only_tail and not full
        first = 0 if self.config.did else 1
        latents = dict(enumerate(self.encoder(images, mask), start=first))
        predictions, features = self.decode(latents, mask, masked_only)
        loss, terms = reconstruction_loss(
            self.config, self.terms, predictions, images, mask,
            masked_only=masked_only, shared_gradient=self.skips.shared_loss_gradient,
        )  # fmt: skip
        for weight, term in self._extra_losses(predictions, features, images, mask, teacher_features, full):
            loss = loss + weight * term
            terms = torch.cat([terms, term.detach().reshape(1).to(terms.dtype)])
        return MIRLOutput(loss, terms, tuple(predictions) if full else None, mask)

    def trial_loss(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return the loss under random masks, with random features for the feature loss."""
        shape = (len(images), self.config.num_patches)
        noise = torch.rand(shape, generator=generator).to(images.device)
        features = None
        if self.config.feature_loss:
            features = torch.randn(*shape, self.config.width, generator=generator).to(images.device, self.weight_dtype)
        return self(images, noise=noise, teacher_features=features).loss

    def decode(
        self, latents: dict[int, Tensor], mask: PatchMask, masked_only: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Decode LN_g(z_g) [B, 1 + K, D] with decoders 1..G: predictions [B, M, Q] if ``masked_only``, else [B, N, Q].

        The second list has the predicted features, with D in place of Q; it is empty without a feature loss.
        """
        dtype = self.weight_dtype  # the residual stream stays in this dtype under autocast, too
        embedded = {g: self.embeds[str(g)](latent_BTD).to(dtype) for g, latent_BTD in latents.items()}
        cross_inputs = self.dense_inputs(embedded)
        context = DecoderContext.make(mask, self.decoder_pos_embed.to(dtype), masked_only)
        mask_token = self.mask_token if self.config.variant == "paper" else None
        decoded = [
            self.decoders[str(g)](embedded[g], mask_token, context, cross_inputs[g])
            for g in range(1, self.config.segments + 1)
        ]
        return [pixels for pixels, _ in decoded], [features for _, features in decoded if features is not None]

    def _extra_losses(
        self,
        predictions: list[Tensor],
        features: list[Tensor],
        images: Tensor,
        mask: PatchMask,
        teacher_features: Tensor | None,
        full: bool,
    ) -> Iterator[tuple[float, Tensor]]:
        """Yield weight and value of each loss beside that of the pixels."""
        config = self.config
        if config.feature_loss and not (full and teacher_features is None):
            wanted = (len(images), config.num_patches, config.width)
            if teacher_features is None or tuple(teacher_features.shape) != wanted:
                raise ValueError(
                    f"feature_loss is {config.feature_loss}: give teacher_features {list(wanted)} of an EmaTeacher"
                )
            yield config.feature_loss, feature_loss(self.terms, features, teacher_features, mask)
        if config.vgg_loss and not (full and not self._perceptual):
            if not self._perceptual:
                raise ValueError(f"vgg_loss is {config.vgg_loss}: give the model a VGG-16 by set_perceptual")
            yield config.vgg_loss, perceptual_loss(config, self.terms, predictions, images, mask, self._perceptual[0])

    def dense_inputs(self, embedded: dict[int, Tensor]) -> dict[int, list[CrossInput | None]]:
        """Return the input of each block's cross-attention in decoder g (Eq. 8), g = 1..G; see `Decoder.forward`."""
        config = self.config
        without = [None] * (config.decoder_depth - config.did_blocks)
        numbers = range(1, config.segments + 1)
        if not config.did:
            return {g: without for g in numbers}
        sources = [embedded[g] for g in range(config.segments)]
        if not self.skips.kv_prefix:
            return {
                g: [CrossInput(kv)] * config.did_blocks + without
                for g, kv in zip(numbers, concatenated_inputs(sources), strict=True)
            }
        readers = [(g, self.decoders[str(g)].blocks[index]) for g in numbers for index in range(config.did_blocks)]
        lengths = [g * sources[0].shape[1] for g, _ in readers]
        linears = [block.cross_attn.kv for _, block in readers]
        weight_GFE, bias_GF = fold_norms([block.norm_kv for _, block in readers], linears)
        # Attention that makes the biases' gradients takes the biases: of all blocks or none, as they are one tensor.
        sums = all(block.cross_attn.takes_bias(1 + config.num_patches, length)
                   for (_, block), length in zip(readers, lengths, strict=True))  # fmt: skip
        biases = bias_GF.unbind() if sums else [None] * len(readers)
        bias_GF = bias_GF.detach() if sums else bias_GF
        projected = project_prefixes(normalised_prefix_buffer(sources), lengths, weight_GFE, bias_GF)
        inputs = map(CrossInput, projected, biases)
        return {g: [next(inputs) for _ in range(config.did_blocks)] + without for g in numbers}

    def _resolve_mask(self, images: Tensor, noise: Tensor | None, mask: PatchMask | None) -> PatchMask:
        """Return the mask to use, after checking its shape."""
        if (noise is None) == (mask is None):
            raise ValueError(
                "give noise [B, N], or a mask: exactly one of them (the model itself draws no random numbers)"
            )
        config = self.config
        wanted = (len(images), config.num_patches)
        if mask is None:
            if tuple(noise.shape) != wanted:
                raise ValueError(f"noise has shape {list(noise.shape)}: give [batch, patches] = {list(wanted)}")
            return mask_from_noise(noise, config.mask_ratio)
        if tuple(mask.ids_restore.shape) != wanted:
            raise ValueError(f"mask is of shape {list(mask.ids_restore.shape)}: give [batch, patches] = {list(wanted)}")
        return mask
