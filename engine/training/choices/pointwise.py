"""The choices of the residual norm and of the GELU: our kernels, plain torch, or what the compiler makes of it. And
whether our norm, where it is used, adds the bias of the Linear before it ("norm"), or the product does ("product").

Outside compiled regions it is our kernel ("ours") or plain torch ("torch"), inside them our kernel or the compiler
("inductor"), which also fuses with what stands around and is timed here without that.

Letters: B batch, S positions, D width, F width of the hidden layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mirl.engine.models.layers import NORM_EPS, Mlp, ResidualNorm
from mirl.engine.training.choices.declaration import Choice, Compiled, Implementation, Note, Use, random_leaf
from mirl.kernels import bias_gelu, residual_layer_norm

OURS, PLAIN, COMPILED = "ours", "torch", "inductor"
IN_PRODUCT, IN_NORM = "product", "norm"
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4, torch.float64: 1e-9}


def _left_open(model: Any, run: Any, in_region: bool) -> bool:
    # In a region recomputation is the partitioner's, which makes nothing again that a kernel of ours returned.
    return run.fused == "auto" and not (in_region and model.execution.recompute)


def _pair(plain: Callable[..., Any], ours: Callable[..., Any], use: Use) -> Mapping[str, Implementation]:
    """Inside a region plain torch is no candidate by itself, for the compiler takes it over."""
    return {COMPILED: Compiled(plain), OURS: ours} if use.in_region else {PLAIN: plain, OURS: ours}


def _watch_norm(module: nn.Module, note: Note) -> Callable[[], None] | None:
    if not isinstance(module, ResidualNorm):
        return None

    def told(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        x, delta = (*arguments, None)[:2]
        # One row of a table stands for every image, so it is no batch.
        sizes = {"B": len(x), "S": x.shape[1], "D": x.shape[-1], "sum": "no" if delta is None else "yes"}
        note(sizes, x.dtype)

    return module.register_forward_pre_hook(told).remove


def _norm_inputs(use: Use, device: torch.device, generator: torch.Generator) -> Sequence[Tensor]:
    rows, vector = (use["B"], use["S"], use["D"]), (use["D"],)
    shapes = [rows, rows, vector, vector] if use["sum"] == "yes" else [rows, vector, vector]
    return [random_leaf(shape, use, device, generator) for shape in shapes]


def _norm_parts(leaves: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    return leaves if len(leaves) == 4 else (leaves[0], None, *leaves[1:])  # type: ignore[return-value]


def _plain_norm(*leaves: Tensor) -> tuple[Tensor, Tensor]:
    x, delta, weight, bias = _norm_parts(leaves)
    total = x if delta is None else x + delta
    return total, F.layer_norm(total, weight.shape, weight, bias, NORM_EPS)


def _our_norm(*leaves: Tensor) -> tuple[Tensor, Tensor]:
    return residual_layer_norm(*_norm_parts(leaves), NORM_EPS)


def _watch_bias(module: nn.Module, note: Note) -> Callable[[], None] | None:
    if not (isinstance(module, ResidualNorm) and module.after_linear):
        return None

    def told(module: nn.Module, arguments: tuple[Tensor | None, ...]) -> None:
        x, delta = (*arguments, None)[:2]
        if delta is not None:
            note({"B": len(x), "S": x.shape[1], "D": x.shape[-1]}, x.dtype)

    return module.register_forward_pre_hook(told).remove


def _bias_inputs(use: Use, device: torch.device, generator: torch.Generator) -> Sequence[Tensor]:
    rows, vector = (use["B"], use["S"], use["D"]), (use["D"],)
    x, branch = (random_leaf(rows, use, device, generator) for _ in range(2))
    matrix = random_leaf((use["D"], use["D"]), use, device, generator, scale=use["D"] ** -0.5)
    return [x, branch, matrix, *(random_leaf(vector, use, device, generator) for _ in range(3))]


# With the Linear before it, of one width: that of the MLP's branch has a longer inner size.
def _bias_in_product(
    x: Tensor, branch: Tensor, matrix: Tensor, linear_bias: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    return residual_layer_norm(x, F.linear(branch, matrix, linear_bias), weight, bias, NORM_EPS)


def _bias_in_norm(
    x: Tensor, branch: Tensor, matrix: Tensor, linear_bias: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    return residual_layer_norm(x, F.linear(branch, matrix), weight, bias, NORM_EPS, linear_bias)


def _plain_bias(
    x: Tensor, branch: Tensor, matrix: Tensor, linear_bias: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    return _plain_norm(x, F.linear(branch, matrix, linear_bias), weight, bias)


def _apply_bias(model: Any, module: Any, name: str, in_region: bool) -> None:
    module.execution = replace(module.execution, bias_in_norm=name == IN_NORM)


def _watch_gelu(module: nn.Module, note: Note) -> Callable[[], None] | None:
    if not isinstance(module, Mlp):
        return None

    def told(linear: Any, arguments: tuple[Any, ...]) -> None:
        x = arguments[0]
        note({"B": len(x), "S": x.shape[1], "D": x.shape[-1], "F": linear.out_features}, x.dtype)

    return module.fc1.register_forward_pre_hook(told).remove


def _gelu_inputs(use: Use, device: torch.device, generator: torch.Generator) -> Sequence[Tensor]:
    x = random_leaf((use["B"], use["S"], use["D"]), use, device, generator)
    weight = random_leaf((use["F"], use["D"]), use, device, generator, scale=use["D"] ** -0.5)
    return [x, weight, random_leaf((use["F"],), use, device, generator)]


# With the Linear before it, whose product adds the bias for nothing where the GELU does not.
def _plain_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight, bias))


def _our_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return bias_gelu(F.linear(x, weight), bias)


def _switch(outside: str, inside: str) -> dict[str, Any]:
    """``current`` and ``apply`` of a choice that stands in two fields of `Execution`."""

    def current(module: Any, in_region: bool) -> str:
        if getattr(module.execution, inside if in_region else outside):
            return OURS
        return COMPILED if in_region else PLAIN

    def apply(model: Any, module: Any, name: str, in_region: bool) -> None:
        module.execution = replace(module.execution, **{inside if in_region else outside: name == OURS})

    return {"current": current, "apply": apply}


NORM = Choice(
    name="norm", left_open=_left_open, watch=_watch_norm, inputs=_norm_inputs, tolerance=TOLERANCE,
    candidates=lambda use, device: _pair(_plain_norm, _our_norm, use), reference=lambda use: _plain_norm,
    **_switch("fused_norm", "norm_in_regions"),
)  # fmt: skip
BIAS = Choice(
    name="bias", left_open=_left_open, watch=_watch_bias, inputs=_bias_inputs, tolerance=TOLERANCE,
    candidates=lambda use, device: {IN_PRODUCT: _bias_in_product, IN_NORM: _bias_in_norm},
    reference=lambda use: _plain_bias, apply=_apply_bias,
    current=lambda module, in_region: IN_NORM if module.execution.bias_in_norm else IN_PRODUCT,
)  # fmt: skip
GELU = Choice(
    name="gelu", left_open=_left_open, watch=_watch_gelu, inputs=_gelu_inputs, tolerance=TOLERANCE,
    candidates=lambda use, device: _pair(_plain_gelu, _our_gelu, use), reference=lambda use: _plain_gelu,
    **_switch("fused_gelu", "gelu_in_regions"),
)  # fmt: skip
