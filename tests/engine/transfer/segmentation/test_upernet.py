"""The segmenter is transformers' UperNet over BeitBackbone with the same weights, to rounding."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import save_file

from mirl.engine.transfer.segmentation.huggingface import upernet_config, upernet_state_dict
from mirl.engine.transfer.segmentation.segmenter import Segmenter
from mirl.errors import UserError
from tests.engine.models.helpers import make_inputs, tiny_config

CONFIG = dataclasses.replace(tiny_config(depth=6), image_height=32, image_width=32)
NAMES = ("sky", "road", "tree", "wall", "cat")


def make_segmenter(config=CONFIG, **options) -> Segmenter:
    """With every parameter, and the statistics of the norms, moved away from their initial values."""
    torch.manual_seed(7)
    model = Segmenter(config, **({"num_classes": len(NAMES), "position_grid": (4, 6)} | options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for buffer in model.kept_buffers().values():
            buffer.add_(0.3 * torch.rand_like(buffer))
    return model


def theirs_of(model: Segmenter, folder, names=NAMES):
    transformers = pytest.importorskip("transformers", reason="an extra of the tests: pip install mirl-engine[test]")
    save_file(upernet_state_dict(model), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(upernet_config(model, names)))
    found, told = transformers.UperNetForSemanticSegmentation.from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()), told
    return found.eval()


def test_it_equals_transformers(tmp_path):
    model = make_segmenter().eval()
    theirs = theirs_of(model, tmp_path)
    images, _ = make_inputs(CONFIG, dtype=torch.float32)
    with torch.no_grad():
        # float32: sums of some thousand products in another order, and k without its bias
        torch.testing.assert_close(model(images), theirs(images).logits, atol=1e-4, rtol=1e-4)
        maps = theirs.backbone(images).feature_maps
        for ours, map_BDhw in zip(model.pyramid(model.feature_maps(images)), maps, strict=True):
            torch.testing.assert_close(ours, map_BDhw, atol=1e-5, rtol=1e-4)
        auxiliary = torch.nn.functional.interpolate(model.auxiliary_head(maps), size=(32, 32), mode="bilinear")
        torch.testing.assert_close(
            auxiliary, torch.nn.functional.interpolate(theirs.auxiliary_head(maps), size=(32, 32), mode="bilinear"),
            atol=1e-4, rtol=1e-4,
        )  # fmt: skip
    assert theirs.config.id2label[4] == "cat"


def test_training_is_that_of_transformers_too(tmp_path):
    model = make_segmenter()
    theirs = theirs_of(model, tmp_path)
    images, _ = make_inputs(CONFIG, dtype=torch.float32)
    model.train()
    theirs.train()
    for dropout in (model.decode_head.dropout, model.auxiliary_head.dropout):
        dropout.p = 0.0  # transformers has none
    ours = model(images)[0]
    expected = theirs.decode_head(theirs.backbone(images).feature_maps)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        model.decode_head.fpn_bottleneck.bn.running_var, theirs.decode_head.fpn_bottleneck.batch_norm.running_var
    )


def test_names_are_those_of_mmsegmentation():
    # From its UPerHead and FCNHead: mmseg/models/decode_heads/{uper_head,fcn_head}.py of 1.2.2, with mmcv's ConvModule.
    names = set(make_segmenter().state_dict())
    for name in (
        "decode_head.conv_seg.weight", "decode_head.psp_modules.3.1.conv.weight", "decode_head.psp_modules.0.1.bn.bias",
        "decode_head.bottleneck.conv.weight", "decode_head.lateral_convs.2.bn.running_mean",
        "decode_head.fpn_convs.0.conv.weight", "decode_head.fpn_bottleneck.bn.weight",
        "auxiliary_head.convs.0.conv.weight", "auxiliary_head.conv_seg.bias", "pyramid.fpn1.3.weight",
    ):  # fmt: skip
        assert name in names, name


def test_norms_of_groups_and_one_class_are_refused():
    with pytest.raises(UserError, match="norm is group"):
        upernet_state_dict(make_segmenter(norm="group"))
    with pytest.raises(UserError, match="num_classes is 1"):
        Segmenter(CONFIG, num_classes=1)


def test_other_sizes_and_one_image_pass():
    model = make_segmenter(norm="group").train()
    images = torch.randint(0, 256, (1, 24, 40, 3), dtype=torch.uint8)
    logits, auxiliary = model(images)
    assert logits.shape == (1, 5, 24, 40) and auxiliary.shape == (1, 5, 6, 10)
    assert model.eval()(images).shape == (1, 5, 24, 40)
