"""Decide by the device of an op's tensors which implementation runs. The engine prints it at start.

| tensors | implementation |
|---|---|
| on a GPU | Triton (plain torch when Triton is not installed) |
| on a CPU | plain torch |
| on a CPU, `TRITON_INTERPRET=1` set before the import | Triton, interpreted: for tests, about 1 ms a program |
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mirl.kernels.triton_import import HAS_TRITON, INTERPRETED, TRITON_VERSION

OPS = (
    "gather_patches",
    "gather_tokens",
    "assemble_tokens",
    "scatter_tokens",
    "masked_residual_mse",
    "residual_layer_norm",
    "bias_gelu",
    "short_attention",
    "decoder_attention",
    "flat_adamw",
)


_assumed_gpu = False


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Let ops take the way of a GPU, whatever the device of their tensors: for fake tensors, which launch nothing."""
    global _assumed_gpu
    before, _assumed_gpu = _assumed_gpu, True
    try:
        yield
    finally:
        _assumed_gpu = before


def uses_triton(tensor: Tensor) -> bool:
    """Say whether an op on `tensor` is to launch its Triton kernel. float64 is for the reference only."""
    on_gpu = INTERPRETED or _assumed_gpu or (tensor.is_cuda and HAS_TRITON)
    return on_gpu and tensor.dtype != torch.float64


def describe_dispatch(device: torch.device | str | None = None) -> dict[str, str]:
    """Return op name -> implementation for tensors on `device` (default: the GPU if there is one)."""
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    if INTERPRETED:
        chosen = f"triton {TRITON_VERSION} interpreted on {kind} (slow, for tests)"
    elif kind == "cpu":
        chosen = "torch on cpu"
    elif HAS_TRITON:
        chosen = f"triton {TRITON_VERSION} on {kind}"
    else:
        chosen = f"torch on {kind} (triton is not installed)"
    return dict.fromkeys(OPS, chosen)
