"""Check the arguments of the public functions. Every failure is a ValueError that names argument, value and mend."""

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

_debug = False


def set_debug(on: bool) -> None:
    """Turn the checks of patch ids on or off (off at start: they wait for the device)."""
    global _debug
    _debug = bool(on)


def debug_enabled() -> bool:
    return _debug


def check_shape(name: str, tensor: Tensor, shape: tuple[int | None, ...], meaning: str) -> None:
    """Check a shape. `None` in `shape` leaves that length free; `meaning` spells it in letters, e.g. "[B, K]"."""
    if tensor.dim() != len(shape) or any(
        want is not None and have != want for have, want in zip(tensor.shape, shape, strict=True)
    ):
        wanted = [("any" if n is None else n) for n in shape]
        raise ValueError(f"{name} has shape {list(tensor.shape)}; {meaning} = {wanted} is needed")


def check_float(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name} has dtype {tensor.dtype}; float32, float16, bfloat16 or float64 is needed")


def check_device(reference: Tensor, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != reference.device:
            raise ValueError(f"{name} is on {tensor.device}, the other inputs on {reference.device}; move it there")


def check_ids(name: str, ids: Tensor, upper: int) -> None:
    """Check that ids are int64, at most `upper` a batch row; with `set_debug(True)` also their range and repetitions.

    The ids then have to lie in [0, upper), and those of a batch row have to be distinct.
    """
    if ids.dtype != torch.int64:
        raise ValueError(f"{name} has dtype {ids.dtype}; patch ids are int64: use {name}.long()")
    if ids.shape[1] > upper:
        raise ValueError(f"{name} has {ids.shape[1]} ids a row but there are only {upper} to choose from")
    if not _debug or torch.compiler.is_compiling() or ids.numel() == 0:
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= upper:
        raise ValueError(f"{name} holds ids from {low} to {high}; they must lie in [0, {upper})")
    ordered = ids.sort(dim=1).values
    repeated = (ordered[:, 1:] == ordered[:, :-1]).any(dim=1)
    if bool(repeated.any()):
        row = int(repeated.nonzero()[0])
        raise ValueError(f"{name} repeats an id in batch row {row}; the ids of a row must be distinct")


def check_restore(ids_keep_BK: Tensor, ids_restore_BN: Tensor) -> None:
    """Check, with `set_debug(True)` alone, that the k-th kept patch is at row k: ids_restore[b, ids_keep[b, k]] = k."""
    if not _debug or torch.compiler.is_compiling():
        return
    rows_BK = ids_restore_BN.gather(1, ids_keep_BK)
    if not torch.equal(rows_BK, torch.arange(ids_keep_BK.shape[1], device=rows_BK.device).expand_as(rows_BK)):
        raise ValueError(
            "ids_restore_BN is at odds with ids_keep_BK; make both with concat(keep, masked).argsort(dim=1)"
        )
