"""Mask R-CNN on a Vision Transformer: windows, pools, losses and types, against closed forms and slower ways."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mirl.engine.models.layers import Block
from mirl.engine.transfer.detection.detector import VARIANTS, Detector, padding_multiple
from mirl.engine.transfer.detection.heads import TERMS, AlignedPool, build_proposals, build_region_heads, mask_targets
from mirl.engine.transfer.detection.pyramids import NAMES
from mirl.engine.transfer.detection.windows import global_blocks, join_windows, split_windows
from mirl.errors import UserError
from tests.engine.models.helpers import tiny_config

CLASSES = 3
# Padded and true sizes of two images, and what is in them; the second one is empty.
SIZES = [(64, 60), (40, 64)]


def detector(variant: str = "paper", window: int = 0, **options) -> Detector:
    torch.manual_seed(0)
    config = tiny_config(depth=6, segments=2, patch_size=8, image_height=64, image_width=64)
    model = Detector(config, classes=CLASSES, variant=variant, window=window, regions=16, channels=32, **options)
    model.rpn._post_nms_top_n = {"training": 20, "testing": 10}  # a thousand take seconds
    model.roi_heads.detections_per_img = 4
    return model


def batch() -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
    images = torch.randint(0, 256, (2, 64, 64, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    mask = torch.zeros(2, 64, 64, dtype=torch.uint8)
    mask[0, 8:40, 10:50] = mask[1, 50:51, 30:31] = 1
    full = {
        "boxes": torch.tensor([[10.0, 8.0, 50.0, 40.0], [30.0, 50.0, 31.0, 51.0]]),
        "labels": torch.tensor([1, 3]),
        "masks": mask,
    }
    nothing = {
        "boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64),
        "masks": torch.zeros(0, 64, 64, dtype=torch.uint8),
    }  # fmt: skip
    return images, [full, nothing]


def test_windows_are_squares_of_the_grid_and_come_back_to_their_places():
    x_BND = torch.arange(2 * 4 * 6).view(2, 24, 1)
    windows = split_windows(x_BND, (4, 6), 2)
    assert windows.shape == (12, 4, 1)
    assert windows[1].flatten().tolist() == [2, 3, 8, 9] and windows[6].flatten().tolist() == [24, 25, 30, 31]
    assert torch.equal(join_windows(windows, (4, 6), 2), x_BND)


@pytest.mark.parametrize(("depth", "expected"), [(12, (2, 5, 8, 11)), (24, (5, 11, 17, 23)), (48, (11, 23, 35, 47))])
def test_global_blocks_are_those_of_vitdet(depth, expected):
    assert global_blocks(depth) == expected


@pytest.mark.parametrize("variant", VARIANTS)
def test_windowed_blocks_see_their_window_alone_and_global_ones_everything(variant):
    model = detector(variant, window=4).eval()
    images = batch()[0][:1].clone()
    before = model.feature_maps(images)
    images[:, :32, :32] = 0  # the first of four windows
    after = model.feature_maps(images)
    changed = [(a != b).flatten(2).any(dim=1).view(8, 8) for a, b in zip(before, after, strict=True)]
    assert changed[-1].all(), "the last block is global"
    first = model.global_blocks
    if variant == "paper":  # its first map comes from the first global block
        assert min(first) == 1 and changed[0].all()
    model.global_blocks = frozenset()
    last = zip(model.feature_maps(batch()[0][:1]), model.feature_maps(images), strict=True)
    *_, (a, b) = last
    found = (a != b).flatten(2).any(dim=1).view(8, 8)
    assert found[:4, :4].all() and not found[4:].any() and not found[:, 4:].any()


def test_a_windowed_run_is_the_blocks_on_each_window():
    model = detector("vitdet", window=4).eval()
    x_BND = torch.randn(2, 64, 24, generator=torch.Generator().manual_seed(2))
    found = model._run_windowed(0, 1, x_BND, (8, 8))
    for row, column in ((0, 0), (4, 0), (0, 4)):
        cut = x_BND.view(2, 8, 8, 24)[:, row : row + 4, column : column + 4].reshape(2, 16, 24)
        wanted = model.encoder.blocks[0](cut)
        got = found.view(2, 8, 8, 24)[:, row : row + 4, column : column + 4].reshape(2, 16, 24)
        torch.testing.assert_close(got, wanted)


def test_stochastic_depth_drops_all_windows_of_an_image_together():
    block = Block(8, 2, 16, drop_path=0.5)
    block.parts = 3
    torch.manual_seed(0)
    scales = torch.stack([block.drop_scale(torch.zeros(12, 5, 8)).view(4, 3) for _ in range(8)])
    assert (scales == scales[..., :1]).all() and set(scales.unique().tolist()) == {0.0, 2.0}


def test_regions_are_pooled_where_they_are():
    # A map that says the x of each pixel's centre: the mean of a bin is the x of the bin's centre.
    pool, side = AlignedPool(7, 16), 512
    maps = {}
    for name, stride in zip(NAMES, pool.strides, strict=False):
        centres = (torch.arange(side / stride) + 0.5) * stride
        maps[name] = centres.expand(1, 1, int(side / stride), -1).contiguous()
    boxes = torch.tensor([[100.0, 120.0, 170.0, 190.0], [64.0, 64.0, 288.0, 288.0], [30.0, 40.0, 480.0, 490.0]])
    assert pool.levels_of(boxes).tolist() == [0, 2, 3]
    pooled = pool(maps, [boxes], [(side, side)])
    for box, found in zip(boxes, pooled, strict=True):
        wanted = box[0] + (torch.arange(7) + 0.5) * (box[2] - box[0]) / 7
        torch.testing.assert_close(found[0], wanted.expand(7, 7), atol=1e-3, rtol=0)


def test_mask_targets_are_the_part_of_the_mask_in_the_box():
    mask = torch.zeros(1, 40, 40, dtype=torch.uint8)
    mask[0, 10:20, 8:24] = 1
    found = mask_targets(mask, torch.tensor([[8.0, 0.0, 36.0, 28.0]]), torch.tensor([0]), 28)
    wanted = torch.zeros(28, 28)
    wanted[10:20, :16] = 1
    assert torch.equal(found[0], wanted)


def test_box_losses_are_l1_of_the_deltas_and_giou_of_the_boxes():
    heads = build_region_heads(16, 8, CLASSES, box_loss="l1", regions=8)
    proposals = [torch.tensor([[0.0, 0.0, 10.0, 10.0], [5.0, 5.0, 25.0, 25.0], [0.0, 0.0, 4.0, 4.0]])]
    labels, objects = (
        torch.tensor([2, 1, 0]),
        [torch.tensor([[0.0, 0.0, 10.0, 20.0], [5.0, 5.0, 25.0, 25.0], [0.0] * 4])],
    )
    targets = heads.box_coder.encode([objects[0][:2]], [proposals[0][:2]])[0]
    targets = torch.cat([targets, torch.zeros(1, 4)])
    deltas = torch.zeros(3, 4 * (1 + CLASSES))
    assert heads._box_loss(deltas, proposals, labels, targets) == pytest.approx(targets.abs().sum().item() / 3)
    heads.box_loss = "giou"
    # The first box covers half of its object, and all of the smallest box around both.
    assert heads._box_loss(deltas, proposals, labels, targets).item() == pytest.approx(10 * 0.5 / 3, rel=1e-4)
    right = deltas.view(3, -1, 4).clone()
    right[0, 2], right[1, 1] = targets[0], targets[1]
    assert heads._box_loss(right.flatten(1), proposals, labels, targets).item() == pytest.approx(0, abs=1e-4)


def test_the_proposals_box_loss_is_l1_over_the_sampled_anchors():
    proposals = build_proposals(16, 8, 1)
    deltas, wanted = torch.zeros(8, 4), [torch.full((8, 4), 0.5)]
    labels = [torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0])]
    _, box = proposals.compute_loss(torch.zeros(8, 1), deltas, labels, wanted)
    assert box.item() == pytest.approx(2 * 4 * 0.5 / 7)


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_are_finite_and_move_every_parameter_with_and_without_objects(variant):
    model = detector(variant, window=4 if variant == "vitdet" else 0, box_loss="giou" if variant == "paper" else "l1")
    images, targets = batch()
    for given in (targets, [targets[1]] * 2):
        model.zero_grad()
        losses = model(images, SIZES, given)
        assert tuple(losses) == TERMS and all(loss.isfinite() for loss in losses.values())
        sum(losses.values()).backward()
        missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
        assert not missing, "a rank without objects would have no gradient to reduce"
    assert losses["mask"] == 0 and losses["box"] == 0


def test_weights_in_bfloat16_give_float32_losses_near_those_of_float32():
    images, targets = batch()
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        model = detector().to(dtype)
        torch.manual_seed(0)
        losses.append(model(images, SIZES, targets))
        sum(losses[-1].values()).backward()
    for name in TERMS:
        assert losses[1][name].dtype == torch.float32
        # Eight bits of the encoder's maps; what regions are sampled may differ.
        assert losses[1][name].item() == pytest.approx(losses[0][name].item(), rel=0.1, abs=0.02), name
    assert model(images, SIZES, targets)["class"].dtype == torch.float32
    with torch.no_grad():
        assert all(found["boxes"].dtype == torch.float32 for found in model.eval()(images, SIZES))


def test_the_padding_of_a_batch_is_not_seen():
    model = detector().eval()
    images = batch()[0]
    other = images.clone()
    other[0, :, 60:], other[1, 40:] = 7, 9
    model.roi_heads.score_thresh = 0.0
    for one, two in zip(model(images, SIZES), model(other, SIZES), strict=True):
        assert torch.equal(one["scores"], two["scores"]) and len(one["scores"])
        assert one["masks"].shape[1:] == (1, 28, 28)
        assert (one["boxes"][:, 2] <= 64).all() and (one["labels"] >= 1).all()


def test_recomputed_blocks_give_the_same_losses_and_gradients():
    images, targets = batch()
    found = []
    for mode in ("none", "every"):
        model = detector("vitdet", window=4, drop_path=0.2)
        model.set_activation_checkpointing(mode)
        torch.manual_seed(5)
        loss = sum(model(images, SIZES, targets).values())
        loss.backward()
        found.append((loss.detach(), model.encoder.blocks[0].attn.qkv.weight.grad))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])


@pytest.mark.parametrize(("patch", "window", "multiple"), [(16, 0, 32), (16, 16, 256), (8, 5, 80), (14, 1, 28)])
def test_sides_are_padded_to_whole_windows_and_to_two_patches(patch, window, multiple):
    assert padding_multiple(patch, window) == multiple


def test_what_does_not_go_together_is_refused():
    with pytest.raises(UserError, match="variant is 'plain': choose one of paper, vitdet"):
        detector("plain")
    with pytest.raises(UserError, match="box_loss is 'l2'"):
        detector(box_loss="l2")
    with pytest.raises(UserError, match="8x8 patches and window is 3"):
        detector("vitdet", window=3)(batch()[0], SIZES, batch()[1])


def test_attention_of_a_windowed_run_never_has_more_keys_than_a_window(monkeypatch):
    model = detector("vitdet", window=4)
    seen = []
    original = F.softmax
    monkeypatch.setattr(torch, "softmax", lambda x, dim: seen.append(x.shape[-1]) or original(x, dim=dim))
    model.feature_maps(batch()[0])
    assert sorted(set(seen)) == [16, 64] and seen.count(64) == len(model.global_blocks)
