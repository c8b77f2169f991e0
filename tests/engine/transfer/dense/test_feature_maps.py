"""Feature maps are timm's at any image size, however they are computed; the pyramid has BEiT's sizes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from timm.models import VisionTransformer
from torch import nn

from mirl.engine.accounting.run_memory import writes_out_attention
from mirl.engine.models.positions import resample_positions, sincos_positions
from mirl.engine.training.compiling import compile_regions, expected_graphs
from mirl.engine.transfer.dense import norms
from mirl.engine.transfer.dense.feature_maps import DenseModel, Pyramid, taken_blocks
from mirl.engine.transfer.dense.norms import BatchNorm, GroupNorm
from mirl.engine.transfer.initialise_from import initialise_from
from mirl.engine.transfer.layer_decay import layer_decay_groups
from mirl.errors import UserError
from tests.engine.models.helpers import make_inputs, make_model, tiny_config

CONFIG = tiny_config()
CPU = torch.device("cpu")


def make_dense(config=CONFIG, **options) -> DenseModel:
    """With every parameter moved away from its initial value."""
    torch.manual_seed(7)
    model = DenseModel(config, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(("size", "source_grid"), [((16, 24), None), ((40, 16), (4, 6))])
def test_maps_are_what_the_blocks_of_timm_give(size, source_grid):
    model = make_dense(position_grid=source_grid, taken=(0, 2, 3)).eval()
    theirs = VisionTransformer(
        img_size=size, patch_size=4, embed_dim=24, depth=4, num_heads=3, num_classes=0, global_pool="token"
    ).eval()
    state = {name.removeprefix("encoder."): value for name, value in model.state_dict().items()}
    grid = (size[0] // 4, size[1] // 4)
    state |= {"pos_embed": sincos_positions(grid, 24, source_grid)[None]}
    left = theirs.load_state_dict(state, strict=False)
    assert left.missing_keys == ["norm.weight", "norm.bias"] and not left.unexpected_keys
    images, _ = make_inputs(dataclasses.replace(CONFIG, image_height=size[0], image_width=size[1]), dtype=torch.float32)
    expected = theirs.get_intermediate_layers(images, n=[0, 2, 3], reshape=True)
    # float32 sums in another order, over four blocks of values of order 1
    for ours, map_BDhw in zip(model.feature_maps(images), expected, strict=True):
        torch.testing.assert_close(ours, map_BDhw, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", ["every", "segments", "3"])
def test_recomputed_maps_are_the_same(mode):
    images, _ = make_inputs(CONFIG)
    found = []
    for chosen in ("none", mode):
        model = make_dense(drop_path=0.2, taken=(1, 3)).train()
        model.set_activation_checkpointing(chosen)
        torch.manual_seed(3)
        maps = model.feature_maps(images)
        sum(map_BDhw.square().sum() for map_BDhw in maps).backward()
        found.append([*maps, *(parameter.grad for parameter in model.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-5)  # the two halves of a sum meet elsewhere


def test_positions_are_stretched_over_the_image():
    assert torch.equal(sincos_positions((4, 6), 24, (4, 6)), sincos_positions((4, 6), 24))
    # Twice the patches each way: the mean place of a pair is that of the patch that they divide.
    fine = sincos_positions((14 * 3, 14 * 3), 48, (14, 14))[1:].unflatten(0, (42, 42))
    assert torch.allclose(fine[1::3, 1::3].flatten(0, 1), sincos_positions((14, 14), 48)[1:], atol=1e-6)
    # What others resample bicubically is near, away from the border.
    table = resample_positions(sincos_positions((14, 14), 48), (14, 14), (42, 42))[1:].unflatten(0, (42, 42))
    assert (table - fine)[9:-9, 9:-9].abs().max() < 0.15


@pytest.mark.parametrize(
    ("depth", "taken"),
    [(4, (0, 1, 2, 3)), (12, (3, 5, 7, 11)), (24, (7, 11, 15, 23)), (48, (15, 23, 31, 47)), (54, (17, 26, 35, 53))],
)
def test_blocks_are_taken_at_thirds_and_the_half(depth, taken):
    assert taken_blocks(depth) == taken


@pytest.mark.compile
def test_compiled_regions_serve_images_of_training_size_alone():
    model = make_dense(dataclasses.replace(CONFIG, attention="sdpa"), drop_path=0.1)
    choice = compile_regions(model, 3, CPU)
    assert choice.on, choice.reason
    assert f"{expected_graphs(model)} graphs" in choice.reason
    images, _ = make_inputs(CONFIG)
    model.train().feature_maps(images)
    assert model.regions.active
    model.feature_maps(images[:, :, :16])
    assert not model.regions.active


def test_images_that_do_not_fit_are_refused():
    model = make_dense()
    for shape in ((1, 18, 24, 3), (1, 16, 24, 1), (1, 0, 24, 3)):
        with pytest.raises(UserError, match="with H and W multiples of 4"):
            model.feature_maps(torch.zeros(shape, dtype=torch.uint8))
    with pytest.raises(UserError, match="depth is 3"):
        taken_blocks(3)


def test_it_starts_from_a_pretrained_encoder_with_layer_decay():
    source = make_model(CONFIG, dtype=torch.float32)
    weights = {name: value for name, value in source.encoder.state_dict().items() if "segment_norms" not in name}
    model = DenseModel(CONFIG)
    model.head = nn.Conv2d(24, 2, 1)
    assert initialise_from(model, CONFIG, weights) == []
    assert torch.equal(model.encoder.blocks[3].mlp.fc2.weight, source.encoder.blocks[3].mlp.fc2.weight)
    groups = layer_decay_groups(model, weight_decay=0.05, decay=0.5)
    assert sorted({group["lr_scale"] for group in groups}) == [0.5**power for power in range(5, -1, -1)]


@pytest.mark.parametrize("norm", [BatchNorm, GroupNorm])
def test_the_pyramid_has_the_sizes_of_beit(norm):
    maps = [torch.randn(2, 8, 5, 6) for _ in range(4)]
    found = Pyramid(8, norm)(maps)
    assert [tuple(map_BDhw.shape) for map_BDhw in found] == [(2, 8, 20, 24), (2, 8, 10, 12), (2, 8, 5, 6), (2, 8, 2, 3)]
    assert found[2] is maps[2]
    assert torch.equal(found[3], torch.nn.functional.max_pool2d(maps[3], 2))


def test_batch_norm_is_that_of_torch_and_stays_float32():
    ours, theirs = BatchNorm(6), nn.BatchNorm2d(6)
    for _ in range(3):
        x = torch.randn(4, 6, 3, 5) * 3 + 1
        torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    kept = ours.running_mean.clone()
    low = ours.bfloat16()
    assert low.weight.dtype == torch.bfloat16 and torch.equal(low.running_mean, kept)
    assert low(x.bfloat16()).dtype == torch.bfloat16


def test_batch_norm_over_ranks_is_that_of_all_their_images(monkeypatch):
    """Both ranks in one process: what each would send is taken first, and their sum is given to both."""
    x = [(torch.randn(2, 6, 3, 5) * 2 + number).requires_grad_() for number in range(2)]
    weights = [torch.randn(2, 6, 3, 5) for _ in x]
    sent: list[torch.Tensor] = []

    def send(row: torch.Tensor) -> torch.Tensor:
        sent.append(row)
        return row

    monkeypatch.setattr(norms, "_ranks", lambda: 2)
    made = []
    for give in (send, lambda row: sent[0] + sent[1]):
        monkeypatch.setattr(norms._SumOverRanks, "apply", give)
        made = [BatchNorm(6) for _ in x]
        out = []
        for rank, (norm, images) in enumerate(zip(made, x, strict=True)):
            monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
            out.append(norm(images))
    theirs, both = nn.BatchNorm2d(6), torch.cat([images.detach() for images in x]).requires_grad_()
    expected = theirs(both)
    torch.testing.assert_close(torch.cat(out), expected, atol=1e-5, rtol=1e-5)  # float32 sums in another order
    (expected * torch.cat(weights)).sum().backward()
    sum((y * weight).sum() for y, weight in zip(out, weights, strict=True)).backward()
    torch.testing.assert_close(torch.cat([images.grad for images in x]), both.grad, atol=1e-5, rtol=1e-4)
    for norm in made:
        torch.testing.assert_close(norm.running_var, theirs.running_var)
        torch.testing.assert_close(norm.running_mean, theirs.running_mean)


def test_long_sequences_keep_no_matrix_on_a_cpu():
    """From 2,048 patches on; one that was asked for by name is kept."""
    config = tiny_config(patch_size=2, image_height=64, image_width=128)
    assert config.num_patches == 2048
    for asked, names in (("auto", {"sdpa"}), ("math", {"math"})):
        asking = dataclasses.replace(config, attention=asked)
        chosen = DenseModel(asking).resolve_attention(torch.device("cpu"))
        assert {backend.name for backend in chosen.values()} == names
        assert writes_out_attention(asking, on_gpu=False) == (names == {"math"})
    short = dataclasses.replace(config, image_height=62, attention="auto")
    assert {backend.name for backend in DenseModel(short).resolve_attention(torch.device("cpu")).values()} == {"math"}
    assert writes_out_attention(short, on_gpu=False) and not writes_out_attention(short, on_gpu=True)
