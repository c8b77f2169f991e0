"""An image and its labels stay together through scale, crop and mirroring, and every number has one key."""

from __future__ import annotations

import numpy as np
import pytest

from mirl.dataloaders.decoding.pair_crops import PairAugmentation, distort
from mirl.dataloaders.sources.label_map import IGNORED
from mirl.keyed import keyed_uniform
from tests.support.shapes import COLOURS, shapes

SIZE = (32, 40)


def pair(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A picture without noise, whose colour says which class a pixel has, and int16 labels."""
    labels = shapes(seed, (48, 64))[1].astype(np.int16)
    labels[labels == 255] = 0
    return COLOURS[labels].astype(np.uint8), labels


@pytest.mark.parametrize("scale", [(1.0, 1.0), (0.5, 2.0)])
def test_labels_lie_where_their_colours_are(scale):
    augment = PairAugmentation(size=SIZE, scale=scale, photometric=False, mean=(0, 0, 0))
    agree = []
    for position in range(24):
        image, labels = augment(*pair(position), seed=1, epoch=0, position=position)
        assert image.shape == (*SIZE, 3) and image.dtype == np.uint8 and labels.dtype == np.int16
        assert labels.shape == SIZE
        known = labels != IGNORED
        nearest = np.abs(image[..., None, :].astype(int) - COLOURS).sum(-1).argmin(-1)
        agree.append((nearest == labels)[known].mean())
        assert (image[~known] == 0).all()
    assert min(agree) > 0.9 and np.mean(agree) > 0.97  # colours mix along edges


def test_a_crop_of_the_size_of_the_image_is_the_image():
    image, labels = pair()
    augment = PairAugmentation(size=(48, 64), scale=(1.0, 1.0), photometric=False, flip=False)
    found, kept = augment(image, labels, seed=3, epoch=1, position=2)
    assert np.array_equal(found, image) and np.array_equal(kept, labels)
    mirrored = [
        np.array_equal(
            PairAugmentation(size=(48, 64), scale=(1.0, 1.0), photometric=False)(image, labels, 3, 1, position)[1],
            labels[:, ::-1],
        )
        for position in range(40)
    ]
    assert 8 < sum(mirrored) < 32


def test_numbers_depend_on_the_key_alone():
    augment = PairAugmentation(size=SIZE)
    one, same = (augment(*pair(), seed=5, epoch=2, position=7) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))
    for key in ((6, 2, 7), (5, 3, 7), (5, 2, 8)):
        assert not np.array_equal(augment(*pair(), *key)[0], one[0])


def test_a_crop_of_one_class_is_drawn_again():
    labels = np.zeros((200, 200), np.int16)
    labels[:60, :60] = 1
    image = np.zeros((200, 200, 3), np.uint8)

    def varied(ratio: float) -> int:
        augment = PairAugmentation(size=(50, 50), scale=(4.0, 4.0), cat_max_ratio=ratio, photometric=False)
        crops = [augment(image, labels, 0, 0, position)[1] for position in range(60)]
        return sum(0 < crop.mean() < 1 for crop in crops)

    assert varied(0.75) > 2 * varied(1.0) > 0


def test_small_images_stand_beside_the_mean_colour_and_nothing():
    image, labels = pair()
    augment = PairAugmentation(size=(64, 64), scale=(0.5, 0.5), photometric=False, mean=(0.2, 0.4, 0.6))
    found, kept = augment(image, labels, 0, 0, 0)
    assert (kept[32:] == IGNORED).all() and (kept[:32, :43] != IGNORED).all() and (kept[:, 43:] == IGNORED).all()
    assert (found[40, 50] == (51, 102, 153)).all()


def test_colours_are_distorted_within_their_ranges():
    image = np.full((4, 4, 3), (120, 130, 140), np.uint8)
    changed = [distort(image, keyed_uniform(9, number, np.arange(10))) for number in range(64)]
    assert len({picture.tobytes() for picture in changed}) > 40
    assert any(np.array_equal(picture, image) for picture in changed)
    nothing = np.full(10, 0.9)
    assert np.array_equal(distort(image, nothing), image)
    brighter = nothing.copy()
    brighter[:2] = 0, 1
    assert (distort(image, brighter) == image + 32).all()
    stronger = nothing.copy()
    stronger[2:4] = 0, 1
    assert np.array_equal(distort(image, stronger), np.rint(image * 1.5).astype(np.uint8))
    grey = distort(image[..., :1], np.array([0.0, 1, 0, 1, 0, 1, 0, 1, 0, 0]))
    assert grey.shape == (4, 4, 1) and (grey == 228).all()
