"""prepare_data keeps splits and class numbers, whatever form the source has."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from mirl.dataloaders import open_source
from mirl.dataloaders.sources.class_names import CLASS_NAMES, write_class_names
from mirl.dataloaders.sources.tar_index import make_index
from mirl.dataloaders.tools.prepare import LIST_NAME, prepare_data
from mirl.engine.transfer.classification.evaluation import require_same_classes
from mirl.errors import UserError
from tests.support.tars import add_member


def labels_of(data: Path, **options) -> list[int]:
    source = open_source(data, labels=True, **options)
    return [source.label(index) for index in range(source.num_images)]


def prepare(src: Path, dst: Path, **options):
    return prepare_data(src, dst, short_side=32, workers=1, progress=False, **options)


@pytest.fixture
def labelled_list(jpeg_folder) -> Path:
    """Five images in one folder, with the labels 7 0 3 3 1."""
    folder = jpeg_folder(5, name="img")
    path = folder.parent / "list.txt"
    path.write_text("".join(f"img/{i:03d}.jpg\t{label}\n" for i, label in enumerate([7, 0, 3, 3, 1])))
    return path


@pytest.fixture
def root(jpeg_folder) -> Path:
    """train/ with the classes a b c, val/ with a and c, test/ without classes."""
    for name, count in (("train/a", 2), ("train/b", 3), ("train/c", 1), ("val/a", 1), ("val/c", 2), ("test", 2)):
        folder = jpeg_folder(count, name=f"root/{name}")
    return folder.parent


@pytest.mark.parametrize("shard_size", [None, 2])
def test_numbers_of_a_list_are_kept(labelled_list, tmp_path, shard_size):
    report = prepare(labelled_list, tmp_path / "dst", shard_size=shard_size)
    copy = tmp_path / "dst" / (LIST_NAME if shard_size is None else "")
    assert labels_of(copy) == [7, 0, 3, 3, 1] and "labels: class numbers" in str(report)
    assert not (tmp_path / "dst" / CLASS_NAMES).exists()


def test_a_list_of_the_copy_leaves_out_what_is_broken(labelled_list, tmp_path):
    (labelled_list.parent / "img/001.jpg").write_bytes(b"")
    prepare(labelled_list, tmp_path / "dst")
    assert labels_of(tmp_path / "dst" / LIST_NAME) == [7, 3, 3, 1]


@pytest.mark.parametrize("shard_size", [None, 2])
def test_every_split_is_written_at_its_level(root, tmp_path, shard_size):
    report = prepare(root, tmp_path / "dst", shard_size=shard_size)
    assert report.written == 11 and "splits: train 6 images, val 3 images, test 2 images" in str(report)
    assert "labels: 3 classes by name; test: no labels" in str(report)
    for split, count in (("train", 6), ("val", 3)):
        source = open_source(tmp_path / "dst", labels=True, split=split)
        assert source.num_images == count and f"/dst/{split}/" in source.path(0)
    assert labels_of(tmp_path / "dst", split="train") == [0, 0, 1, 1, 1, 2]
    again = prepare(root, tmp_path / "dst", shard_size=shard_size)
    assert (again.written, again.kept > 0) == (0, True)


def test_shards_of_a_root_have_one_numbering(root, tmp_path):
    prepare(root, tmp_path / "dst", shard_size=2)
    assert labels_of(tmp_path / "dst", split="val") == [0, 2, 2]  # b is missing, c keeps its number
    train, val = (open_source(tmp_path / "dst", labels=True, split=split) for split in ("train", "val"))
    assert train.classes == val.classes == ["a", "b", "c"]
    require_same_classes(train.classes, val.classes, train="train", val="val")


def test_sets_prepared_apart_are_compared_by_name(root, tmp_path):
    for split in ("train", "val"):
        prepare(root / split, tmp_path / split, shard_size=2)
    train, val = (open_source(tmp_path / split, labels=True) for split in ("train", "val"))
    assert (train.classes, val.classes) == (["a", "b", "c"], ["a", "c"])
    with pytest.raises(UserError, match="val lacks class 'b'"):
        require_same_classes(train.classes, val.classes, train="train", val="val")
    joined = open_source([tmp_path / "train", tmp_path / "val"], labels=True)  # numbered by name
    assert [joined.label(index) for index in range(joined.num_images)] == [0, 0, 1, 1, 1, 2, 0, 2, 2]


def test_numbers_and_names_of_shards_are_kept(root, tmp_path):
    prepare(root / "train", tmp_path / "shards", shard_size=2)
    prepare(tmp_path / "shards", tmp_path / "again", shard_size=4)
    assert labels_of(tmp_path / "again") == [0, 0, 1, 1, 1, 2]
    assert open_source(tmp_path / "again", labels=True).classes == ["a", "b", "c"]
    prepare(tmp_path / "shards", tmp_path / "files")
    assert labels_of(tmp_path / "files") == [0, 0, 1, 1, 1, 2]
    assert open_source(tmp_path / "files", labels=True).classes == ["a", "b", "c"]


def test_numbers_of_shards_without_names_are_kept(tmp_path, photo):
    (tmp_path / "src").mkdir()
    with tarfile.open(tmp_path / "src/x.tar", "w") as shard:
        for number, label in enumerate([5, 2, 9]):
            add_member(shard, f"{number}.png", photo(number))
            add_member(shard, f"{number}.cls", str(label).encode())
    make_index(tmp_path / "src", progress=False)
    prepare(tmp_path / "src", tmp_path / "files")
    assert labels_of(tmp_path / "files" / LIST_NAME) == [5, 2, 9]
    prepare(tmp_path / "src", tmp_path / "shards", shard_size=2)
    assert labels_of(tmp_path / "shards") == [5, 2, 9]
    write_class_names(tmp_path / "shards", ["a", "b"])
    with pytest.raises(Exception, match="its cls part is 5, but mirl-classes.txt names 2 classes"):
        open_source(tmp_path / "shards", labels=True).label(0)


@pytest.mark.parametrize("names", [None, ["a", "b", "c"]])
@pytest.mark.parametrize("shard_size", [None, 2])
def test_an_image_whose_class_cannot_be_told_is_broken_in_every_copy(names, shard_size, tmp_path, photo):
    """In a copy of loose files it stood beside the class folders, and so was a class of its own."""
    (tmp_path / "src").mkdir()
    with tarfile.open(tmp_path / "src/x.tar", "w") as shard:
        for number, label in enumerate([b"2", b"-1", b"cat", b"0"]):
            add_member(shard, f"{number}.png", photo(number))
            add_member(shard, f"{number}.cls", label)
    make_index(tmp_path / "src", progress=False)
    if names:
        write_class_names(tmp_path / "src", names)
    report = prepare(tmp_path / "src", tmp_path / "dst", shard_size=shard_size)
    assert report.written == 2 and [path[-5] for path, _ in report.broken] == ["1", "2"]
    assert all("not a class number" in reason for _, reason in report.broken)
    copy = tmp_path / "dst" / (LIST_NAME if shard_size is None and not names else "")
    assert len(labels_of(copy)) == 2
    if names:
        source = open_source(copy, labels=True)
        assert {source.classes[source.label(index)] for index in range(2)} == {"a", "c"}


def test_lost_labels_are_told(jpeg_folder, tmp_path):
    jpeg_folder(2, name="set/a")
    root = jpeg_folder(1, name="set/b").parent
    (root / "loose.jpg").write_bytes((root / "b/000.jpg").read_bytes())
    report = prepare(root, tmp_path / "dst", shard_size=2)
    assert "no labels (labels were asked for, but" in str(report) and "loose.jpg is in no class folder" in str(report)


def test_splits_with_names_and_with_numbers_are_refused(jpeg_folder, tmp_path, photo):
    root = jpeg_folder(2, name="root/train/a").parent.parent
    (root / "val").mkdir()
    with tarfile.open(root / "val/x.tar", "w") as shard:
        add_member(shard, "0.png", photo(0))
        add_member(shard, "0.cls", b"0")
    make_index(root / "val", progress=False)
    with pytest.raises(UserError, match="split train has class names and split val numbers alone"):
        prepare(root, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_a_copy_with_another_numbering_is_not_continued(root, tmp_path):
    prepare(root, tmp_path / "dst", shard_size=2)
    (root / "val/b").mkdir()
    (root / "train/b").rename(root / "train/d")
    with pytest.raises(UserError, match="was begun with labels 3 classes"):
        prepare(root, tmp_path / "dst", shard_size=2)


def test_shards_with_different_names_are_not_one_source(root, tmp_path):
    for split in ("train", "val"):
        prepare(root / split, tmp_path / f"shards/{split}-set", shard_size=2)
    with pytest.raises(UserError, match="train-set and .*val-set differ by their mirl-classes.txt: give the folders"):
        open_source(tmp_path / "shards", labels=True)
