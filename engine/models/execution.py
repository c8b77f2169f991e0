"""`Execution` says how blocks are computed: its switches change speed and memory, and results by rounding at most.

`ExactSkips` says which work is left out; `Execution` says how the rest is done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Method = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Execution:
    """Fusion is meant for eager code; inside compiled regions the compiler fuses as it sees fit, unless told otherwise.

    fused_norm: residual add and the LayerNorm after it as one kernel (`mirl.kernels.residual_layer_norm`).
    fused_gelu: bias of a hidden layer and GELU as one kernel (`mirl.kernels.bias_gelu`).
    norm_in_regions, gelu_in_regions: these two kernels in compiled regions too, in place of what the compiler writes.
    bias_in_norm: the norm's kernel also adds the bias of the Linear before it, and its backward pass sums the gradient
    of that bias. Otherwise the backward pass of that Linear would read the gradient once more for the sum.
    recompute: keep only the inputs of LayerNorm and GELU for the backward pass, which makes their outputs again. This
    saves 6 of 16 values per token and width of an encoder block, for one more pass over each. The bits are the same. In
    compiled regions it is the partitioner's budget (`mirl.engine.training.compiling`).
    """

    fused_norm: bool = False
    fused_gelu: bool = False
    norm_in_regions: bool = False
    gelu_in_regions: bool = False
    bias_in_norm: bool = False
    recompute: bool = False

    @classmethod
    def for_device(cls, device: torch.device, *, recompute: bool = False) -> Execution:
        """Choose the fused kernels on a GPU only: on a CPU they are plain torch, and the plain form is faster."""
        on_gpu = device.type == "cuda"
        return cls(fused_norm=on_gpu, fused_gelu=on_gpu, bias_in_norm=on_gpu, recompute=recompute)


def fusing(outside: bool, in_regions: bool) -> bool:
    """Say whether to call a fused kernel here: inside a compiled region the compiler's own fusion may be faster."""
    return in_regions if torch.compiler.is_compiling() else outside


class Regions:
    """Regions are compiled forms of the methods of blocks: each is compiled once and serves every block of its kind.

    Without ``compile_function`` there are none. `ComputeChoices.choose` sets ``active``: blocks go through compiled
    forms only in training steps of the batch size for which these were made. Pictures and other batches run eagerly, so
    nothing is compiled a second time in a run.
    """

    def __init__(self, compile_function: Callable[[Method], Method] | None = None, batch: int = 0) -> None:
        self.compile_function, self.batch = compile_function, batch
        self.active = False
        self._compiled: dict[Method, Method] = {}

    def get(self, method: Method) -> Method:
        """Return the compiled form of ``method``, or ``method`` itself where no compiled form exists or applies."""
        if not self.active or self.compile_function is None or not torch.is_grad_enabled():
            return method
        if method not in self._compiled:
            self._compiled[method] = self.compile_function(method)
        return self._compiled[method]


def apply_keeping_input(
    cheap: Callable[[Tensor], Tensor], consumer: Callable[[Tensor], Tensor], x: Tensor, y: Tensor
) -> Tensor:
    """Return ``consumer(y)`` of y = cheap(x); the consumer's graph keeps x in place of y and calls ``cheap`` again.

    ``consumer`` is a linear layer: it keeps y, or a view of all of it. ``cheap`` is deterministic, so the bits are the
    same as if y were kept. Under torch.compile the function is plain ``consumer(y)``: the partitioner makes the same
    trade, by a budget.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return consumer(y)
    detached_x = x.detach()
    address, values = y.data_ptr(), y.numel()

    def pack(tensor: Tensor) -> Any:
        again = tensor.data_ptr() == address and tensor.numel() == values and tensor.is_contiguous()
        # A cast under autocast has another address and is kept as it is.
        return tensor.shape if again else tensor

    def unpack(kept: Any) -> Tensor:
        if not isinstance(kept, torch.Size):
            return kept
        with torch.no_grad():
            return cheap(detached_x).reshape(kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return consumer(y)
