"""Learning-rate scales by layer, weight decay on matrices alone, every parameter once."""

from __future__ import annotations

import pytest
import torch

from mirl.engine.transfer.classification.classifier import Classifier
from mirl.engine.transfer.layer_decay import layer_decay_groups
from tests.engine.models.helpers import tiny_config

CONFIG = tiny_config()


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_groups(pool):
    model = Classifier(CONFIG, num_classes=5, pool=pool, train_positions=True)
    groups = layer_decay_groups(model, weight_decay=0.05, decay=0.5)
    of = {id(parameter): group for group in groups for parameter in group["params"]}
    found = {
        name: (of[id(parameter)]["lr_scale"], of[id(parameter)]["weight_decay"])
        for name, parameter in model.named_parameters()
    }
    assert len(found) == sum(len(group["params"]) for group in groups)
    assert found["encoder.patch_embed.proj.weight"] == (0.5**5, 0.05)
    assert found["encoder.patch_embed.proj.bias"] == (0.5**5, 0.0)
    assert found["encoder.cls_token"] == found["encoder.pos_embed"] == (0.5**5, 0.0)
    assert found["encoder.blocks.0.attn.qkv.weight"] == (0.5**4, 0.05)
    assert found["encoder.blocks.3.norm2.weight"] == (0.5, 0.0)
    norm = "fc_norm" if pool == "avg" else "encoder.norm"
    assert found[f"{norm}.weight"] == found["head.bias"] == (1.0, 0.0)
    assert found["head.weight"] == (1.0, 0.05)


def test_frozen_parameters_are_in_no_group():
    model = Classifier(CONFIG, num_classes=5)
    model.encoder.patch_embed.requires_grad_(False)
    groups = layer_decay_groups(model, weight_decay=0.05, decay=1.0)
    assert {group["lr_scale"] for group in groups} == {1.0}
    frozen = {id(parameter) for parameter in model.encoder.patch_embed.parameters()}
    assert not frozen & {id(parameter) for group in groups for parameter in group["params"]}
    torch.optim.AdamW(groups, lr=1e-3)


@pytest.mark.parametrize("decay", [0.0, 1.5])
def test_a_factor_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match=f"layer_decay is {decay}"):
        layer_decay_groups(Classifier(CONFIG, num_classes=5), weight_decay=0.05, decay=decay)
