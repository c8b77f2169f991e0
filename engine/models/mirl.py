"""Masked Image Residual Learning: encoder, G decoders and their objective, as one pure function of images and mask.

Shapes: B batch, N patches, K kept, M masked, G segments, D encoder width, E decoder width, Q pixels of a patch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine.models.checkpointing import CheckpointFunction, CheckpointPlan
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder, DecoderBlock, DecoderContext
from engine.models.did import concatenated_inputs, fold_norm, normalised_prefix_buffer, project_prefixes
from engine.models.encoder import Encoder
from engine.models.execution import Execution, Regions
from engine.models.initialise import initialise
from engine.models.layers import Block, CrossAttention, HeadedAttention, Mlp, ResidualNorm
from engine.models.masking import PatchMask, mask_from_noise
from engine.models.objective import objective_terms, reconstruction_loss
from engine.models.pixels import image_layout
from engine.models.positions import sincos_positions
from engine.models.skips import ExactSkips
from kernels import AttentionBackend, resolve_attention_backend


class MIRLOutput(NamedTuple):
    """loss: scalar; terms: [number of terms], unweighted, in the order of `MIRL.term_names`; both float32.

    predictions: G tensors [B, N, Q] of decoders 1..G if ``full`` was asked for, else None. mask: the mask in use.
    """

    loss: Tensor
    terms: Tensor
    predictions: tuple[Tensor, ...] | None
    mask: PatchMask


class MIRL(nn.Module):
    """The model of a `ModelConfig`, initialised from torch's global random numbers.

    State dict: ``encoder.*`` with timm's names; ``embeds.g`` is Linear_g (g = 1..G, and 0 under DID); ``decoders.g``
    (g = 1..G); ``mask_token`` in the paper's variant, ``decoders.g.mask_token`` in the release's. Positions are not in
    it: they are fixed.
    """

    decoder_pos_embed: Tensor

    def __init__(self, config: ModelConfig, skips: ExactSkips | None = None) -> None:
        super().__init__()
        self.config = config
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
        self.attention_backends: dict[str, AttentionBackend] = {}
        self._resolved_for: tuple[torch.device, torch.dtype] | None = None
        self.execution: Execution | None = None
        self.regions = Regions()
        initialise(self)

    @property
    def weight_dtype(self) -> torch.dtype:
        """Of the parameters. Buffers may differ: DeepSpeed can cast parameters alone."""
        return self.encoder.cls_token.dtype

    @property
    def term_names(self) -> tuple[str, ...]:
        return tuple(term.name for term in self.terms)

    def forward(
        self, images: Tensor, *, noise: Tensor | None = None, mask: PatchMask | None = None, full: bool = False
    ) -> MIRLOutput:
        """Loss of reconstructing the masked patches of ``images`` from the kept ones.

        images: uint8 [B, H, W, C], normalised inside, or float [B, C, H, W], already normalised.
        noise: float [B, N], the K smallest of a row are kept; or mask: a `PatchMask`. Exactly one of them.
        full: predict all N patches and return the predictions; the loss stays that of the masked ones.
        Raises ValueError for images or a mask of another shape than the model's.
        """
        mask = self._resolve_mask(images, noise, mask)
        self.resolve_attention(images.device)
        if self.execution is None:
            self.set_execution(Execution.for_device(images.device))
        self.regions.active = self.training and not full and len(images) == self.regions.batch
        masked_only = self.skips.masked_only_tail and not full
        first = 0 if self.config.did else 1
        latents = dict(enumerate(self.encoder(images, mask), start=first))
        predictions = self.decode(latents, mask, masked_only)
        loss, terms = reconstruction_loss(
            self.config, self.terms, predictions, images, mask,
            masked_only=masked_only, shared_gradient=self.skips.shared_loss_gradient,
        )  # fmt: skip
        return MIRLOutput(loss, terms, tuple(predictions) if full else None, mask)

    def decode(self, latents: dict[int, Tensor], mask: PatchMask, masked_only: bool) -> list[Tensor]:
        """Predictions of decoders 1..G from LN_g(z_g) [B, 1 + K, D]: [B, M, Q] if ``masked_only``, else [B, N, Q]."""
        dtype = self.weight_dtype  # under autocast, too, the residual stream stays in it
        embedded = {g: self.embeds[str(g)](latent_BTD).to(dtype) for g, latent_BTD in latents.items()}
        cross_inputs = self.dense_inputs(embedded)
        context = DecoderContext.make(mask, self.decoder_pos_embed.to(dtype), masked_only)
        mask_token = self.mask_token if self.config.variant == "paper" else None
        return [
            self.decoders[str(g)](embedded[g], mask_token, context, cross_inputs[g])
            for g in range(1, self.config.segments + 1)
        ]

    def dense_inputs(self, embedded: dict[int, Tensor]) -> dict[int, list[Tensor | None]]:
        """What the cross-attention of each block of decoder g reads (Eq. 8), for g = 1..G; see `Decoder.forward`."""
        config = self.config
        without = [None] * (config.decoder_depth - config.did_blocks)
        numbers = range(1, config.segments + 1)
        if not config.did:
            return {g: without for g in numbers}
        sources = [embedded[g] for g in range(config.segments)]
        if not self.skips.kv_prefix:
            return {
                g: [kv] * config.did_blocks + without
                for g, kv in zip(numbers, concatenated_inputs(sources), strict=True)
            }
        readers = [(g, self.decoders[str(g)].blocks[index]) for g in numbers for index in range(config.did_blocks)]
        lengths = [g * sources[0].shape[1] for g, _ in readers]
        folded = [fold_norm(block.norm_kv, block.cross_attn.kv) for _, block in readers]
        projected = iter(project_prefixes(normalised_prefix_buffer(sources), lengths, folded))
        return {g: [next(projected) for _ in range(config.did_blocks)] + without for g in numbers}

    def set_activation_checkpointing(self, mode: str | int, checkpoint_fn: CheckpointFunction | None = None) -> None:
        """Recompute activations in the backward pass instead of keeping them; results are the same to the bit.

        mode: "none"; "every": each block alone; "segments": an encoder segment, or a decoder, at a time; n: n blocks.
        checkpoint_fn(function, *tensors): torch's non-reentrant checkpoint by default.
        """
        plan = CheckpointPlan.make(mode, checkpoint_fn)
        for module in (self.encoder, *self.decoders.values()):
            module.checkpointing = plan

    def set_execution(self, execution: Execution) -> None:
        """How norms and GELUs are computed; by default, from the first forward pass on, as its device likes it best.

        Raises ValueError where ``recompute`` meets activation checkpointing, which recomputes them already.
        """
        if execution.recompute and self.encoder.checkpointing.group != 0:
            raise ValueError(
                "recompute is True and activation checkpointing is on, which does more of the same: use one of them"
            )
        self.execution = execution
        for module in self.modules():
            if isinstance(module, ResidualNorm | Mlp):
                module.execution = execution

    def set_regions(self, regions: Regions | None) -> None:
        """Run the blocks' bodies through ``regions`` in training steps of their batch size; None: eagerly.
        `engine.compiling` makes regions and checks them.
        """
        self.regions = regions or Regions()
        for module in self.modules():
            if isinstance(module, Block | DecoderBlock):
                module.regions = self.regions

    def resolve_attention(self, device: torch.device) -> dict[str, AttentionBackend]:
        """Choose the attention backends of encoder and decoders, once for each ``device`` and dtype in use.

        The first forward pass does it unless a caller, who wants to print the choice, did.
        """
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else self.weight_dtype
        if self._resolved_for == (device, dtype):
            return self.attention_backends
        for layer in self.modules():
            if not isinstance(layer, HeadedAttention):
                continue
            purpose = "cross" if isinstance(layer, CrossAttention) else "self"
            layer.backend = resolve_attention_backend(
                self.config.attention, device=device, dtype=dtype, head_dim=layer.head_dim, purpose=purpose
            )
            self.attention_backends[f"{purpose}, head size {layer.head_dim}"] = layer.backend
        self._resolved_for = (device, dtype)
        return self.attention_backends

    def _resolve_mask(self, images: Tensor, noise: Tensor | None, mask: PatchMask | None) -> PatchMask:
        """The mask to use, after checking the shapes of all inputs."""
        config = self.config
        size = (config.image_height, config.image_width)
        expected = (*size, config.channels) if image_layout(images) == "BHWC" else (config.channels, *size)
        if tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"images have shape {list(images.shape)} and dtype {images.dtype}: this model takes uint8 "
                f"[B, {size[0]}, {size[1]}, {config.channels}] or float [B, {config.channels}, {size[0]}, {size[1]}]"
            )
        if (noise is None) == (mask is None):
            raise ValueError(
                "give noise [B, N], or a mask: exactly one of them (the model itself draws no random numbers)"
            )
        wanted = (len(images), config.num_patches)
        if mask is None:
            if tuple(noise.shape) != wanted:
                raise ValueError(f"noise has shape {list(noise.shape)}: give [batch, patches] = {list(wanted)}")
            return mask_from_noise(noise, config.mask_ratio)
        if tuple(mask.ids_restore.shape) != wanted:
            raise ValueError(f"mask is of shape {list(mask.ids_restore.shape)}: give [batch, patches] = {list(wanted)}")
        return mask
