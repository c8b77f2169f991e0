"""`mirl export CHECKPOINT --to timm|hf|safetensors --out PATH`: a checkpoint for other libraries: the encoder, or the
classifier.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mirl.engine.checkpoints.files import aside, save_tensors, write_json
from mirl.engine.checkpoints.pretrained import load_encoder
from mirl.engine.configuration.flags import Parser, image_size
from mirl.engine.models import ModelConfig
from mirl.engine.models.interop.huggingface import hf_config, hf_preprocessor, hf_state_dict
from mirl.engine.models.interop.timm_keys import grid_of, timm_config, timm_state_dict
from mirl.engine.models.layers import NORM_EPS
from mirl.engine.transfer.classification.load import WEIGHTS as CLASSIFIER_WEIGHTS
from mirl.engine.transfer.classification.load import is_classifier, load_classifier
from mirl.errors import UserError

WEIGHTS = "model.safetensors"
HEADER = {"format": "pt"}  # transformers before 5 refuses a file without it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exported:
    """What is written: the encoder by timm's names, its model, the size of the images it is for, and a classifier's
    head with its pooling and the names of its classes, if there are any. A head of ``fc_norm.*`` alone is that of an
    encoder whose norm comes after the pooling.
    """

    encoder: Mapping[str, Tensor]
    config: ModelConfig
    image_size: tuple[int, int]
    pool: str = "avg"
    head: Mapping[str, Tensor] | None = None
    classes: tuple[str, ...] = ()

    @property
    def is_classifier(self) -> bool:
        return "head.weight" in (self.head or {})


def run(argv: Sequence[str]) -> int:
    """Write the encoder and print how to load it. UserError where it cannot be written as asked."""
    arguments = _parser().parse_args(argv)
    if arguments.out.exists():
        raise UserError(f"out is {arguments.out}, which exists: give another name")
    if arguments.to == "safetensors" and arguments.out.suffix != ".safetensors":
        raise UserError(f"out is {arguments.out}: give a file name that ends in .safetensors")
    if arguments.pool and arguments.to != "timm":
        raise UserError(f"pool is {arguments.pool!r} and to is {arguments.to!r}: only timm's model pools an encoder")
    exported = _read(arguments.checkpoint, arguments)
    config, encoder, size = exported.config, exported.encoder, exported.image_size
    grid = grid_of(config, size)
    EXPORTS[arguments.to](arguments.out, exported)
    kind = "classifier" if exported.is_classifier else "encoder"
    positions = f"positions of {config.grid[0]}x{config.grid[1]} patches"
    if grid != config.grid:
        positions += f", resampled to {grid[0]}x{grid[1]}"
    print(
        f"wrote {arguments.out}: {kind} of {config.label}, {len(encoder)} weights, depth {config.built_depth}, width "
        f"{config.width}, image {size[0]}x{size[1]}x{config.channels}; {positions}"
    )
    print(f"images: values in [0, 1], mean {_numbers(config.mean)}, std {_numbers(config.std)}")
    loading = LOADING_CLASSIFIER if exported.is_classifier else LOADING
    print("load it: " + loading[arguments.to].format(out=arguments.out))
    return 0


def _read(checkpoint: Path, arguments: argparse.Namespace) -> Exported:
    """A pre-trained encoder, or a fine-tuned classifier."""
    if not is_classifier(checkpoint):
        if arguments.weights:
            raise UserError(
                f"weights is {arguments.weights!r} and {checkpoint} is no fine-tuned classifier: leave it out"
            )
        config, encoder = load_encoder(checkpoint)
        size = arguments.image_size or (config.image_height, config.image_width)
        return Exported(encoder=encoder, config=config, image_size=size, pool=arguments.pool or "avg")
    model, run_config = load_classifier(checkpoint, weights=arguments.weights or "last")
    if arguments.pool not in (None, model.pool):
        raise UserError(f"pool is {arguments.pool!r} and the classifier was trained with {model.pool!r}: leave it out")
    state = model.state_dict()
    encoder = {key.removeprefix("encoder."): value for key, value in state.items() if key.startswith("encoder.")}
    # As fine-tuned: resampled from the grid of pre-training, or trained.
    encoder["pos_embed"] = model.encoder.pos_embed.detach()
    head = {key: value for key, value in state.items() if not key.startswith("encoder.")}
    size = arguments.image_size or (model.config.image_height, model.config.image_width)
    classes = run_config.classes
    if arguments.encoder_only:
        head, classes = {key: value for key, value in head.items() if key.startswith("fc_norm.")} or None, ()
    return Exported(
        encoder=encoder, config=run_config.model, image_size=size, pool=model.pool, head=head, classes=classes
    )


def export_timm(out: Path, exported: Exported) -> None:
    """A folder for timm's "local-dir:" models; UserError if ``out`` exists."""
    common = {"image_size": exported.image_size, "head": exported.head}
    state = timm_state_dict(exported.encoder, exported.config, **common)
    with aside(out) as folder:
        folder.mkdir()
        save_tensors(state, folder / WEIGHTS, metadata=HEADER)
        described = timm_config(exported.config, pool=exported.pool, classes=exported.classes, **common)
        write_json(folder / "config.json", described)


def export_hf(out: Path, exported: Exported) -> None:
    """A folder for transformers' from_pretrained; UserError if ``out`` exists or the encoder is mean-pooled."""
    config, size = exported.config, exported.image_size
    state = hf_state_dict(exported.encoder, config, image_size=size, pool=exported.pool, head=exported.head)
    with aside(out) as folder:
        folder.mkdir()
        save_tensors(state, folder / WEIGHTS, metadata=HEADER)
        described = hf_config(config, image_size=size, head=exported.head, classes=exported.classes)
        write_json(folder / "config.json", described)
        write_json(folder / "preprocessor_config.json", hf_preprocessor(config, image_size=size))


def export_safetensors(out: Path, exported: Exported) -> None:
    """One file with timm's key names, everything else in its header, as text; UserError if ``out`` exists."""
    config, size = exported.config, exported.image_size
    state = timm_state_dict(exported.encoder, config, image_size=size, head=exported.head)
    described: dict[str, Any] = {
        "keys": "timm VisionTransformer",
        "norm_eps": NORM_EPS,
        "image_size": size,
        "pool": exported.pool if exported.head is not None else None,
        "classes": exported.classes,
        "model": dataclasses.asdict(config),
    }
    with aside(out) as file:
        save_tensors(state, file, metadata=HEADER | {name: json.dumps(value) for name, value in described.items()})


EXPORTS = {"timm": export_timm, "hf": export_hf, "safetensors": export_safetensors}
LOADING = {
    "timm": 'timm.create_model("local-dir:{out}", pretrained=True)',
    "hf": 'transformers.ViTModel.from_pretrained("{out}", add_pooling_layer=False)',
    "safetensors": 'safetensors.torch.load_file("{out}")',
}
LOADING_CLASSIFIER = LOADING | {"hf": 'transformers.ViTForImageClassification.from_pretrained("{out}")'}


def _parser() -> Parser:
    parser = Parser(prog="mirl export", description="Write the encoder of a checkpoint in another library's format.")
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="a checkpoint, or the folder of a run (its newest good one)"
    )
    parser.add_argument(
        "--to", required=True, choices=sorted(EXPORTS),
        help="timm: a folder for timm.create_model; hf: a folder for transformers' ViTModel; safetensors: one file",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="PATH", help="what to write; must not exist")
    parser.add_argument(
        "--image-size", type=image_size, metavar="SIDE|HxW",
        help="size of the images it will see; positions are resampled [the checkpoint's]",
    )  # fmt: skip
    parser.add_argument(
        "--pool", choices=("avg", "token"), help="timm: mean of the patch tokens, or the class token [avg]"
    )
    parser.add_argument(
        "--encoder-only", action="store_true", help="of a classifier: its encoder as fine-tuned, without the head"
    )
    parser.add_argument(
        "--weights",
        choices=sorted(CLASSIFIER_WEIGHTS),
        help="of a classifier: last, or their average [last]",
    )
    return parser


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:g}" for value in values)
