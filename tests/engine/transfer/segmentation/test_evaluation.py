"""Scores follow from a table by hand; windows cover an image as mmsegmentation's do; the loss is its default."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mirl.engine.transfer.segmentation.inference import View, predict
from mirl.engine.transfer.segmentation.pictures import overlay, palette
from mirl.engine.transfer.segmentation.scores import SegmentScores
from mirl.engine.transfer.segmentation.task import pixel_cross_entropy
from tests.engine.models.helpers import tiny_config
from tests.engine.transfer.segmentation.test_upernet import make_segmenter

CPU = torch.device("cpu")
CONFIG = dataclasses.replace(tiny_config(), image_height=32, image_width=32, mean=(0.5,) * 3, std=(0.25,) * 3)


def test_scores_of_a_table():
    scores = SegmentScores(confusion=[[6, 2, 0, 0], [1, 3, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]], images=2, broken=1)
    assert scores.iou_percent() == [pytest.approx(100 * 6 / 9), pytest.approx(100 * 3 / 7), None, 0.0]
    assert scores.accuracy_percent() == [75.0, 75.0, None, 0.0]
    assert scores.miou_percent == pytest.approx(100 * (6 / 9 + 3 / 7) / 3)  # of the three classes that there are
    assert scores.macc_percent == 50.0 and scores.aacc_percent == pytest.approx(100 * 9 / 13)
    assert scores.by_class(["a", "b", "c", "d"])["b"]["pixels"] == 4
    assert [line.split()[0] for line in scores.table(["a", "b", "c", "d"])] == ["a", "b", "c", "d"]
    assert SegmentScores(confusion=[[0, 0], [0, 0]], images=0).metrics()["val_miou_percent"] == 0.0


class ByColour(nn.Module):
    """Logits that follow from the colour of each pixel alone, and what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.config, self.num_classes = CONFIG, 3
        self.shown: list[tuple[int, ...]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.shown.append(tuple(images.shape))
        return images.permute(0, 3, 1, 2).float() / 16


def picture(height: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(height)
    small = rng.integers(0, 256, (-(-height // 8), -(-width // 8), 3))
    return np.kron(small, np.ones((8, 8, 1)))[:height, :width].astype(np.uint8)


@pytest.mark.parametrize("size", [(32, 32), (32, 75), (50, 32)])
@pytest.mark.parametrize("mode", ["slide", "whole"])
def test_what_a_pixel_is_does_not_depend_on_the_windows(size, mode):
    image = picture(*size)
    model = ByColour()
    found = predict(model, image, View(crop=(32, 32), mode=mode, flip=True), CPU)
    expected = torch.from_numpy(image).permute(2, 0, 1).float().div(16).softmax(0)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    # mmsegmentation: ceil((side - crop) / stride) + 1 windows a side, here with a stride of 21; both ways round.
    windows = np.prod([max(0, -(-(side - 32) // 21)) + 1 for side in size])
    assert sum(shape[0] for shape in model.shown) == 2 * (windows if mode == "slide" else 1)
    assert all(shape[1] % 4 == shape[2] % 4 == 0 for shape in model.shown)


def test_windows_and_scales_are_averaged_as_probabilities():
    model = make_segmenter(CONFIG).eval()
    image = picture(40, 32)
    view = View(crop=(32, 32), stride=8)
    with torch.no_grad():
        windows = [model(torch.from_numpy(image[top : top + 32])[None])[0] for top in (0, 8)]
    logits = torch.zeros(5, 40, 32)
    logits[:, :32] += windows[0]
    logits[:, 8:] += windows[1]
    logits[:, 8:32] /= 2
    torch.testing.assert_close(predict(model, image, view, CPU), logits.softmax(0), atol=1e-5, rtol=1e-4)
    single = [predict(model, image, View(crop=(32, 32), scales=(scale,)), CPU) for scale in (1.0, 1.5)]
    both = predict(model, image, View(crop=(32, 32), scales=(1.0, 1.5)), CPU)
    torch.testing.assert_close(both, sum(single) / 2, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(both.sum(0), torch.ones(40, 32), atol=1e-5, rtol=1e-5)


def test_ranks_that_have_less_to_do_make_passes_of_nothing():
    model, asked = ByColour(), []
    predict(model, picture(32, 75), View(crop=(32, 32)), CPU, lambda passes: asked.append(passes) or 4)
    assert asked == [1] and len(model.shown) == 4 and model.shown[1:] == [(1, 32, 32, 3)] * 3


def test_the_loss_is_the_mean_over_all_pixels():
    logits = torch.randn(2, 3, 4, 4)
    labels = torch.randint(-1, 3, (2, 8, 8))
    resized = F.interpolate(logits, size=(8, 8), mode="bilinear")
    each = F.cross_entropy(resized, labels, ignore_index=-1, reduction="none")
    torch.testing.assert_close(pixel_cross_entropy(logits, labels), each.mean())
    assert (labels == -1).any() and pixel_cross_entropy(logits, torch.full_like(labels, -1)) == 0


def test_overlays_have_the_colour_of_their_class():
    colours = palette(30)
    assert len({tuple(colour) for colour in colours.tolist()}) == 30
    image, classes = np.full((2, 2, 1), 100, np.uint8), np.array([[0, 1], [-1, 0]])
    found = overlay(image, classes, colours)
    assert found.shape == (2, 2, 3) and (found[0, 0] == found[1, 1]).all() and (found[1, 0] == 40).all()
    assert (found[0, 0] == np.rint(0.4 * 100 + 0.6 * colours[0])).all()
    assert View(crop=(512, 512)).strides == (341, 341)
