"""Match other code's weights with ours: infer the configuration from their shapes, and pair their keys with our names.

A `Layout` describes one kind of foreign state dict. It names the fixed positions too, which are compared with ours and
dropped.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from mirl.engine.models.config import MODEL_NAMES, ModelConfig, model_config
from mirl.engine.models.mirl import MIRL
from mirl.errors import UserError

# (objective, depth, width, segments, decoder width, decoder depth) -> (heads, decoder heads), which no weight's shape
# tells. The first rows are the sizes of the paper, the last three those of facebookresearch/mae.
_KNOWN_HEADS = {
    ("mirl", c.depth, c.width, c.segments, c.decoder_width, c.decoder_depth): (c.heads, c.decoder_heads)
    for c in (model_config(name, variant="release") for name in MODEL_NAMES)
} | {
    ("mae", 12, 768, 1, 512, 8): (12, 16),
    ("mae", 24, 1024, 1, 512, 8): (16, 16),
    ("mae", 32, 1280, 1, 512, 8): (16, 16),
}

# Fields of a model without inner segments: a MAE, or an encoder of which nothing more is known.
ENCODER_ALONE: Mapping[str, Any] = MappingProxyType({"objective": "mae", "segments": 1, "did": False})


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A layout describes one kind of state dict.

    our_key: our name of a parameter, None if it has none. positions: keys of fixed tables; that of a decoder's table
    contains "decoder". fields: the `ModelConfig` fields that follow from the decoders' shapes; `ENCODER_ALONE` without
    decoders.
    """

    title: str
    our_key: Callable[[str], str | None]
    positions: re.Pattern[str]
    fields: Callable[[Mapping[str, Tensor]], Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Match:
    """A match tells how a state dict fits a model.

    weights: by our names. tables: keys of positions that equal ours. missing: our names. unknown: their names.
    problems: each key that is known but wrong, in words.
    """

    weights: dict[str, Tensor]
    tables: list[str]
    missing: list[str]
    unknown: list[str]
    problems: list[str]


def match_weights(state: Mapping[str, Tensor], layout: Layout, model: MIRL) -> Match:
    """Find each of ``model``'s weights and buffers in ``state``, as float32 on the CPU. ``model`` stays as it is."""
    expected = {name: value.shape for name, value in model.state_dict().items()}
    weights: dict[str, Tensor] = {}
    tables, unknown, problems = [], [], []
    for key, value in state.items():
        if layout.positions.fullmatch(key):
            ours = model.decoder_pos_embed if "decoder" in key else model.encoder.pos_embed
            if _same_table(value, ours):
                tables.append(key)
            else:
                problems.append(f"{key} is not the fixed sin-cos table of this model's image size")
            continue
        name = layout.our_key(key)
        if name not in expected:
            unknown.append(key)
            continue
        shape = expected[name]
        if value.shape != shape and value.squeeze().shape != torch.Size(size for size in shape if size != 1):
            turned = " (it is transposed)" if value.ndim == 2 and value.t().shape == shape else ""
            problems.append(f"{key} has shape {list(value.shape)}, {name} needs {list(shape)}{turned}")
            continue
        # A copy, because tensors of one file may share memory.
        weights[name] = value.detach().to("cpu", torch.float32, copy=True).reshape(shape).contiguous()
        if strange := int((~weights[name].isfinite()).sum()):
            problems.append(f"{key} holds {strange} of {value.numel()} numbers that are NaN or infinite")
    missing = [name for name in expected if name not in weights]
    return Match(weights=weights, tables=tables, missing=missing, unknown=unknown, problems=problems)


def infer_config(
    state: Mapping[str, Tensor],
    layout: Layout,
    *,
    image_size: tuple[int, int] | None = None,
    heads: int | None = None,
    decoder_heads: int | None = None,
    **given: Any,
) -> ModelConfig:
    """Infer the model of ``state`` from the shapes of its weights.

    image_size: (height, width); None: a square with as many patches as there are positions. heads, decoder_heads: None
    for those of a published size. given: further fields of `ModelConfig`.
    UserError where something needed is not there and was not given.
    """
    projection = state.get("patch_embed.proj.weight")
    depth = count(state, r"blocks\.(\d+)\..+")
    if projection is None or projection.ndim != 4 or depth == 0:
        raise UserError("it has no convolution patch_embed.proj.weight and blocks.0, ...: it is no Vision Transformer")
    width, channels, patch_size, _ = projection.shape
    hidden = state.get("blocks.0.mlp.fc1.bias")
    fields = {"depth": depth, "width": width, "patch_size": patch_size, "channels": channels}
    fields |= {"mlp_ratio": len(hidden) / width} if hidden is not None and hidden.ndim == 1 else {}
    fields |= dict(layout.fields(state))
    height, image_width = image_size or _square(state, patch_size)
    fields |= {"image_height": height, "image_width": image_width}
    fields |= _heads(fields, heads, decoder_heads) | given
    config = ModelConfig(**fields)
    sizes = {name: model_config(name) for name in MODEL_NAMES}
    same = [name for name, size in sizes.items() if _encoder_size(size) == _encoder_size(config)]
    return ModelConfig(**(fields | {"name": same[0]})) if same else config


def count(state: Mapping[str, Tensor], pattern: str) -> int:
    """Count the different numbers that the first group of ``pattern`` takes in the keys of ``state``."""
    return len({match[1] for key in state if (match := re.fullmatch(pattern, key))})


def first(problems: list[str], limit: int = 5) -> str:
    """Name the first few problems, and say how many more there are."""
    more = f"; and {len(problems) - limit} more" if len(problems) > limit else ""
    return "; ".join(problems[:limit]) + more


def _encoder_size(config: ModelConfig) -> tuple[int, int, int]:
    return config.depth, config.width, config.heads


def _heads(fields: Mapping[str, Any], heads: int | None, decoder_heads: int | None) -> dict[str, int]:
    depth, width = fields["depth"], fields["width"]
    decoders = "decoder_width" in fields
    if heads is None:
        heads = next((value[0] for key, value in _KNOWN_HEADS.items() if key[1:3] == (depth, width)), None)
    if decoders and decoder_heads is None:
        names = ("objective", "depth", "width", "segments", "decoder_width", "decoder_depth")
        decoder_heads = _KNOWN_HEADS.get(tuple(fields.get(name, "mirl") for name in names), (None, None))[1]
    size = f"{depth} blocks {width} wide"
    if decoders:
        size += f" and {fields['segments']} decoders of {fields['decoder_depth']} blocks {fields['decoder_width']} wide"
    flags = ["--heads"] * (heads is None) + ["--decoder-heads"] * (decoders and decoder_heads is None)
    if flags:
        raise UserError(
            f"it has {size}, no published size, and weights do not tell the number of heads: give {' and '.join(flags)}"
        )
    return {"heads": heads} | ({"decoder_heads": decoder_heads} if decoders else {})


def _square(state: Mapping[str, Tensor], patch_size: int) -> tuple[int, int]:
    table = state.get("pos_embed")
    if table is None or table.ndim < 2:
        raise UserError("it has no table pos_embed, which would tell the image size: give --image-size")
    patches = table.shape[-2] - 1
    side = math.isqrt(patches)
    if side * side != patches:
        raise UserError(f"its pos_embed is of {patches} patches, not a square of them: give --image-size HxW")
    return side * patch_size, side * patch_size


def _same_table(value: Tensor, ours: Tensor) -> bool:
    value = value.detach().to("cpu")
    # 1e-5 allows for other libraries' sin and cos in float32; a shorter dtype rounds values up to 1 by its eps.
    tolerance = max(1e-5, torch.finfo(value.dtype).eps) if value.is_floating_point() else 0.0
    if value.shape[-2:] != ours.shape or value.numel() != ours.numel():
        return False
    return torch.allclose(value.float().reshape(ours.shape), ours.float().cpu(), rtol=0, atol=tolerance)
