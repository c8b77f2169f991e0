"""Composites: what their annotations say is what was pasted, to the pixel; train and val share nothing."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from mirl.dataloaders.tools.composite_sets import (
    CATEGORY_IDS,
    compress,
    encode,
    outlines,
    run_lengths,
    write_coco,
    write_labels,
)
from mirl.dataloaders.tools.composites import CASES, GLYPHS, STUFF, Composer
from mirl.errors import UserError


@pytest.fixture(scope="module")
def composer() -> Composer:
    return Composer(size=(64, 80), seed=3, fashion=None)


def decoded(segmentation, height: int, width: int) -> np.ndarray:
    if isinstance(segmentation, list):
        parts = coco_mask.frPyObjects(segmentation, height, width)
        return coco_mask.decode(coco_mask.merge(parts)).astype(bool)
    if isinstance(segmentation["counts"], list):
        segmentation = coco_mask.frPyObjects(segmentation, height, width)
    return coco_mask.decode(segmentation).astype(bool)


def test_the_same_number_gives_the_same_picture_and_another_one_does_not(composer):
    again = Composer(size=(64, 80), seed=3, fashion=None)
    for split in ("train", "val"):
        assert np.array_equal(composer.make(split, 5).image, again.make(split, 5).image)
    assert not np.array_equal(composer.make("train", 5).image, composer.make("val", 5).image)
    assert not np.array_equal(composer.make("train", 5).image, composer.make("train", 6).image)


def test_every_edge_case_is_what_it_is_called(composer):
    made = {case: composer.make("train", 2, case) for case in CASES}
    assert not made["empty"].instances and (made["empty"].labels > 0).all()
    assert made["crowd"].instances[0].crowd and not any(item.crowd for item in made["crowd"].instances[1:])
    assert made["grey"].image.ndim == 2 and made["plain"].image.shape == (64, 80, 3)
    assert made["one_pixel"].instances[-1].mask.sum() == 1 and made["one_pixel"].instances[-1].box[2:] == (1, 1)
    cut = made["cut"].instances[0].mask
    assert cut[0].any() or cut[:, -1].any()
    assert (made["wide"].labels.shape, made["tall"].labels.shape) == ((64, 160), (128, 80))
    assert made["tiny"].labels.shape == (24, 24)
    assert (made["band"].labels[:8] == 0).all() and (made["band"].labels[8:] > 0).all()


def test_labels_and_masks_say_the_same(composer):
    for number in range(6):
        made = composer.make("train", number)
        pasted = np.zeros(made.labels.shape, int)
        for instance in made.instances:
            pasted += instance.mask
            assert (made.labels[instance.mask] == 1 + len(STUFF) + instance.category).all()
        assert pasted.max() <= 1, "a visible pixel belongs to one object"
        assert ((made.labels > len(STUFF)) == (pasted > 0)).all()


def test_all_glyphs_differ_in_shape():
    composer = Composer(size=(64, 64), fashion=None)
    shapes = [composer._object(n, "train", 40, np.random.default_rng(0))[1] for n in range(len(GLYPHS))]
    areas = {(shape.shape, int(shape.sum())) for shape in shapes}
    assert len(areas) == len(GLYPHS)


@pytest.mark.parametrize("form", ["polygon", "rle", "compressed"])
def test_pycocotools_reads_every_form_as_the_exact_mask(composer, form):
    polygons = 0
    for number in range(4):
        for instance in composer.make("val", number).instances:
            segmentation = encode(instance.mask, form)
            polygons += isinstance(segmentation, list)
            assert np.array_equal(decoded(segmentation, 64, 80), instance.mask)
    assert (polygons > 3) == (form == "polygon")


def test_a_ring_has_no_outline_and_two_squares_have_two():
    ring = np.zeros((9, 9), bool)
    ring[2:7, 2:7] = True
    ring[4, 4] = False
    assert outlines(ring) is None
    squares = np.zeros((9, 9), bool)
    squares[1:3, 1:3] = squares[5:8, 4:8] = True
    assert outlines(squares) == [[1, 1, 3, 1, 3, 3, 1, 3], [4, 5, 8, 5, 8, 8, 4, 8]]
    assert run_lengths(squares)[:3] == [10, 2, 7] and isinstance(compress(run_lengths(squares)), str)


def test_the_two_folders_hold_what_was_made(composer, tmp_path):
    path = write_coco(tmp_path, "train", len(CASES), composer, cases=CASES)
    found = json.loads(path.read_text())
    assert [image["id"] for image in found["images"]] == list(range(1, 7 * len(CASES), 7))
    assert [item["id"] for item in found["categories"]] == list(CATEGORY_IDS)
    sizes = {image["id"]: (image["height"], image["width"]) for image in found["images"]}
    kinds = set()
    for item in found["annotations"]:
        mask = decoded(item["segmentation"], *sizes[item["image_id"]])
        kinds.add(type(item["segmentation"]).__name__)
        rows, columns = np.nonzero(mask)
        assert item["area"] == mask.sum()
        assert item["bbox"] == [
            columns.min(),
            rows.min(),
            columns.max() - columns.min() + 1,
            rows.max() - rows.min() + 1,
        ]
    assert kinds == {"list", "dict"}
    images, labels = write_labels(tmp_path / "ade", "val", 3, composer, cases=("band",), unlabelled=255)
    assert sorted(item.name for item in images.iterdir()) == sorted(item.name for item in labels.iterdir())
    band = np.asarray(Image.open(labels / "00000.png"))
    assert (band[:8] == 255).all() and set(np.unique(band[8:])) <= set(range(1, 18))


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="at least 24 pixels"):
        Composer(size=(16, 64))


def test_items_of_fashion_mnist_are_pasted_filled_where_they_are_installed(tmp_path):
    def write(name: str, values: np.ndarray) -> None:
        head = (0x800 + values.ndim).to_bytes(4, "big") + np.array(values.shape, ">i4").tobytes()
        (tmp_path / name).write_bytes(gzip.compress(head + values.astype(np.uint8).tobytes()))

    items = np.zeros((10, 28, 28), np.uint8)
    items[:, 4:24, 4:24] = 200
    items[:, 10:18, 10:18] = 0  # a dark middle is part of the item
    for prefix in ("train", "t10k"):
        write(f"{prefix}-images-idx3-ubyte.gz", items)
        write(f"{prefix}-labels-idx1-ubyte.gz", np.arange(10))
    composer = Composer(size=(96, 96), objects=(1, 1), fashion=tmp_path)
    assert composer.names[0] == "t-shirt"
    for split in ("train", "val"):
        (instance,) = composer.make(split, 0).instances
        _, _, width, height = instance.box
        assert instance.mask.sum() == width * height, "the middle is a hole"


def test_a_composer_of_some_classes_knows_no_others():
    composer = Composer(size=(64, 64), fashion=None, classes=("sun", "star"))
    assert composer.names == ("sun", "star") and composer.label_names[-2:] == ("sun", "star")
    seen = {item.category for number in range(8) for item in composer.make("train", number).instances}
    assert seen == {0, 1}
    with pytest.raises(UserError, match="classes has 'moon'"):
        Composer(fashion=None, classes=("moon",))
