"""Checkpoints of the authors' PaddlePaddle release: reading the file without Paddle, and its keys in our terms.

The file is a pickle of {"model": OrderedDict(key -> (name, ndarray)), "epoch": int}. A pickle can run any code when it
is read, so the reader here knows the few classes that such a file needs and refuses every other.

| release                                             | here                                           |
|-----------------------------------------------------|------------------------------------------------|
| cls_token, patch_embed.*, blocks.i.*, norm.*        | encoder.*                                      |
| norm_low.*, norm0.* ... norm4.*                     | encoder.segment_norms.0 ... .5                 |
| decoder_embed0_1.*, decoder_embed0.* ... 5.*        | embeds.0, embeds.1 ... .6                      |
| mask_token0 ... 5                                   | decoders.1 ... .6, mask_token                  |
| decoder_blocksI.J.norm1, norm2, norm3, norm4        | decoders.I+1.blocks.J.norm1, norm_q, norm_kv, norm2 |
| decoder_blocksI.J.attn, cross_attn, mlp             | the same                                       |
| decoder_normI.*, decoder_predI.*                    | decoders.I+1.norm, decoders.I+1.head           |
| pos_embed, decoder_pos_embedI                       | compared with ours, then dropped               |

Matrices of Linear layers are [in, out] there and [out, in] here.
"""

from __future__ import annotations

import pickle
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.models.mirl import MIRL

_RECONSTRUCT = np.zeros(1).__reduce__()[0]

# numpy renamed its private package "core" to "_core": files hold either name.
_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "tuple"): tuple,
    ("builtins", "str"): str,
    ("builtins", "int"): int,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
}

# (pattern, ours): \1 is taken as it is, {next} is the captured number plus one.
_RULES: tuple[tuple[str, str], ...] = (
    (r"(cls_token|patch_embed\.proj\.(?:weight|bias)|blocks\..+|norm\.(?:weight|bias))", r"encoder.\1"),
    (r"norm_low\.(weight|bias)", r"encoder.segment_norms.0.\1"),
    (r"norm(?P<number>\d+)\.(weight|bias)", r"encoder.segment_norms.{next}.\2"),
    (r"decoder_embed0_1\.(weight|bias)", r"embeds.0.\1"),
    (r"decoder_embed(?P<number>\d+)\.(weight|bias)", r"embeds.{next}.\2"),
    (r"mask_token(?P<number>\d+)", r"decoders.{next}.mask_token"),
    (r"decoder_blocks(?P<number>\d+)\.(\d+)\.norm1\.(.+)", r"decoders.{next}.blocks.\2.norm1.\3"),
    (r"decoder_blocks(?P<number>\d+)\.(\d+)\.norm2\.(.+)", r"decoders.{next}.blocks.\2.norm_q.\3"),
    (r"decoder_blocks(?P<number>\d+)\.(\d+)\.norm3\.(.+)", r"decoders.{next}.blocks.\2.norm_kv.\3"),
    (r"decoder_blocks(?P<number>\d+)\.(\d+)\.norm4\.(.+)", r"decoders.{next}.blocks.\2.norm2.\3"),
    (r"decoder_blocks(?P<number>\d+)\.((?:\d+)\.(?:attn|cross_attn|mlp)\..+)", r"decoders.{next}.blocks.\2"),
    (r"decoder_norm(?P<number>\d+)\.(weight|bias)", r"decoders.{next}.norm.\2"),
    (r"decoder_pred(?P<number>\d+)\.(weight_v|weight_g|bias)", r"decoders.{next}.head.\2"),
)
_POSITIONS = re.compile(r"pos_embed|decoder_pos_embed\d+")


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, which a checkpoint of the release does not need"
            ) from None


def read_release_checkpoint(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of a .pd file by the release's keys.

    ValueError if the file is not such a pickle, or asks for a class beyond OrderedDict, tuple, str, int and numpy's.
    """
    try:
        with open(path, "rb") as file:
            content = _RestrictedUnpickler(file).load()
        return {str(key): _array(value) for key, value in content["model"].items()}
    except FileNotFoundError:
        raise
    # A damaged pickle raises nearly anything; all of it means the same to the user.
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a checkpoint of the MIRL release: {error}") from error


def _array(value: Any) -> np.ndarray:
    array = value[1] if isinstance(value, tuple) else value
    if not isinstance(array, np.ndarray):
        raise TypeError(f"a weight is a {type(array).__name__}, not an array")
    return array


def our_key(release_key: str) -> str | None:
    """Our name of a parameter of the release; None if there is none."""
    for pattern, ours in _RULES:
        match = re.fullmatch(pattern, release_key)
        if match:
            number = match.groupdict().get("number")
            return match.expand(ours if number is None else ours.replace("{next}", str(int(number) + 1)))
    return None


def release_to_state_dict(arrays: Mapping[str, np.ndarray], model: MIRL) -> dict[str, Tensor]:
    """A complete state dict for ``model`` (release variant) in float32.

    ValueError listing what does not fit: keys unknown here, keys of the model that the file lacks, other shapes, or
    positions that are not the fixed sin-cos ones of this model.
    """
    expected = model.state_dict()
    state: dict[str, Tensor] = {}
    problems: list[str] = []
    for key, array in arrays.items():
        value = torch.from_numpy(np.array(array, dtype=np.float32))
        if _POSITIONS.fullmatch(key):
            problems += _check_positions(key, value, model)
            continue
        ours = our_key(key)
        if ours not in expected:
            problems.append(f"{key} has no place in this model")
            continue
        if value.ndim == 2:
            value = value.t().contiguous()
        if value.shape != expected[ours].shape:
            problems.append(f"{key} has shape {list(value.shape)}, {ours} needs {list(expected[ours].shape)}")
        state[ours] = value
    problems += [f"{key} is missing" for key in expected if key not in state]
    if problems:
        raise ValueError(f"the release's checkpoint does not fit this model: {_first(problems)}")
    return state


def load_release(model: MIRL, path: str | Path) -> None:
    """Set every parameter of ``model`` from a .pd file of the release.

    ValueError if the file does not fit; the model is then unchanged.
    """
    if model.config.variant != "release":
        raise ValueError(
            f"variant is {model.config.variant!r}: a checkpoint of the release needs a model of variant 'release'"
        )
    model.load_state_dict(release_to_state_dict(read_release_checkpoint(path), model))


def _check_positions(key: str, value: Tensor, model: MIRL) -> Iterable[str]:
    ours = model.encoder.pos_embed if key == "pos_embed" else model.decoder_pos_embed
    value = value.reshape(value.shape[-2:])
    # 1e-5: the release computes the same table with another library's sin and cos and stores it in float32.
    if value.shape != ours.shape or not torch.allclose(value, ours.float().cpu(), atol=1e-5):
        return [f"{key} is not the fixed sin-cos table of this model's image size"]
    return []


def _first(problems: list[str], count: int = 5) -> str:
    more = f"; and {len(problems) - count} more" if len(problems) > count else ""
    return "; ".join(problems[:count]) + more
