"""These choices say how the blocks of a model are computed: attention, kernels, compiled regions, recomputation.

The models of all kinds of run share them. No choice changes what is computed.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from mirl.engine.models.checkpointing import CheckpointFunction, CheckpointPlan
from mirl.engine.models.config import ModelConfig
from mirl.engine.models.decoder import Decoder, DecoderBlock
from mirl.engine.models.encoder import Encoder
from mirl.engine.models.execution import Execution, Regions
from mirl.engine.models.layers import Block, CrossAttention, HeadedAttention, Mlp, ResidualNorm
from mirl.engine.models.pixels import image_layout
from mirl.errors import UserError
from mirl.kernels import AttentionBackend, resolve_attention_backend

# ViT-S at 64 x 64 patches on two CPU cores: SDPA takes half the time of `math` and a third of the memory.
LONG_SEQUENCE = 2048


def spares_matrix(config: ModelConfig, *, on_gpu: bool) -> bool:
    """Say whether ``auto`` attention takes SDPA on a CPU because the sequence is long.

    For short sequences the backend `math` is faster there.
    """
    return config.attention == "auto" and not on_gpu and config.num_patches >= LONG_SEQUENCE


class ComputeChoices(nn.Module):
    """This is the base of a model with an ``encoder``. A forward pass begins with `choose`."""

    encoder: Encoder

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.attention_backends: dict[str, AttentionBackend] = {}
        self._resolved_for: tuple[torch.device, torch.dtype] | None = None
        self.execution: Execution | None = None
        self.regions = Regions()
        self.position_tables: dict[tuple[str, tuple[int, int]], Tensor] = {}  # of `mirl.engine.models.resizing`

    @property
    def weight_dtype(self) -> torch.dtype:
        """The parameters have this dtype. Buffers may differ, because DeepSpeed can cast parameters alone."""
        return self.encoder.cls_token.dtype

    def choose(self, images: Tensor, *, plain: bool = False) -> None:
        """Make the choices that no caller made. ``plain``: an unusual pass, for which no region was compiled.

        Raises UserError for images of another shape than the model's.
        """
        self._check_images(images)
        self.resolve_attention(images.device)
        if self.execution is None:
            self.set_execution(Execution.for_device(images.device))
        self.regions.active = self.training and not plain and len(images) == self.regions.batch

    def trial_loss(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return a scalar that every parameter has a part in, for a step that is only tried.

        ``generator`` is a generator of the CPU.
        """
        raise NotImplementedError

    def set_activation_checkpointing(self, mode: str | int, checkpoint_fn: CheckpointFunction | None = None) -> None:
        """Recompute activations in the backward pass instead of keeping them; results are the same to the bit.

        mode: "none"; "every": each block alone; "segments": an encoder segment, or a decoder, at a time; n: n blocks.
        checkpoint_fn(function, *tensors): torch's non-reentrant checkpoint by default.
        """
        plan = CheckpointPlan.make(mode, checkpoint_fn)
        for module in self.modules():
            if isinstance(module, Encoder | Decoder):
                module.checkpointing = plan

    def set_execution(self, execution: Execution) -> None:
        """Set how norms and GELUs are computed. By default the first forward pass takes what suits its device.

        Raises UserError if ``recompute`` meets activation checkpointing, which recomputes norms and GELUs already.
        """
        if execution.recompute and self.encoder.checkpointing.group != 0:
            raise UserError(
                "recompute is True and activation checkpointing is on, which does more of the same: use one of them"
            )
        self.execution = execution
        for module in self.modules():
            if isinstance(module, ResidualNorm | Mlp):
                module.execution = execution

    def set_regions(self, regions: Regions | None) -> None:
        """Run the blocks' bodies through ``regions`` in training steps of their batch size; None: run them eagerly.
        `mirl.engine.training.compiling` makes regions and checks them.
        """
        self.regions = regions or Regions()
        for module in self.modules():
            if isinstance(module, Block | DecoderBlock):
                module.regions = self.regions

    def resolve_attention(self, device: torch.device) -> dict[str, AttentionBackend]:
        """Choose the attention backends of all layers, once for each ``device`` and dtype in use.

        The first forward pass chooses them, unless a caller who wants to print the choice did so before.
        """
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else self.weight_dtype
        if self._resolved_for == (device, dtype):
            return self.attention_backends
        long = spares_matrix(self.config, on_gpu=device.type == "cuda")
        for layer in self.modules():
            if not isinstance(layer, HeadedAttention):
                continue
            purpose = "cross" if isinstance(layer, CrossAttention) else "self"
            layer.backend = resolve_attention_backend(
                "sdpa" if long else self.config.attention, device=device, dtype=dtype, head_dim=layer.head_dim,
                purpose=purpose,
            )  # fmt: skip
            if long:
                reason = f"auto: {self.config.num_patches} patches, whose matrix of weights is not kept"
                layer.backend = replace(layer.backend, reason=reason)
            self.attention_backends[f"{purpose}, head size {layer.head_dim}"] = layer.backend
        self._resolved_for = (device, dtype)
        return self.attention_backends

    def set_layer_attention(self, layer: HeadedAttention, backend: AttentionBackend) -> None:
        """Give one layer ``backend`` for the passes that `resolve_attention` was last called for."""
        layer.backend = backend
        kind = isinstance(layer, CrossAttention)
        alike = [
            other.backend for other in self.modules()
            if isinstance(other, HeadedAttention) and other.head_dim == layer.head_dim
            and isinstance(other, CrossAttention) == kind and isinstance(other.backend, AttentionBackend)
        ]  # fmt: skip
        label = f"{'cross' if kind else 'self'}, head size {layer.head_dim}"
        names = " and ".join(dict.fromkeys(other.name for other in alike))
        self.attention_backends[label] = AttentionBackend(names, backend.reason)

    def set_attention(self, backend: AttentionBackend, device: torch.device, dtype: torch.dtype) -> None:
        """Give every layer ``backend``, untried, for passes on ``device`` in ``dtype``."""
        for layer in self.modules():
            if isinstance(layer, HeadedAttention):
                layer.backend = backend
        self.attention_backends = {"all": backend}
        self._resolved_for = (device, dtype)

    def _check_images(self, images: Tensor) -> None:
        config = self.config
        size = (config.image_height, config.image_width)
        expected = (*size, config.channels) if image_layout(images) == "BHWC" else (config.channels, *size)
        if tuple(images.shape[1:]) != expected:
            raise UserError(
                f"images have shape {list(images.shape)} and dtype {images.dtype}: this model takes uint8 "
                f"[B, {size[0]}, {size[1]}, {config.channels}] or float [B, {config.channels}, {size[0]}, {size[1]}]"
            )
