"""Learning rates differ by layer: the nearer a layer is to the pixels, the less fine-tuning moves it."""

from __future__ import annotations

from collections import defaultdict

from torch import nn

from mirl.engine.training.optimizer import assert_covered_once, takes_weight_decay
from mirl.engine.transfer.encoder_model import EncoderModel
from mirl.errors import UserError


def layer_of(name: str, depth: int) -> int:
    """Return the layer of a parameter of an `EncoderModel`: 0 before the blocks, i + 1 in block i, L + 1 after them."""
    if name.startswith("encoder.blocks."):
        return int(name.split(".")[2]) + 1
    if name.startswith(("encoder.patch_embed.", "encoder.cls_token", "encoder.pos_embed")):
        return 0
    return depth + 1


def layer_decay_groups(model: EncoderModel, *, weight_decay: float, decay: float) -> list[dict]:
    """Make one parameter group for each layer and weight decay, its "lr_scale" decay ** (L + 1 - layer).

    `TrainEngine.step` multiplies the learning rate by "lr_scale". As in pre-training, only matrices have weight decay;
    trained positions, a table and no matrix, have none. Every trainable parameter is in exactly one group.
    UserError unless 0 < decay <= 1.
    """
    if not 0 < decay <= 1:
        raise UserError(f"layer_decay is {decay}: give a factor above 0 and up to 1, e.g. 0.75; 1 is none")
    depth = model.config.depth
    members: dict[tuple[int, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decayed = takes_weight_decay(parameter) and name != "encoder.pos_embed"
            members[layer_of(name, depth), weight_decay if decayed else 0.0].append(parameter)
    groups = [
        {"params": members[layer, rate], "weight_decay": rate, "lr_scale": decay ** (depth + 1 - layer)}
        for layer, rate in sorted(members)
    ]
    assert_covered_once((parameter for _, parameter in model.named_parameters()), groups)
    return groups
