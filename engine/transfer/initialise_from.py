"""Fine-tuning starts from the weights of a pre-trained encoder, some of them fresh again."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from mirl.engine.distributed.ds_engine import FragmentReader
from mirl.engine.models.config import ModelConfig
from mirl.engine.models.initialise import initialise
from mirl.engine.transfer.encoder_model import EncoderModel
from mirl.errors import UserError

_SAME = ("width", "heads", "mlp_width", "patch_size", "channels", "depth")


def initialise_from(model: EncoderModel, source_config: ModelConfig, encoder_weights: dict[str, Tensor]) -> list[str]:
    """Set the weights of ``model.encoder``; return one line for each thing that is not simply taken over.

    encoder_weights: under timm's names without a prefix, as `mirl.engine.checkpoints.pretrained.load_encoder` returns
    them. ``norm`` is left out if the model has none. The blocks that a truncated pre-trained model lacks, and the head,
    stay as they were initialised. Trained positions start from the fixed ones.

    Raises:
        UserError: an encoder of another shape, or weights that are missing, superfluous or of another shape.
    """
    assert model.position_grid == source_config.grid, "the model was made for the positions of another grid"
    for name in _SAME:
        ours, theirs = getattr(model.config, name), getattr(source_config, name)
        if ours != theirs:
            raise UserError(
                f"{name} is {ours} and the pre-trained encoder has {theirs}: fine-tune with the model it was made with"
            )
    remarks = []
    built, depth = source_config.built_depth, model.config.depth
    if built < depth:
        remarks.append(f"blocks {built} to {depth - 1} are fresh: the model was pre-trained truncated to {built}")
    expected = {
        name: parameter
        for name, parameter in model.encoder.named_parameters()
        if name != "pos_embed" and _block(name) < built
    }
    found = dict(encoder_weights)
    if not any(name.startswith("norm.") for name in expected):
        found = {name: value for name, value in found.items() if not name.startswith("norm.")}
    _require_same(expected, found)
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(found[name])
    if model.position_grid != model.config.grid:
        remarks.append(f"positions are resampled from {_grid(model.position_grid)} to {_grid(model.config.grid)}")
    return remarks


def exact_reader(model: nn.Module) -> FragmentReader:
    """Return a reader of the weights of ``model`` as they are now.

    In bf16 DeepSpeed would make its fp32 weights from rounded ones, and low bits would be lost.
    """
    weights = {name: parameter.detach().float().cpu().clone() for name, parameter in model.named_parameters()}

    def read(name: str, kind: str, start: int, numel: int) -> Tensor:
        assert kind == "weight"
        return weights[name].flatten()[start : start + numel]

    return read


@torch.no_grad()
def reinit_last(model: EncoderModel, blocks: int, seed: int) -> None:
    """Initialise the last ``blocks`` blocks afresh (Fig. 2 of the paper), from ``seed`` alone; the head is not touched.

    Raises:
        UserError: the encoder has fewer blocks.
    """
    depth = model.config.depth
    if not 0 <= blocks <= depth:
        raise UserError(f"reinit_last is {blocks} and the encoder has {depth} blocks: give 0 to {depth}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for block in model.encoder.blocks[depth - blocks :]:
            initialise(block)


def _require_same(expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    for name in sorted(set(expected) | set(found)):
        if name not in found:
            raise UserError(f"the pre-trained encoder has no {name}: give a complete one")
        if name not in expected:
            raise UserError(f"the pre-trained encoder has {name}, which this model lacks: give one of this shape")
        if expected[name].shape != found[name].shape:
            ours, theirs = list(expected[name].shape), list(found[name].shape)
            raise UserError(f"{name} is {theirs} in the pre-trained encoder and {ours} here: give one of this shape")


def _block(name: str) -> int:
    """Return the number of the block of a weight, -1 for none."""
    match = re.match(r"blocks\.(\d+)\.", name)
    return int(match[1]) if match else -1


def _grid(grid: tuple[int, int]) -> str:
    return f"{grid[0]}x{grid[1]} patches"
