"""Fix launch configurations by shape and device: every rank and every run has the same, and none is autotuned.

A bandwidth-bound program needs enough independent loads in flight: 4096 elements for 4 warps are 32 a thread, four
16-byte loads in bfloat16. Wider tiles spill, narrower ones leave the memory idle.
"""

from contextlib import nullcontext
from functools import lru_cache

import torch
from torch import Tensor

from mirl.kernels.triton_import import INTERPRETED

TILE_ELEMENTS = 4096
TILE_WARPS = 4


def next_power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def column_block(width: int) -> int:
    """Return the columns of a tile whose rows may be split: the largest power of two that divides the width.

    So no lane idles. 384 -> 128, 512 -> 512, 768 -> 256, 1024 -> 1024, which is the most. Widths with no such divisor
    of at least 64 are padded (588 -> 1024).
    """
    divisor = width & -width
    return min(1024, divisor if divisor >= 64 else next_power_of_two(width))


def row_block(columns: int, elements: int = TILE_ELEMENTS) -> int:
    """Return the rows of a tile of `columns` columns that holds about `elements` elements."""
    return max(1, elements // columns)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    """Count the GPU's multiprocessors; 2 under the interpreter, so that tests turn persistent loops more than once."""
    if INTERPRETED or device.type == "cpu":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def on_device_of(tensor: Tensor):
    """Return a context in which Triton launches on the tensor's GPU.

    It does nothing, and costs nothing, if that is the current GPU, and in a trace.
    """
    if (
        tensor.is_cuda
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.device.index != torch.cuda.current_device()
    ):
        return torch.cuda.device(tensor.device)
    return nullcontext()


def rows_contiguous(tensor: Tensor) -> Tensor:
    """Return the tensor itself if the elements of its last axis are neighbours, else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()
