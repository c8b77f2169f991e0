"""An operator of a training step moves so many bytes, has so many FLOPs, and launches so many kernels.

Bytes are those of every tensor that is read, each counted once, and of every tensor that is written. A kernel moves
them if no cache keeps anything between operators. An operator that only picks rows reads no more than it writes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from mirl.kernels.registration import INLINED

CLASSES = ("gemm", "attention", "norm", "gelu", "copies", "sums", "elementwise", "tokens", "loss", "optimiser")
_CLASS_OF = {
    "mm": "gemm", "addmm": "gemm", "addmm_": "gemm", "bmm": "gemm", "baddbmm": "gemm", "convolution": "gemm",
    "convolution_backward": "gemm",
    "sum": "sums", "mean": "sums",
    "copy_": "copies", "_to_copy": "copies", "clone": "copies", "cat": "copies", "stack": "copies", "fill_": "copies",
    "zero_": "copies", "zeros": "copies", "zeros_like": "copies", "new_zeros": "copies", "full": "copies",
    "ones_like": "copies", "slice_backward": "copies", "select_backward": "copies", "split_with_sizes_copy": "copies",
}  # fmt: skip
_CLASS_BY_PART = {
    "attention": "attention", "masked_residual": "loss", "scale_diff": "loss", "layer_norm": "norm", "gelu": "gelu",
    "gather": "tokens", "scatter": "tokens", "assemble": "tokens", "embedding": "tokens", "index": "tokens",
    "sort": "tokens", "arange": "tokens",
}  # fmt: skip
# Allocations and views launch nothing.
_FREE = {
    "empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "alias", "lift_fresh",
    "_unsafe_view",
}  # fmt: skip
# These operators are more than one kernel: a sum has a second stage; FlashAttention's gradient of q has a zero-fill,
# the main part and a conversion.
_LAUNCHES = {
    "native_layer_norm_backward": 2,
    "residual_layer_norm_backward": 2,
    "bias_gelu_backward": 2,
    "scatter_tokens_backward": 2,
    "masked_residual_mse": 2,
    "_scaled_dot_product_flash_attention_backward": 3,
    "short_attention_backward": 2,  # the second stage sums the gradients of the biases
    "decoder_attention_backward": 2,
    "sort": 3,
}
_PICKS_ROWS = {"embedding", "gather", "index", "index_select", "gather_tokens", "gather_patches", "assemble_tokens"}
# Our attention kernels, with the place of the number of heads among their arguments.
OWN_ATTENTION = {
    "short_attention": 2, "short_attention_backward": 2, "decoder_attention": 2, "decoder_attention_backward": 5,
}  # fmt: skip
# The host has to wait for these: their results are numbers, or tensors of a size that only the device knows.
WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "_unique2", "masked_select"}


@dataclass(frozen=True)
class Operator:
    """``shape`` is (rows, columns, inner size) of a product, (B, H, queries, keys, head size) of attention, else ()."""

    name: str
    phase: str
    kind: str
    launches: int
    bytes: float
    flops: float
    shape: tuple[int, ...] = ()


def class_of(name: str) -> str:
    """Return the class of ATen or kernel operator ``name``, one of `CLASSES`."""
    if name in _CLASS_OF:
        return _CLASS_OF[name]
    return next((kind for part, kind in _CLASS_BY_PART.items() if part in name), "elementwise")


def read_operator(func: Any, args: Any, kwargs: Any, out: Any, phase: str) -> Operator | None:
    """Return the cost of the call ``func(*args, **kwargs)``, whose result was ``out``; None if nothing is launched."""
    name = func._schema.name.split("::")[1].removesuffix(INLINED)
    read = {key: value for key, value in (kwargs or {}).items() if key != "out"}
    inputs, outputs = _tensors((args, read)), _tensors(out)
    if name in _FREE or (not func._schema.is_mutable and _only_views(inputs, outputs)):
        return None
    written = sum(map(_bytes, outputs))
    seen: dict[Any, int] = {}
    for tensor in inputs:
        size = min(_bytes(tensor), written) if name in _PICKS_ROWS else _bytes(tensor)
        seen[tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape)] = size
    flops, shape = _own_attention(name, args) if name in OWN_ATTENTION else _work(name, inputs, outputs)
    return Operator(
        name=name, phase=phase, kind=class_of(name), launches=_LAUNCHES.get(name, 1),
        bytes=sum(seen.values()) + written, flops=flops, shape=shape,
    )  # fmt: skip


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _only_views(inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    storages = {tensor.untyped_storage()._cdata for tensor in inputs}
    return bool(outputs) and all(tensor.untyped_storage()._cdata in storages for tensor in outputs)


def _bytes(tensor: Tensor) -> int:
    """Count the elements that lie in memory: an expanded axis is read once."""
    values = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        values *= size if stride != 0 else min(size, 1)
    return values * tensor.element_size()


def _work(name: str, inputs: list[Tensor], outputs: list[Tensor]) -> tuple[float, tuple[int, ...]]:
    """Return the FLOPs of products and attention, with their shape. Other operators move bytes and have none."""
    if name in ("mm", "addmm", "addmm_", "bmm", "baddbmm"):
        left, right = inputs[-2:]
        batch = left.shape[0] if left.ndim == 3 else 1
        rows, inner, columns = left.shape[-2], left.shape[-1], right.shape[-1]
        return 2.0 * batch * rows * inner * columns, (batch * rows, columns, inner)
    if name == "convolution":
        image, weight = inputs[0], inputs[1]
        rows = outputs[0].numel() // weight.shape[0]
        return 2.0 * rows * weight.numel(), (rows, weight.shape[0], weight[0].numel())
    if name == "convolution_backward":
        grad, image, weight = inputs[:3]
        rows, wanted = grad.numel() // weight.shape[0], sum(tensor.ndim == 4 for tensor in outputs)
        return 2.0 * wanted * rows * weight.numel(), (rows, weight.shape[0], weight[0].numel())
    if "attention" in name:
        backward = "backward" in name
        query, key = inputs[1:3] if backward else inputs[:2]
        batch, heads, queries, size = query.shape
        # The forward pass has two products; the backward pass has five, one of which makes the weights again.
        flops = (10.0 if backward else 4.0) * batch * heads * queries * key.shape[2] * size
        return flops, (batch, heads, queries, key.shape[2], size)
    return 0.0, ()


def _own_attention(name: str, args: Any) -> tuple[float, tuple[int, ...]]:
    """Count as `_work` does, for buffers with all heads side by side. Without ``kv`` q's buffer holds all three."""
    query, heads = args[0], args[OWN_ATTENTION[name]]
    kv = args[1] if name.startswith("decoder") else None
    batch, queries, width = query.shape
    keys, width = (queries, width // 3) if kv is None else (kv.shape[1], width)
    flops = (10.0 if name.endswith("backward") else 4.0) * batch * queries * keys * width
    return flops, (batch, heads, queries, keys, width // heads)
