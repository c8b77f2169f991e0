"""Set the first value of every parameter."""

from __future__ import annotations

import torch
from torch import nn

from mirl.engine.models.heads import WeightNormHead

TOKEN_STD = 0.02


@torch.no_grad()
def initialise(model: nn.Module) -> None:
    """Set every parameter of ``model`` in place, from torch's global random numbers, as MAE and the release do.

    | parameter                                     | value                                                            |
    |-----------------------------------------------|------------------------------------------------------------------|
    | Linear weights (qkv, kv: the whole matrix)    | Xavier uniform                                                   |
    | patch_embed.proj.weight                       | Xavier uniform as the Linear Q -> D that it is, not as a conv    |
    | prediction heads under head_init zero         | 0; drawn all the same, so that the others begin alike            |
    | weight-normed head: direction, magnitude      | Xavier uniform, 1                                                |
    | biases                                        | 0                                                                |
    | cls_token, mask_token                         | normal, std 0.02                                                 |
    | LayerNorm weight, bias                        | 1, 0                                                             |
    """
    done: set[nn.Parameter] = set()

    def begin(parameter: nn.Parameter, value: str) -> None:
        assert parameter not in done, "a parameter was initialised twice"
        done.add(parameter)
        if value == "xavier":
            nn.init.xavier_uniform_(parameter.flatten(1))
        elif value == "token":
            nn.init.normal_(parameter, std=TOKEN_STD)
        else:
            nn.init.constant_(parameter, float(value))

    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            begin(module.weight, "xavier")
            begin(module.bias, "0")
        elif isinstance(module, WeightNormHead):
            begin(module.weight_v, "xavier")
            module.weight_g.fill_(1)
            begin(module.bias, "0")
        elif isinstance(module, nn.LayerNorm):
            begin(module.weight, "1")
            begin(module.bias, "0")
        for name in ("cls_token", "mask_token"):
            token = getattr(module, name, None)
            if isinstance(token, nn.Parameter):
                begin(token, "token")
    left = [name for name, parameter in model.named_parameters() if parameter not in done]
    assert not left, f"parameters without an initial value: {left}"
