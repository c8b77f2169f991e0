"""Find the Vision Transformer among the keys of a file, and take off what other programs put before its names.

DistributedDataParallel puts ``module.`` before every key, torch.compile ``_orig_mod.``. A model that holds the encoder
as a part puts the name of that part (``backbone.``, ``encoder.``, ``model.``). They come in any order and number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from torch import Tensor

from mirl.errors import UserError

_COMPILED = "_orig_mod."  # also in the middle of a key, where parts of a model are compiled
_MARK = "patch_embed.proj.weight"
# (pattern of a key, its owner)
_OTHERS = (
    (r".*embeddings\.patch_embeddings\.projection\.weight", "Hugging Face's transformers"),
    (r".*visual\.conv1\.weight", "CLIP"),
    (r".*conv_proj\.weight", "torchvision's VisionTransformer"),
    (r".*patch_embed\.(?:backbone|stem|projection)\..+", "a Vision Transformer with another patch embedding"),
    (r".*layer4\.\d+\.conv\d\.weight", "a ResNet"),
    (r".*stages\.\d+\..+", "a network in stages, such as ConvNeXt or Swin"),
)


def strip_prefixes(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return ``state`` with the keys of timm and facebookresearch/mae, and notes on what was taken off or left out.

    If the file has a student and a teacher, the teacher is taken.

    Raises:
        UserError: the file has no Vision Transformer (the message says whose keys they seem to be), it has several, or
        two keys would become one.
    """
    notes = []
    if any(_COMPILED in key for key in state):
        notes.append(f"{_COMPILED!r} of torch.compile is taken off its keys")
        state = _renamed(state, lambda key: key.replace(_COMPILED, ""))
    places = sorted(key.removesuffix(_MARK) for key in state if key == _MARK or key.endswith("." + _MARK))
    if not places:
        raise UserError(f"it has no convolution {_MARK}: {_whose(state)}")
    chosen = places[0] if len(places) == 1 else _choose(places)
    if len(places) > 1:
        others = [place for place in places if place != chosen]
        notes.append(f"of {len(places)} encoders {chosen or 'the bare one'!r} is taken, {_quoted(others)} left out")
        state = {key: value for key, value in state.items() if not key.startswith(tuple(filter(None, others)))}
    if chosen:
        notes.append(f"{chosen!r} is taken off its keys")
        state = _renamed(state, lambda key: key.removeprefix(chosen))
    return dict(state), notes


def _choose(places: list[str]) -> str:
    if "" in places:
        return ""
    teachers = [place for place in places if "teacher" in place.split(".")]
    if len(teachers) != 1:
        raise UserError(f"it holds {len(places)} encoders, {_quoted(places)}: give a file with one of them")
    return teachers[0]


def _renamed(state: Mapping[str, Tensor], rename: Callable[[str], str]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        name = rename(key)
        if name in renamed or (name != key and name in state):
            raise UserError(f"it holds {name} with a prefix and without one: give a file with one of the two")
        renamed[name] = value
    return renamed


def _whose(state: Mapping[str, Tensor]) -> str:
    for pattern, owner in _OTHERS:
        key = next((key for key in state if re.fullmatch(pattern, key)), None)
        if key is not None:
            return (
                f"its keys are those of {owner} ({key}), which is not read; give a file with the keys of timm or "
                "facebookresearch/mae"
            )
    return f"its keys begin with {next(iter(state))!r}: it is no Vision Transformer"


def _quoted(places: list[str]) -> str:
    return ", ".join(map(repr, places))
