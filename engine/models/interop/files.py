"""Read weights from files of other code, PyTorch pickles and safetensors, without running anything in them."""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mirl.errors import UserError

WRAPPERS = ("model", "state_dict", "teacher", "student")  # DINO's own evaluation, too, takes the teacher of its pair
PREFIX = "module."  # DistributedDataParallel puts it before every key


def read_torch_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a .pth, .pt or .safetensors file by their keys, without the prefix "module.".

    A pickle may hold the state dict itself, or a dict with it under one of `WRAPPERS`, of which the first counts.
    UserError if the file is damaged, holds no state dict, or asks for anything but tensors and plain values.
    """
    return read_wrapped(path)[0]


def read_wrapped(path: str | Path) -> tuple[dict[str, Tensor], str]:
    """Return the tensors as `read_torch_checkpoint` does, and the wrapper that held them, "" for a bare state dict."""
    path = Path(path)
    try:
        content = load_file(path) if path.suffix == ".safetensors" else _load(path)
    except FileNotFoundError:
        raise
    # A damaged file raises nearly anything, and every such error means the same to the user.
    except Exception as error:
        raise UserError(f"{path} cannot be read as a PyTorch checkpoint: {_reason(error)}") from error
    wrapper = next((key for key in WRAPPERS if isinstance(content, Mapping) and key in content), "")
    state = content[wrapper] if wrapper else content
    if not isinstance(state, Mapping) or not state:
        raise UserError(f"{path} holds a {type(state).__name__} and no state dict: give a file with named tensors")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise UserError(
                f"{path} holds a {type(value).__name__} under {key!r}: give a state dict, which has tensors only"
            )
    prefixed = all(key.startswith(PREFIX) for key in state)
    return {key.removeprefix(PREFIX) if prefixed else key: value for key, value in state.items()}, wrapper


def _load(path: Path) -> Any:
    # facebookresearch/mae saves its command line beside the weights; a Namespace only holds values.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _reason(error: Exception) -> str:
    """Give the reason without torch's advice to load the file unsafely."""
    if isinstance(error, pickle.UnpicklingError):
        match = re.search(r"GLOBAL (\S+)", str(error))
        return f"it asks for {match[1]}, which weights do not need" if match else "it is not a pickle of tensors"
    return str(error).split(". ")[0] or type(error).__name__
