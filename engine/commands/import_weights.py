"""`mirl import FILE --out DIR` turns weights of the release or of MAE into a checkpoint of this engine."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mirl.engine.checkpoints.files import sha256_of, write_weights
from mirl.engine.checkpoints.pretrained import encoder_shapes
from mirl.engine.configuration.flags import Parser, image_size
from mirl.engine.models import MIRL, ModelConfig
from mirl.engine.models.interop.files import read_wrapped
from mirl.engine.models.interop.mae import MAE
from mirl.engine.models.interop.match import Match, first, infer_config, match_weights
from mirl.engine.models.interop.prefixes import strip_prefixes
from mirl.engine.models.interop.release import RELEASE, read_release_checkpoint, release_tensors
from mirl.errors import UserError

# An encoder does without these keys. Any other key that is not understood may change what the encoder computes.
SPARE = re.compile(r"(decoder|mask_token|norm_low\.|norm\d+\.|head\.).*")
PARTS = {
    "encoder": r"encoder\.(?!segment_norms).*",
    "segment norms": r"encoder\.segment_norms\..*",
    "decoder embeddings": r"embeds\..*",
    "decoders": r"decoders\..*|mask_token",
}


def run(argv: Sequence[str]) -> int:
    """Print which keys matched and write the checkpoint; UserError if a weight does not fit or is missing."""
    arguments = _parser().parse_args(argv)
    if arguments.out.exists():
        raise UserError(f"out is {arguments.out}, which exists: give another folder")
    if not arguments.file.is_file():
        raise UserError(f"{arguments.file} does not exist or is no file: give a .pd, .pth, .pt or .safetensors file")
    state, notes = read_foreign(arguments.file)
    layout = RELEASE if any(re.match(r"norm_low\.|decoder_embed\d|norm\d", key) for key in state) else MAE
    try:
        config = infer_config(
            state,
            layout,
            image_size=arguments.image_size,
            heads=arguments.heads,
            decoder_heads=arguments.decoder_heads,
            **_given(arguments, "mean", "std", "norm_pix"),
        )
    except UserError as error:
        raise UserError(f"{arguments.file}: {error}") from error
    if notes:
        print(f"{arguments.file}: {'; '.join(notes)}")
    _require_enough_weights(arguments.file, config, state)
    match = match_weights(state, layout, MIRL(config))
    print("\n".join([f"{arguments.file}: {len(state)} keys, those of {layout.title}", *_report(match)]))
    kept = _kept(arguments.file, match, allow_missing=arguments.allow_missing)
    source = {"file": arguments.file.name, "sha256": sha256_of(arguments.file), "keys": layout.title}
    write_weights(arguments.out, kept, {"step": 0, "source": source, "config": {"model": dataclasses.asdict(config)}})
    print(_closing(arguments.out, config, complete=_has_decoders(kept)))
    return 0


def read_foreign(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Read the tensors of a file by its own keys without their prefix, matrices [out, in], and say what was taken off.

    Nothing in the file is run.

    Raises:
        UserError: the file cannot be read, a tensor claims more than it holds, or it has no Vision Transformer.
    """
    if path.suffix in (".pd", ".pdparams"):
        arrays = read_release_checkpoint(path)
        _require_held(path, {key: array.nbytes for key, array in arrays.items()})
        return _stripped(path, release_tensors(arrays), "")
    state, wrapper = read_wrapped(path)
    _require_held(path, {key: value.numel() * value.element_size() for key, value in state.items()})
    return _stripped(path, state, wrapper)


def _stripped(path: Path, state: Mapping[str, Tensor], wrapper: str) -> tuple[dict[str, Tensor], list[str]]:
    try:
        stripped, notes = strip_prefixes(state)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    pair = {"teacher": "the teacher's weights are taken", "student": "it has no teacher: the student's are taken"}
    return stripped, [pair[wrapper], *notes] if wrapper in pair else notes


def _require_held(path: Path, sizes: Mapping[str, int]) -> None:
    """Refuse a tensor of more bytes than the whole file: its values are repeated by a stride of 0, or missing."""
    for key, size in sizes.items():
        if size > path.stat().st_size:
            raise UserError(f"{path} has {path.stat().st_size} bytes and {key} claims {size}: give an undamaged file")


def _require_enough_weights(path: Path, config: ModelConfig, state: Mapping[str, Tensor]) -> None:
    """Refuse a few shapes that promise a much larger encoder than the file has weights for, before it is built.

    A few missing weights are named later.
    """
    needed = sum(math.prod(shape) for shape in encoder_shapes(config).values())
    held = sum(value.numel() for value in state.values())
    if needed > 2 * held:
        raise UserError(f"{path} does not fit: its encoder has {needed} weights and the file {held}: give a whole one")


def _parser() -> Parser:
    parser = Parser(
        prog="mirl import",
        description="Turn weights of the MIRL release (.pd, or its conversion to PyTorch) or of facebookresearch/mae "
        "into a checkpoint of this engine. Nothing in the file is run.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="a .pd, .pth, .pt or .safetensors file")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the checkpoint's folder, a new one")
    parser.add_argument(
        "--allow-missing",
        action="store_true",
        help="take the encoder alone where decoders are missing, and leave out keys that it does not need",
    )
    parser.add_argument("--heads", type=int, metavar="N", help="attention heads of the encoder [of a published size]")
    parser.add_argument(
        "--decoder-heads", type=int, metavar="N", help="attention heads of the decoders [of a published size]"
    )
    parser.add_argument(
        "--image-size", type=image_size, metavar="SIDE|HxW", help="image size [a square, from the positions]"
    )
    parser.add_argument("--mean", type=float, nargs="+", help="mean of each channel [of ImageNet; others 0.5]")
    parser.add_argument("--std", type=float, nargs="+", help="deviation of each channel [of ImageNet; others 0.5]")
    parser.add_argument(
        "--no-norm-pix", dest="norm_pix", action="store_false", default=None,
        help="the decoders predict raw pixels, as those of MAE's visualisation checkpoints do",
    )  # fmt: skip
    return parser


def _given(arguments: Any, *names: str) -> dict[str, Any]:
    given = {name: getattr(arguments, name) for name in names}
    values = {name: value for name, value in given.items() if value is not None}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _report(match: Match) -> list[str]:
    """Say how many weights of each part were found, and what was not understood."""
    lines = []
    for part, pattern in PARTS.items():
        found = sum(bool(re.fullmatch(pattern, name)) for name in match.weights)
        missing = sum(bool(re.fullmatch(pattern, name)) for name in match.missing)
        if found:
            lines.append(f"  {part:<20}{found:>5} matched{missing:>5} missing")
        elif missing:
            lines.append(f"  {part:<20} none in the file")
    lines.append(f"  {'fixed positions':<20}{len(match.tables):>5} equal to ours")
    named = f": {first(match.unknown)}" if match.unknown else ""
    return [*lines, f"  {'unknown keys':<20}{len(match.unknown):>5}{named}"]


def _has_decoders(weights: Mapping[str, Tensor]) -> bool:
    return any(not name.startswith("encoder.") for name in weights)


def _kept(file: Path, match: Match, *, allow_missing: bool) -> dict[str, Tensor]:
    """Return the weights to write. UserError if they are no model, or only a part of one and that was not allowed."""
    encoder = re.compile(PARTS["encoder"])
    strange = [key for key in match.unknown if not SPARE.fullmatch(key)]
    problems = [
        *match.problems,
        *(f"{name} is missing" for name in match.missing if encoder.fullmatch(name)),
        *(f"{key} has no place in this encoder" for key in strange),
        *_fixed_magnitudes(match),
    ]
    if problems:
        raise UserError(f"{file} does not fit: {first(problems)}")
    if (match.missing or match.unknown) and not allow_missing:
        missing = [f"{name} is missing" for name in match.missing] if _has_decoders(match.weights) else ["no decoders"]
        unknown = [f"{key} has no place in this model" for key in match.unknown]
        raise UserError(
            f"{file} is incomplete: {first([*missing, *unknown])}; --allow-missing takes the encoder alone where "
            "decoders are missing, and leaves out what it does not need"
        )
    if match.missing:
        return {name: value for name, value in match.weights.items() if encoder.fullmatch(name)}
    return {name: value for name, value in match.weights.items() if not name.endswith(".head.weight_g")}


def _fixed_magnitudes(match: Match) -> list[str]:
    """Name the magnitudes of the release's weight-normed heads that are not 1: here they are fixed at 1."""
    return [
        f"{name} is not 1"
        for name, value in match.weights.items()
        if name.endswith(".head.weight_g") and not bool((value == 1).all())
    ]


def _closing(out: Path, config: ModelConfig, *, complete: bool) -> str:
    size = f"depth {config.depth}, width {config.width}, heads {config.heads}, patch {config.patch_size}, image "
    size += f"{config.image_height}x{config.image_width}x{config.channels}"
    if not complete:
        return f"wrote {out}: the encoder alone ({size}), for fine-tuning and export; it cannot reconstruct"
    decoders = f"G {config.segments}, decoders {config.decoder_depth} x {config.decoder_width}, "
    decoders += f"heads {config.decoder_heads}, {'DID' if config.did else 'no DID'}, {config.variant} variant"
    return f"wrote {out}: {config.label} ({size}; {decoders}), objective {config.objective}"
