"""Write the encoder under the names of mmsegmentation's backbone MAE (and of BEiT and mmpretrain's Vision Transformer).

| timm, and here                | there                                 |
|-------------------------------|---------------------------------------|
| patch_embed.proj              | patch_embed.projection                |
| blocks.i.norm1, norm2         | layers.i.ln1, ln2                     |
| blocks.i.attn.qkv, attn.proj  | layers.i.attn.qkv, attn.proj          |
| blocks.i.mlp.fc1, fc2         | layers.i.ffn.layers.0.0, ffn.layers.1 |
| norm                          | ln1, which it has with final_norm     |

Source: mmsegmentation 1.2.2, mmseg/models/backbones/mae.py and tools/model_converters/beit2mmseg.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

_RULES = (
    (r"patch_embed\.proj\.", "patch_embed.projection."),
    (r"blocks\.(\d+)\.norm(\d)\.", r"layers.\1.ln\2."),
    (r"blocks\.(\d+)\.mlp\.fc1\.", r"layers.\1.ffn.layers.0.0."),
    (r"blocks\.(\d+)\.mlp\.fc2\.", r"layers.\1.ffn.layers.1."),
    (r"blocks\.(\d+)\.attn\.", r"layers.\1.attn."),
    (r"norm\.", "ln1."),
)


def mmseg_state_dict(encoder: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename ``encoder``, which has timm's names, to those of mmsegmentation's MAE."""
    return {_renamed(key): value for key, value in encoder.items()}


def _renamed(key: str) -> str:
    for pattern, theirs in _RULES:
        if match := re.match(pattern, key):
            return match.expand(theirs) + key[match.end() :]
    assert key in ("cls_token", "pos_embed"), key
    return key
