"""Checkpoints of facebookresearch/mae, with or without their decoder, are read by these keys.

| facebookresearch/mae                        | here                                 |
|---------------------------------------------|--------------------------------------|
| cls_token, patch_embed.*, blocks.i.*, norm.*| encoder.*                            |
| decoder_embed.*                             | embeds.1                             |
| mask_token                                  | mask_token                           |
| decoder_blocks.i.*                          | decoders.1.blocks.i                  |
| decoder_norm.*, decoder_pred.*              | decoders.1.norm, decoders.1.head     |
| pos_embed, decoder_pos_embed                | compared with ours, then dropped     |

Rows of decoder_pred are pixels in (p, q, c) order on both sides.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mirl.engine.models.interop.match import ENCODER_ALONE, Layout, count

_RULES: tuple[tuple[str, str], ...] = (
    (r"(cls_token|patch_embed\.proj\.(?:weight|bias)|blocks\..+|norm\.(?:weight|bias))", r"encoder.\1"),
    (r"decoder_embed\.(weight|bias)", r"embeds.1.\1"),
    (r"mask_token", r"mask_token"),
    (r"decoder_blocks\.(.+)", r"decoders.1.blocks.\1"),
    (r"decoder_norm\.(weight|bias)", r"decoders.1.norm.\1"),
    (r"decoder_pred\.(weight|bias)", r"decoders.1.head.\1"),
)


def our_key(key: str) -> str | None:
    """Return our name of a parameter of MAE; None if it has none."""
    for pattern, ours in _RULES:
        if match := re.fullmatch(pattern, key):
            return match.expand(ours)
    return None


def decoder_fields(state: Mapping[str, Tensor]) -> Mapping[str, Any]:
    """Return the `ModelConfig` fields of a MAE with these weights."""
    embed = state.get("decoder_embed.bias")
    depth = count(state, r"decoder_blocks\.(\d+)\..+")
    if embed is None or embed.ndim != 1 or depth == 0:
        return ENCODER_ALONE
    return {**ENCODER_ALONE, "decoder_width": len(embed), "decoder_depth": depth}


MAE = Layout(
    title="facebookresearch/mae",
    our_key=our_key,
    positions=re.compile("pos_embed|decoder_pos_embed"),
    fields=decoder_fields,
)
