"""The choice of attention: SDPA, its kernels by name, xformers, ours, and two products with a softmax between them.

Letters: B batch, S queries, T keys, H heads, d head size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mirl.engine.models.layers import HeadedAttention
from mirl.engine.training.choices.declaration import Choice, Implementation, Note, Use, random_leaf
from mirl.kernels.attention import CANDIDATES, AttentionBackend, own_packed_attention, packed_attention

# How queries, keys and values lie in memory: parts of one buffer [B, S, 3Hd], as an encoder block has them; two
# buffers; and keys and values of densely connected inputs, whose tokens come first.
PACKED, APART, TOKENS_FIRST = "packed", "apart", "tokens-first"


def _watch(module: nn.Module, note: Note) -> Callable[[], None] | None:
    if not isinstance(module, HeadedAttention):
        return None
    attend = module.attend

    def told(q: Tensor, kv_BT2D: Tensor | None = None, **biases: Tensor | None) -> Tensor:
        kv = q if kv_BT2D is None else kv_BT2D
        layout = PACKED if kv is q else TOKENS_FIRST if kv.stride(0) < kv.stride(1) else APART
        sizes = {"B": len(q), "S": q.shape[1], "T": kv.shape[1], "H": module.heads, "d": module.head_dim}
        note(sizes | {"layout": layout}, q.dtype)
        return attend(q, kv_BT2D, **biases)

    module.attend = told  # type: ignore[method-assign]
    return lambda: delattr(module, "attend")


def _inputs(use: Use, device: torch.device, generator: torch.Generator) -> Sequence[Tensor]:
    batch, queries, keys, width = use["B"], use["S"], use["T"], use["H"] * use["d"]
    if use["layout"] == PACKED:
        return [random_leaf((batch, queries, 3 * width), use, device, generator)]
    kv_shape = (keys, batch, 2 * width) if use["layout"] == TOKENS_FIRST else (batch, keys, 2 * width)
    return [random_leaf(shape, use, device, generator) for shape in ((batch, queries, width), kv_shape)]


def _on_leaves(name: str, use: Use) -> Implementation:
    """What a layer would call, but that our kernels say where their limits are."""

    def run(q: Tensor, kv: Tensor | None = None) -> Tensor:
        if kv is not None and use["layout"] == TOKENS_FIRST:
            kv = kv.transpose(0, 1)
        if name == "own":
            return own_packed_attention(q, kv, use["H"])
        return packed_attention(q, kv, use["H"], backend=AttentionBackend(name, "a candidate"))

    return run


def _candidates(use: Use, device: torch.device) -> Mapping[str, Implementation]:
    return {name: _on_leaves(name, use) for name in CANDIDATES[device.type]}


def _current(module: Any, in_region: bool) -> str:
    return module.backend.name


def _apply(model: Any, module: Any, name: str, in_region: bool) -> None:
    model.set_layer_attention(module, AttentionBackend(name, "by the table of choices"))


ATTENTION = Choice(
    name="attention",
    left_open=lambda model, run, in_region: model.config.attention == "auto",
    watch=_watch,
    inputs=_inputs,
    candidates=_candidates,
    reference=lambda use: _on_leaves("math", use),
    tolerance={torch.bfloat16: 2e-2, torch.float32: 1e-4, torch.float64: 1e-9},
    current=_current,
    apply=_apply,
)
