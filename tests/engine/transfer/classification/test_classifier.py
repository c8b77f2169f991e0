"""The classifier equals timm's VisionTransformer, takes a pre-trained encoder exactly, and refuses another."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from timm.models import VisionTransformer
from torch._dynamo.utils import counters

from mirl.engine.models.positions import sincos_positions
from mirl.engine.training.compiling import compile_regions, expected_graphs
from mirl.engine.transfer.classification.classifier import Classifier, all_visible
from mirl.engine.transfer.initialise_from import initialise_from, reinit_last
from mirl.errors import UserError
from tests.engine.models.helpers import make_inputs, make_model, tiny_config

CLASSES = 5
CONFIG = tiny_config()


def make_classifier(config=CONFIG, **options) -> Classifier:
    """With every parameter moved away from its initial value."""
    torch.manual_seed(7)
    model = Classifier(config, **({"num_classes": CLASSES} | options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def encoder_weights(model) -> dict[str, torch.Tensor]:
    """Of a MIRL, as `load_encoder` returns them."""
    state = model.encoder.state_dict()
    return {name: value for name, value in state.items() if not name.startswith("segment_norms.")}


@pytest.mark.parametrize("pool", ["avg", "token"])
@pytest.mark.parametrize(("size", "source_grid"), [((16, 24), None), ((24, 32), (4, 6))])
def test_equals_timm(pool, size, source_grid):
    config = dataclasses.replace(CONFIG, image_height=size[0], image_width=size[1])
    model = make_classifier(config, pool=pool, position_grid=source_grid).eval()
    theirs = VisionTransformer(
        img_size=size, patch_size=4, embed_dim=24, depth=4, num_heads=3, num_classes=CLASSES, global_pool=pool
    ).eval()
    state = {name.removeprefix("encoder."): value for name, value in model.state_dict().items()}
    positions = sincos_positions(source_grid or config.grid, config.width)[None]
    state["pos_embed"] = resample_abs_pos_embed(positions, list(config.grid), list(source_grid or config.grid))
    theirs.load_state_dict(state, strict=True)
    images, _ = make_inputs(config, dtype=torch.float32)
    # float32 sums in another order, over four blocks of values of order 1
    torch.testing.assert_close(model(images), theirs(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_a_pretrained_encoder_gives_the_same_tokens_behind_the_classifier(pool):
    source = make_model(CONFIG, dtype=torch.float32).eval()
    model = Classifier(CONFIG, num_classes=CLASSES, pool=pool).eval()
    assert initialise_from(model, CONFIG, encoder_weights(source)) == []
    images, _ = make_inputs(CONFIG)
    expected = source.encoder(images, all_visible(len(images), CONFIG.num_patches, images.device))[-1]
    tokens = model.tokens(images) if pool == "token" else source.encoder.norm(model.tokens(images))
    torch.testing.assert_close(tokens, expected, atol=1e-6, rtol=1e-6)  # two segments there, one here: the same sums


def test_a_truncated_encoder_loads_into_the_full_depth():
    config = tiny_config(objective="truncated", truncated_depth=3, segments=1, did=False)
    weights = {
        name: value for name, value in encoder_weights(make_model(CONFIG)).items() if not name.startswith("blocks.3.")
    }
    model = Classifier(config, num_classes=CLASSES)
    fresh = {name: value.clone() for name, value in model.encoder.blocks[3].state_dict().items()}
    (remark,) = initialise_from(model, config, weights)
    assert "3 to 3" in remark
    assert torch.equal(model.encoder.blocks[2].mlp.fc1.weight, weights["blocks.2.mlp.fc1.weight"].float())
    assert all(torch.equal(value, fresh[name]) for name, value in model.encoder.blocks[3].state_dict().items())
    del weights["blocks.2.mlp.fc1.weight"]
    with pytest.raises(UserError, match=r"has no blocks\.2\.mlp\.fc1\.weight"):
        initialise_from(model, config, weights)


def test_what_does_not_fit_is_named():
    weights = encoder_weights(make_model(CONFIG))
    model = Classifier(CONFIG, num_classes=CLASSES)
    with pytest.raises(UserError, match="heads is 3 and the pre-trained encoder has 4"):
        initialise_from(model, tiny_config(heads=4), weights)
    with pytest.raises(UserError, match="has no cls_token"):
        initialise_from(model, CONFIG, {name: value for name, value in weights.items() if name != "cls_token"})
    with pytest.raises(UserError, match="has blocks.4.norm1.weight, which this model lacks"):
        initialise_from(model, CONFIG, weights | {"blocks.4.norm1.weight": torch.ones(24)})
    with pytest.raises(UserError, match=r"cls_token is \[1, 1, 8\] .* and \[1, 1, 24\] here"):
        initialise_from(model, CONFIG, weights | {"cls_token": torch.ones(1, 1, 8)})
    token = Classifier(CONFIG, num_classes=CLASSES, pool="token")
    with pytest.raises(UserError, match=r"has no norm\.bias"):
        initialise_from(token, CONFIG, {name: value for name, value in weights.items() if "norm." not in name[:5]})
    with pytest.raises(ValueError, match="pool is 'max'"):
        Classifier(CONFIG, num_classes=CLASSES, pool="max")
    with pytest.raises(ValueError, match=r"images have shape \[2, 8, 8, 3\]"):
        model(torch.zeros(2, 8, 8, 3, dtype=torch.uint8))


def test_the_positions_of_another_size_are_told_and_can_be_trained():
    config = tiny_config(image_height=24, image_width=32)
    fixed = Classifier(config, num_classes=CLASSES, position_grid=CONFIG.grid)
    trained = Classifier(config, num_classes=CLASSES, position_grid=CONFIG.grid, train_positions=True)
    (remark,) = initialise_from(trained, CONFIG, encoder_weights(make_model(CONFIG)))
    assert "4x6 patches to 6x8 patches" in remark
    assert "encoder.pos_embed" not in fixed.state_dict()
    assert torch.equal(trained.encoder.pos_embed, fixed.encoder.pos_embed)
    images, _ = make_inputs(config)
    trained.head.weight.data.normal_()
    trained(images).sum().backward()
    gradient = trained.encoder.pos_embed.grad
    assert gradient[0].eq(0).all() and gradient[1:].ne(0).any(dim=1).all()  # the class token's row is never read


@pytest.mark.parametrize("mode", ["every", "segments", 3])
def test_activation_checkpointing_changes_nothing(mode):
    model = make_classifier(drop_path=0.3)
    images, _ = make_inputs(CONFIG)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(0)  # stochastic depth
        model(images).square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = gradients()
    model.set_activation_checkpointing(mode)
    assert all(torch.equal(a, b) for a, b in zip(gradients(), expected, strict=True))


@pytest.mark.parametrize("drop_path", [0.0, 0.2])
def test_compiled_regions_are_all_made_in_the_trial_step(drop_path):
    torch._dynamo.reset()
    counters.clear()
    model = make_classifier(drop_path=drop_path)
    images, _ = make_inputs(CONFIG)
    torch.manual_seed(0)
    expected = model(images)
    choice = compile_regions(model, len(images), images.device, backend="aot_eager")
    assert choice.on, choice.reason
    torch.manual_seed(0)
    # the same operations; the backend may take apart what eager does in one
    torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-5)
    model(images[:2])
    model.block_features(images)
    assert counters["stats"]["unique_graphs"] == expected_graphs(model)
    assert not counters["graph_break"] and not counters["recompiles"]
    torch._dynamo.reset()


def test_drop_path_drops_in_training_alone():
    model = make_classifier(drop_path=0.9)
    images, _ = make_inputs(CONFIG)
    torch.manual_seed(0)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


def test_block_features_are_those_on_the_way_to_the_head():
    model = make_classifier().eval()
    images, _ = make_inputs(CONFIG)
    features = model.block_features(images)
    assert len(features) == 4 and all(one.shape == (3, 24) and not one.requires_grad for one in features)
    torch.testing.assert_close(model.fc_norm(features[-1]), model.features(images))
    assert len({float(one.sum()) for one in features}) == 4


def test_the_head_begins_near_zero():
    torch.manual_seed(0)
    weight = Classifier(CONFIG, num_classes=1000).head.weight
    # deviation of a normal distribution cut at two of its own: 0.88; 24,000 draws estimate it to half a percent
    assert weight.std().item() == pytest.approx(0.88 * 2e-5, rel=0.02) and weight.abs().max() <= 4e-5


def test_the_last_blocks_are_made_fresh():
    model, other, kept = (make_classifier() for _ in range(3))
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    reinit_last(model, 2, seed=4)
    assert torch.equal(torch.rand(1), expected)  # the global generator is as it was
    reinit_last(other, 2, seed=4)
    for name, value in kept.state_dict().items():
        changed = name.startswith(("encoder.blocks.2", "encoder.blocks.3"))
        assert torch.equal(model.state_dict()[name], value) != changed, name
        assert torch.equal(model.state_dict()[name], other.state_dict()[name])
    assert model.encoder.blocks[3].attn.qkv.bias.eq(0).all()
    reinit_last(other, 3, seed=4)
    assert not torch.equal(other.encoder.blocks[1].mlp.fc1.weight, kept.encoder.blocks[1].mlp.fc1.weight)
    for number in (-1, 5):
        with pytest.raises(UserError, match=rf"reinit_last is {number} and the encoder has 4 blocks"):
            reinit_last(model, number, seed=0)
