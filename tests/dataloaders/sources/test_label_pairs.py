"""Which image belongs to which label image, what the numbers mean, and what is refused before training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mirl.dataloaders.label_scan import scan_labels
from mirl.dataloaders.sources.label_map import (
    IGNORED,
    UNKNOWN,
    LabelMap,
    map_of_values,
    named_map,
    read_label_map,
    require_same_names,
)
from mirl.dataloaders.sources.label_pairs import has_split, open_pairs
from mirl.errors import UserError
from tests.support.shapes import write_shapes


def write(path: Path, mode: str = "RGB", size: tuple[int, int] = (6, 4), value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode in ("L", "P", "I;16") else (value,) * 3).save(path)
    return path


def names(source, root: Path) -> list[tuple[str, str]]:
    return [
        (str(Path(source.path(index)).relative_to(root)), str(Path(source.label_path(index)).relative_to(root)))
        for index in range(source.num_images)
    ]


def test_two_folders_and_a_list(tmp_path):
    for name in ("a/1", "a/2", "b/1"):
        write(tmp_path / "x" / f"{name}.jpg")
    write(tmp_path / "y" / "a" / "1.png", "L")
    write(tmp_path / "y" / "b" / "1.png", "L")
    source = open_pairs([tmp_path / "x"], [tmp_path / "y"])
    assert names(source, tmp_path) == [("x/a/1.jpg", "y/a/1.png"), ("x/b/1.jpg", "y/b/1.png")]
    assert "1 without a label image" in str(source.ledger)
    (tmp_path / "pairs.txt").write_text("# two\nx/a/2.jpg\ty/b/1.png\n\nx/a/1.jpg\ty/a/1.png\n")
    listed = open_pairs([tmp_path / "pairs.txt"], [])
    assert names(listed, tmp_path) == [("x/a/2.jpg", "y/b/1.png"), ("x/a/1.jpg", "y/a/1.png")]
    assert listed.fingerprint() != source.fingerprint()
    both = open_pairs([tmp_path / "x" / "a", tmp_path / "x" / "b"], [tmp_path / "y" / "a", tmp_path / "y" / "b"])
    assert names(both, tmp_path) == names(source, tmp_path)
    (tmp_path / "moved").mkdir()
    for folder in ("x", "y"):
        (tmp_path / folder).rename(tmp_path / "moved" / folder)
    assert open_pairs([tmp_path / "moved" / "x"], [tmp_path / "moved" / "y"]).fingerprint() == source.fingerprint()


def test_ade20k(tmp_path):
    for split, name in (("training", "t"), ("validation", "v")):
        write(tmp_path / "images" / split / f"{name}.jpg")
        write(tmp_path / "annotations" / split / f"{name}.png", "L", value=3)
    lines = ["Idx\tRatio\tTrain\tVal\tStuff\tName", "1\t0.1\t2\t3\t1\twall", "3\t0.1\t2\t3\t1\tsky, heaven"]
    (tmp_path / "objectInfo150.txt").write_text("\n".join(lines))
    train, val = open_pairs([tmp_path], []), open_pairs([tmp_path], [], split="val")
    assert names(train, tmp_path) == [("images/training/t.jpg", "annotations/training/t.png")]
    assert names(val, tmp_path) == [("images/validation/v.jpg", "annotations/validation/v.png")]
    assert has_split(tmp_path, "val") and train.named_map == "ade20k"
    known = named_map("ade20k", tmp_path)
    assert known.table()[:4].tolist() == [IGNORED, 0, 1, 2] and known.names[:3] == ("wall", "2", "sky")
    assert len(known.names) == 150 and known.table()[151] == UNKNOWN


@pytest.mark.parametrize(("ready", "named"), [(False, "cityscapes"), (True, "cityscapes_train_ids")])
def test_cityscapes(tmp_path, ready, named):
    for split in ("train", "val"):
        write(tmp_path / "leftImg8bit" / split / "ulm" / "ulm_0_leftImg8bit.png")
        for kind in ("labelIds", "instanceIds", *(["labelTrainIds"] if ready else [])):
            write(tmp_path / "gtFine" / split / "ulm" / f"ulm_0_gtFine_{kind}.png", "L")
        write(tmp_path / "gtFine" / split / "ulm" / "ulm_0_gtFine_color.png")
    source = open_pairs([tmp_path], [], split="val")
    kind = "labelTrainIds" if ready else "labelIds"
    assert names(source, tmp_path) == [
        ("leftImg8bit/val/ulm/ulm_0_leftImg8bit.png", f"gtFine/val/ulm/ulm_0_gtFine_{kind}.png")
    ]
    assert source.named_map == named
    table = named_map(named).table()
    road, bicycle = (0, 18) if ready else (7, 33)
    assert (table[road], table[bicycle], table[255]) == (0, 18, IGNORED)
    assert ready or (table[0], table[29]) == (IGNORED, IGNORED)


def test_voc_reads_indices_of_a_palette(tmp_path):
    for name in ("1", "2", "3"):
        write(tmp_path / "JPEGImages" / f"{name}.jpg")
    for name in ("1", "2"):
        label = Image.new("P", (6, 4), 15)
        label.putpalette([value % 256 for value in range(7, 7 + 768)])
        label.putpixel((0, 0), 255)
        (tmp_path / "SegmentationClass").mkdir(exist_ok=True)
        label.save(tmp_path / "SegmentationClass" / f"{name}.png")
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("1\n")
    (lists / "val.txt").write_text("2\n")
    train, val = open_pairs([tmp_path], []), open_pairs([tmp_path], [], split="val")
    assert [Path(source.path(0)).stem for source in (train, val)] == ["1", "2"]
    assert train.num_images == val.num_images == 1
    counts = scan_labels(train, named_map(train.named_map), threads=1)
    assert counts[15] == 23 and counts[255] == 1 and counts.sum() == 24
    assert named_map("voc").names[15] == "person"


def test_a_map_is_text_or_json(tmp_path):
    (tmp_path / "m.txt").write_text("# value name\n0 ignore\n7\troad\n11 traffic light\n8 road\n")
    found = read_label_map(str(tmp_path / "m.txt"))
    assert found.names == ("road", "traffic light")
    assert [found.table()[value] for value in (0, 7, 8, 11, 1)] == [IGNORED, 0, 0, 1, UNKNOWN]
    (tmp_path / "m.json").write_text('{"0": null, "7": "road", "11": "traffic light", "8": "road"}')
    assert read_label_map(str(tmp_path / "m.json")) == found
    assert LabelMap.from_dict({"values": [0], "classes": [-1], "names": []}).table()[0] == IGNORED
    assert found.with_ignored([7, 8]).names == ("traffic light",)
    assert map_of_values([255, 4, 0], [255]).table()[[0, 4, 255]].tolist() == [0, 1, IGNORED]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("x road", r"line 1 has the value 'x'"),
        ("1 road\n2", "line 2 has no name"),
        ("1 road\n1 wall", "line 2 has the value 1 a second time"),
        ("1 road\n2 ignore", "names 1 classes"),
        ("70000 road", "value '70000'"),
        ("[1]", "is not one object of names"),
        ('{"1": "road",', "is not JSON"),
    ],
)
def test_a_map_that_cannot_be_is_refused(tmp_path, text, message):
    (tmp_path / "m.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        read_label_map(str(tmp_path / "m.txt"))


def test_maps_that_differ_are_told_apart():
    ours = LabelMap.of({0: "sky", 1: "road", 9: None})
    require_same_names(ours, LabelMap.of({0: "sky", 1: "road", 9: None}), train="data", val="val")
    with pytest.raises(UserError, match="value 1 is 'road' in data and 'tree' in val"):
        require_same_names(ours, LabelMap.of({0: "sky", 1: "tree"}), train="data", val="val")
    with pytest.raises(UserError, match="val has tree, which data lacks"):
        require_same_names(ours, LabelMap.of({0: "sky", 1: "road", 2: "tree"}), train="data", val="val")


@pytest.fixture
def shapes(tmp_path) -> Path:
    return write_shapes(tmp_path / "shapes", 3)


def test_the_scan_counts_every_pixel_on_any_number_of_ranks(shapes):
    source = open_pairs([shapes], [])
    known = read_label_map(str(source.map_file))
    one = scan_labels(source, known, threads=2)
    assert one.sum() == 3 * 48 * 64 and one[255] == 3 * 2 * 64 and np.flatnonzero(one).tolist() == [0, 1, 2, 255]
    parts = [scan_labels(source, None, threads=1, rank=rank, world_size=2) for rank in range(2)]
    assert np.array_equal(one, sum(parts))


def change(shapes: Path, kind: str) -> None:
    label = shapes / "labels" / "01.png"
    pixels = np.array(Image.open(label))
    if kind == "value":
        pixels[5, 6:9] = 77
        Image.fromarray(pixels).save(label)
    elif kind == "size":
        Image.fromarray(pixels[:-1]).save(label)
    elif kind == "colour":
        Image.fromarray(pixels).convert("RGB").save(label)
    elif kind == "cut":
        label.write_bytes(label.read_bytes()[:60])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("value", r"labels/01\.png has value 77 in 3 pixels, .*--label-map, or give --ignore 77"),
        ("size", r"labels/01\.png is 47x64 and its image .*images/01\.png is 48x64"),
        ("colour", r"labels/01\.png cannot be used: it has 3 numbers a pixel \(RGB\)"),
        ("cut", r"labels/01\.png cannot be used"),
    ],
)
def test_the_scan_names_the_file_and_what_is_wrong(shapes, kind, message):
    change(shapes, kind)
    source = open_pairs([shapes], [])
    with pytest.raises(UserError, match=message):
        scan_labels(source, read_label_map(str(source.map_file)), threads=2)


def test_what_is_no_set_of_pairs_is_refused(tmp_path, shapes):
    def refused(message, data, labels=(), split="train"):
        with pytest.raises(UserError, match=message):
            open_pairs([tmp_path / name for name in data], [tmp_path / name for name in labels], split=split)

    (tmp_path / "instances.json").write_text('{"images": [], "annotations": [], "categories": []}')
    refused("is a JSON file, as COCO's annotations are, which are for detection", ["instances.json"])
    refused("does not exist", ["nowhere"])
    (tmp_path / "empty.txt").write_text("\n")
    refused("is empty: give lines image<TAB>label image", ["empty.txt"])
    (tmp_path / "bad.txt").write_text("shapes/images/00.png\n")
    refused("line 1 is not image<TAB>label image", ["bad.txt"])
    (tmp_path / "gone.txt").write_text("shapes/images/00.png\tshapes/labels/99.png\n")
    refused(r"line 1 names .*99\.png, which is not there", ["gone.txt"])
    refused("give --labels FOLDER", ["shapes/images"])
    refused("labels has 2 folders and data has 1", ["shapes"], ["shapes", "shapes"])
    (shapes / "images" / "02.png").unlink()
    refused(r"1 of 3 label images .* have no image .*02\.png", ["shapes"])
    (tmp_path / "none").mkdir()
    refused("holds no images", ["none"], ["shapes/labels"])
    write(tmp_path / "other" / "z.png")
    refused("have no image in", ["other"], ["shapes/labels"])
    with pytest.raises(UserError, match="data is not given"):
        open_pairs([], [])
