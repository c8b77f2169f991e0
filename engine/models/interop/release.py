"""Read checkpoints of the authors' PaddlePaddle release without Paddle, and translate their keys into ours.

The file is a pickle of {"model": OrderedDict(key -> (name, ndarray)), "epoch": int}, in training also with "optimizer",
"scaler" and "args". A pickle can run any code when it is read, so this reader knows only the few classes that the file
needs and refuses every other.

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

Matrices of Linear layers are [in, out] in a .pd file, and [out, in] here and in a conversion of it to PyTorch.
"""

from __future__ import annotations

import argparse
import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mirl.engine.models.interop.match import ENCODER_ALONE, Layout, count, first, match_weights
from mirl.engine.models.mirl import MIRL
from mirl.errors import UserError

_RECONSTRUCT = np.zeros(1).__reduce__()[0]
_SCALAR = np.float64(0).__reduce__()[0]

# numpy renamed its private package "core" to "_core": files hold either name.
_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "tuple"): tuple,
    ("builtins", "str"): str,
    ("builtins", "int"): int,
    ("argparse", "Namespace"): argparse.Namespace,  # only holds values
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy.core.multiarray", "scalar"): _SCALAR,
    ("numpy._core.multiarray", "scalar"): _SCALAR,
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
    """Return the arrays of a .pd file by the release's keys.

    UserError if the file is not such a pickle, or asks for a class beyond OrderedDict, tuple, str, int and numpy's.
    """
    try:
        with open(path, "rb") as file:
            content = _RestrictedUnpickler(file).load()
        return {str(key): _array(value) for key, value in content["model"].items()}
    except FileNotFoundError:
        raise
    # A damaged pickle raises nearly anything, and every such error means the same to the user.
    except Exception as error:
        raise UserError(f"{path} cannot be read as a checkpoint of the MIRL release: {error}") from error


def _array(value: Any) -> np.ndarray:
    array = value[1] if isinstance(value, tuple) else value
    if not isinstance(array, np.ndarray):
        raise TypeError(f"a weight is a {type(array).__name__}, not an array")
    return array


def our_key(release_key: str) -> str | None:
    """Return our name of a parameter of the release; None if it has none."""
    for pattern, ours in _RULES:
        match = re.fullmatch(pattern, release_key)
        if match:
            number = match.groupdict().get("number")
            return match.expand(ours if number is None else ours.replace("{next}", str(int(number) + 1)))
    return None


def decoder_fields(state: Mapping[str, Tensor]) -> Mapping[str, Any]:
    """Return the `ModelConfig` fields of a release with these weights."""
    embed = next((value for key, value in state.items() if re.fullmatch(r"decoder_embed\d+\.bias", key)), None)
    segments = count(state, r"decoder_(?:embed|blocks|norm|pred)(\d+)\..+")
    depth = count(state, r"decoder_blocks\d+\.(\d+)\..+")
    if embed is None or embed.ndim != 1 or depth == 0 or (segments > 1 and segments % 2):
        return ENCODER_ALONE
    return {
        "variant": "release",
        "segments": segments,
        "decoder_width": len(embed),
        "decoder_depth": depth,
        "did": any(key.startswith("decoder_embed0_1.") for key in state),
    }


RELEASE = Layout(title="the MIRL release", our_key=our_key, positions=_POSITIONS, fields=decoder_fields)


def release_tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Return the arrays of a .pd file in PyTorch's form: float32, matrices [out, in]."""
    tensors = {key: torch.from_numpy(np.array(array, dtype=np.float32)) for key, array in arrays.items()}
    return {
        key: value.t() if value.ndim == 2 and not _POSITIONS.fullmatch(key) else value for key, value in tensors.items()
    }


def release_to_state_dict(arrays: Mapping[str, np.ndarray], model: MIRL) -> dict[str, Tensor]:
    """Return a complete state dict for ``model`` (release variant) in float32.

    UserError listing what does not fit: keys unknown here, keys of the model that the file lacks, other shapes, or
    positions that are not the fixed sin-cos ones of this model.
    """
    match = match_weights(release_tensors(arrays), RELEASE, model)
    problems = [
        *match.problems,
        *(f"{key} has no place in this model" for key in match.unknown),
        *(f"{key} is missing" for key in match.missing),
    ]
    if problems:
        raise UserError(f"the release's checkpoint does not fit this model: {first(problems)}")
    return match.weights


def load_release(model: MIRL, path: str | Path) -> None:
    """Set every parameter of ``model`` from a .pd file of the release.

    UserError if the file does not fit; the model is then unchanged.
    """
    if model.config.variant != "release":
        raise UserError(
            f"variant is {model.config.variant!r}: a checkpoint of the release needs a model of variant 'release'"
        )
    model.load_state_dict(release_to_state_dict(read_release_checkpoint(path), model))
