"""How large the activations of each block are in one forward pass: what tells where a step went wrong.

Letters: B rows that a block sees (images, or parts of one), S tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mirl.engine.models.decoder import DecoderBlock
from mirl.engine.models.layers import Block

GREW = 2.0
"""Times the other forward pass's, from which a block's activations count as grown: a healthy block's largest image is
within a few parts in ten of another batch's.
"""


@dataclass(frozen=True)
class BlockScale:
    """Of one block: its name in the model, the largest root mean square of an image's activations in its result (NaN
    where one is not finite), and which image that was, None where rows are no images.
    """

    name: str
    scale: float
    image: int | None


def block_scales(model: nn.Module, forward: Callable[[], Any], images: int) -> list[BlockScale]:
    """Measure every block of ``model`` during ``forward()``, a pass over ``images`` images, in the order they ran.

    Nothing is left behind: gradients are off, and buffers and torch's random state are put back.
    """
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = sorted({parameter.device.index or 0 for parameter in model.parameters() if parameter.is_cuda})
    with torch.no_grad(), torch.random.fork_rng(devices), _watched(model) as rows:
        forward()
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    return [_largest(name, rows_B, images) for name, rows_B in rows.items()]


def first_grown(found: Sequence[BlockScale], beside: Sequence[BlockScale]) -> tuple[BlockScale, float] | None:
    """The first block of ``found`` that is `GREW` times as large as in ``beside``, or not finite; and how many times.

    None where no block is, as when the weights are at fault, with which both passes were made.
    """
    before = {block.name: block.scale for block in beside}
    for block in found:
        times = block.scale / before[block.name] if before.get(block.name) else float("nan")
        if not times < GREW and block.name in before:
            return block, times
    return None


def _largest(name: str, rows_B: Tensor, images: int) -> BlockScale:
    row = int(rows_B.nan_to_num(nan=float("inf")).argmax())
    parts, rest = divmod(len(rows_B), images)
    return BlockScale(name, float(rows_B[row]), None if rest or not parts else row // parts)


@contextmanager
def _watched(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """By block, in the order they ran, the root mean squares of the rows of its result: float32 [B]."""
    rows: dict[str, Tensor] = {}
    handles, encoder_blocks = [], []
    for name, module in model.named_modules():
        if isinstance(module, DecoderBlock):
            handles.append(module.register_forward_hook(partial(_note_result, rows, name)))
        elif isinstance(module, Block):
            # The encoder asks its blocks for their branches, which no hook sees.
            encoder_blocks.append(module)
            vars(module)["branches"] = partial(_branches_noted, rows, name, module.branches)
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()
        for block in encoder_blocks:
            del vars(block)["branches"]


def _branches_noted(rows: dict[str, Tensor], name: str, branches: Callable[..., Any], *given: Any) -> Any:
    result = branches(*given)
    _note(rows, name, result)
    return result


def _note_result(rows: dict[str, Tensor], name: str, module: nn.Module, given: Any, result: Any) -> None:
    _note(rows, name, result)


def _note(rows: dict[str, Tensor], name: str, branch: tuple[Tensor, Tensor, Tensor | None]) -> None:
    """``branch``: the block's result as a sum of x and delta, both [B, S, D], and perhaps a bias."""
    x_BSD, delta_BSD, bias_D = branch
    total_BSD = x_BSD.float() + delta_BSD.float() + (0 if bias_D is None else bias_D.float())
    rows[name] = total_BSD.square().mean(dim=tuple(range(1, total_BSD.ndim))).sqrt()
