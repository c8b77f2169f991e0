"""Load models and encoders from checkpoints of this engine, in one call and without a process group."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor, nn

from mirl.engine.checkpoints.kinds import DETECTOR, ENCODER, PRETRAINED, SEGMENTER, kind_of, require_kind
from mirl.engine.checkpoints.reader import CheckpointReader, locate
from mirl.engine.configuration.config import section_from_dict
from mirl.engine.models import MIRL, ModelConfig
from mirl.errors import UserError

_ENCODER = "encoder."


def load_pretrained(path: Path | str, *, device: torch.device | str = "cpu") -> MIRL:
    """Load the whole model (encoder and decoders, fp32, in eval mode) of a checkpoint, or of a run's newest good one.

    Every weight must be there: a checkpoint that lacks the decoders is refused, because its reconstructions would be
    noise.

    Raises:
        UserError: ``path`` has no checkpoint, or a damaged or incomplete one.

    >>> model = load_pretrained("runs/demo")                                     # doctest: +SKIP
    >>> output = model(images, noise=torch.rand(len(images), 144), full=True)    # doctest: +SKIP
    """
    reader = CheckpointReader(locate(Path(path)))
    kind = kind_of(reader.state)
    if kind not in (PRETRAINED, ENCODER):
        require_kind(reader.state, path, "load_pretrained", PRETRAINED)
    if kind == ENCODER:
        raise UserError(
            f"{reader.path} holds an encoder alone: without decoders there is nothing to reconstruct with; "
            "give a complete checkpoint, or use this one where an encoder is enough (fine-tuning, export)"
        )
    model = MIRL(_model_config(reader))
    load_weights(model, reader)
    return model.to(device).eval()


def load_weights(model: nn.Module, reader: CheckpointReader) -> None:
    """Set every parameter of ``model``. Buffers, which are fixed and in no checkpoint, keep their values.

    Raises:
        UserError: the checkpoint is of another architecture or incomplete.
    """
    reader.require_same_model({name: tuple(parameter.shape) for name, parameter in model.named_parameters()})
    model.load_state_dict(model.state_dict() | reader.weights(), strict=True)


def load_encoder(path: Path | str) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Load the encoder of a checkpoint, or of a run's newest good one: its configuration and weights, fp32 on the CPU.

    Keys are timm's: ``patch_embed.proj.*``, ``cls_token``, ``blocks.i.*``, ``norm.*``. The norms of the inner segments
    are left out: only decoders read them. There are ``config.built_depth`` blocks: a truncated model has its first ones
    only. Nothing else is read.

    A checkpoint without decoders is good enough. So is a fine-tuned classifier, which has no ``norm.*`` if it pools the
    mean. So are a segmenter and a detector, which have no ``norm.*`` either: their configuration has the image size of
    pre-training, whose positions they stretch over every other size.

    Raises:
        UserError: ``path`` has no checkpoint, a damaged one, or one that lacks a weight of the encoder.
    """
    reader = CheckpointReader(locate(Path(path)))
    config = _model_config(reader)
    _require_fixed_positions(reader, config)
    if kind_of(reader.state) in (SEGMENTER, DETECTOR):
        source = _source_config(reader)
        config = dataclasses.replace(config, image_height=source.image_height, image_width=source.image_width)
    stored = {name.removeprefix(_ENCODER): shape for name, shape in reader.shapes.items() if name.startswith(_ENCODER)}
    wanted = encoder_shapes(config)
    # The norm is missing in a classifier that normalises after pooling, and in dense models, which read the blocks.
    if kind_of(reader.state) not in (PRETRAINED, ENCODER) and "norm.weight" not in stored:
        wanted = {name: shape for name, shape in wanted.items() if not name.startswith("norm.")}
    for name, shape in wanted.items():
        if stored.get(name) != shape:
            found = "is missing" if name not in stored else f"is {list(stored[name])}"
            raise UserError(f"{reader.path}: {_ENCODER}{name} {found} and should be {list(shape)}: give another one")
    return config, {
        name: reader.read(_ENCODER + name, "weight", 0, torch.Size(shape).numel()).reshape(shape)
        for name, shape in wanted.items()
    }


def _require_fixed_positions(reader: CheckpointReader, config: ModelConfig) -> None:
    """Refuse a classifier whose positions are not those of its grid: a user of its encoder would take the latter."""
    section = reader.state["config"].get("finetune")
    if section is None:
        return
    source = _source_config(reader)
    if section["train_positions"] or source.grid != config.grid:
        raise UserError(
            f"{reader.path} was fine-tuned with positions of its own (trained, or resampled for another image size): "
            "give the checkpoint it started from (mirl export takes both)"
        )


def _source_config(reader: CheckpointReader) -> ModelConfig:
    """Return the configuration of the encoder from which a run of transfer started."""
    return section_from_dict(ModelConfig, reader.state["config"]["source"], source=str(reader.path / "state.json"))


def encoder_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each weight that `load_encoder` returns."""
    width, hidden, side = config.width, config.mlp_width, config.patch_size
    norm = {"weight": (width,), "bias": (width,)}
    layers = {
        "norm1": norm,
        "attn.qkv": {"weight": (3 * width, width), "bias": (3 * width,)},
        "attn.proj": {"weight": (width, width), "bias": (width,)},
        "norm2": norm,
        "mlp.fc1": {"weight": (hidden, width), "bias": (hidden,)},
        "mlp.fc2": {"weight": (width, hidden), "bias": (width,)},
    }
    projection = {"weight": (width, config.channels, side, side), "bias": (width,)}
    blocks = {
        f"blocks.{index}.{layer}": shapes for index in range(config.built_depth) for layer, shapes in layers.items()
    }
    named = {"patch_embed.proj": projection, **blocks, "norm": norm}
    return {"cls_token": (1, 1, width)} | {
        f"{layer}.{kind}": shape for layer, shapes in named.items() for kind, shape in shapes.items()
    }


def _model_config(reader: CheckpointReader) -> ModelConfig:
    source = str(reader.path / "state.json")
    try:
        values = reader.state["config"]["model"]
    except (KeyError, TypeError):
        raise UserError(f"{source} describes no model: give a checkpoint that this engine wrote") from None
    if kind_of(reader.state) == SEGMENTER:
        # A segmenter's positions are those of the grid of pre-training, stretched over any other.
        sizes = {name: reader.state["config"]["source"][name] for name in ("image_height", "image_width")}
        values = values | sizes
    return section_from_dict(ModelConfig, values, source=source)
