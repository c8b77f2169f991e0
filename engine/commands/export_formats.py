"""`mirl export` writes the encoder or the classifier as timm, transformers, or plain safetensors read it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mirl.engine.checkpoints.files import aside, save_tensors, write_json
from mirl.engine.checkpoints.pretrained import load_encoder
from mirl.engine.models import ModelConfig
from mirl.engine.models.interop.huggingface import hf_config, hf_preprocessor, hf_state_dict
from mirl.engine.models.interop.timm_keys import timm_config, timm_state_dict
from mirl.engine.models.layers import NORM_EPS
from mirl.engine.transfer.classification.load import load_classifier
from mirl.errors import UserError

WEIGHTS = "model.safetensors"
HEADER = {"format": "pt"}  # transformers before 5 refuses a file without it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exported:
    """An export has the encoder by timm's names, its model, and the size of the images that it is for.

    A classifier also has its head, pooling and names of classes. A head of ``fc_norm.*`` alone belongs to an encoder
    whose norm comes after the pooling.
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


def read_encoder(checkpoint: Path, *, image_size: tuple[int, int] | None, pool: str | None) -> Exported:
    """Read the encoder of a checkpoint that is no classifier. By default it keeps its size, and pools the mean."""
    config, encoder = load_encoder(checkpoint)
    size = image_size or (config.image_height, config.image_width)
    return Exported(encoder=encoder, config=config, image_size=size, pool=pool or "avg")


def read_classifier(
    checkpoint: Path, *, weights: str, image_size: tuple[int, int] | None, pool: str | None, encoder_only: bool
) -> Exported:
    """Read a fine-tuned classifier; with ``encoder_only`` its encoder. UserError if ``pool`` is not its own."""
    model, run_config = load_classifier(checkpoint, weights=weights)
    if pool not in (None, model.pool):
        raise UserError(f"pool is {pool!r} and the classifier was trained with {model.pool!r}: leave it out")
    state = model.state_dict()
    encoder = {key.removeprefix("encoder."): value for key, value in state.items() if key.startswith("encoder.")}
    # The positions are as fine-tuned: resampled from the grid of pre-training, or trained.
    encoder["pos_embed"] = model.encoder.pos_embed.detach()
    head = {key: value for key, value in state.items() if not key.startswith("encoder.")}
    size = image_size or (model.config.image_height, model.config.image_width)
    classes = run_config.classes
    if encoder_only:
        head, classes = {key: value for key, value in head.items() if key.startswith("fc_norm.")} or None, ()
    return Exported(
        encoder=encoder, config=run_config.encoder, image_size=size, pool=model.pool, head=head, classes=classes
    )


def export_timm(out: Path, exported: Exported) -> None:
    """Write a folder for timm's "local-dir:" models; UserError if ``out`` exists."""
    common = {"image_size": exported.image_size, "head": exported.head}
    state = timm_state_dict(exported.encoder, exported.config, **common)
    with aside(out) as folder:
        folder.mkdir()
        save_tensors(state, folder / WEIGHTS, metadata=HEADER)
        described = timm_config(exported.config, pool=exported.pool, classes=exported.classes, **common)
        write_json(folder / "config.json", described)


def export_hf(out: Path, exported: Exported) -> None:
    """Write a folder for transformers' from_pretrained; UserError if ``out`` exists or the encoder is mean-pooled."""
    config, size = exported.config, exported.image_size
    state = hf_state_dict(exported.encoder, config, image_size=size, pool=exported.pool, head=exported.head)
    with aside(out) as folder:
        folder.mkdir()
        save_tensors(state, folder / WEIGHTS, metadata=HEADER)
        described = hf_config(config, image_size=size, head=exported.head, classes=exported.classes)
        write_json(folder / "config.json", described)
        write_json(folder / "preprocessor_config.json", hf_preprocessor(config, image_size=size))


def export_safetensors(out: Path, exported: Exported) -> None:
    """Write one file with timm's key names, everything else as text in its header; UserError if ``out`` exists."""
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
