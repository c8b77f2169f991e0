"""Parquet files as Hugging Face's datasets writes them: columns, classes, splits, order, what is left out, damage."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from mirl.dataloaders import build_train_loader, load_images, open_source
from mirl.dataloaders.errors import ImageError
from mirl.dataloaders.sources import containers
from mirl.dataloaders.sources.block_cache import BLOCKS, BlockCache
from mirl.dataloaders.tools.bench import bench_loader
from mirl.dataloaders.tools.prepare import prepare_data
from mirl.dataloaders.tools.validate import validate_data
from mirl.errors import UserError

CLASSES = ["n01 tench", "n02 ray", "n03 gull"]


def write(
    path: Path, images: list, labels: list | None = None, names: list | None = CLASSES, *, column="image", **more
):
    """A file with the columns, types and metadata that `datasets` 4 writes for Image() and ClassLabel()."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns, features = {column: pa.array(images, kind)}, {column: {"_type": "Image"}}
    if labels is not None:
        columns["label"] = pa.array(labels, pa.int64())
        if names is not None:
            features["label"] = {"names": names, "_type": "ClassLabel"}
    for name, (array, feature) in more.items():
        columns[name] = array
        features[name] = feature
    table = pa.table(columns)
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path, row_group_size=4)


@pytest.fixture
def rows(photo, encoded):
    """rows(count, first): images as `datasets` stores them, several with one name."""

    def make(count: int, first: int = 0) -> list[dict]:
        return [
            {"bytes": encoded(photo(first + n, 64, 48), quality=85), "path": f"im {n % 5}.jpg"} for n in range(count)
        ]

    return make


def test_rows_are_images_with_names_labels_and_classes(tmp_path, rows):
    images = rows(22)
    images[3] = None
    images[7] = {"bytes": None, "path": "elsewhere.jpg"}
    write(tmp_path / "data/train-00000-of-00002.parquet", images[:10], [n % 3 for n in range(10)])
    write(tmp_path / "data/train-00001-of-00002.parquet", images[10:], [n % 3 for n in range(10, 22)])
    write(tmp_path / "data/validation-00000-of-00001.parquet", rows(5, 50), [2] * 5)
    (tmp_path / "README.md").write_text("about")
    source = open_source(tmp_path, labels=True, every_name=True)
    left = [n for n in range(22) if n not in (3, 7)]
    assert source.num_images == 20 and source.classes == CLASSES
    assert [source.read(index) for index in range(20)] == [images[n]["bytes"] for n in left]
    assert [source.label(index) for index in range(20)] == [n % 3 for n in left]
    assert source.path(8) == str(tmp_path / "data/train-00001-of-00002.parquet::0/im 0.jpg")
    assert str(source.ledger) == (
        "20 images from 23 rows of 2 parquet files and files (3 left out: 2 rows without an image, 1 .md); "
        f"train of {tmp_path} is read, not validation"
    )
    assert (str(tmp_path / "data/train-00000-of-00002.parquet::7/elsewhere.jpg"), "rows without an image") in (
        source.ledger.names
    )
    other = open_source(tmp_path, labels=True, split="val")
    assert other.num_images == 5 and other.classes == CLASSES and other.read(0) == rows(5, 50)[0]["bytes"]
    # The names in order are the data set, wherever it lies.
    moved = shutil.copytree(tmp_path / "data", tmp_path / "elsewhere" / "data")
    assert open_source(moved.parent).fingerprint() == source.fingerprint()
    (moved / "train-00001-of-00002.parquet").rename(moved / "train-00003-of-00002.parquet")
    assert open_source(moved.parent).fingerprint() != source.fingerprint()


def test_one_row_reads_one_row_group_and_what_is_kept_has_a_bound(tmp_path, rows, monkeypatch):
    write(tmp_path / "a.parquet", rows(20))
    read = []
    source = open_source(tmp_path / "a.parquet")
    container = source._containers[0]
    original = container._column
    monkeypatch.setattr(container, "_column", lambda file, group: read.append(group) or original(file, group))
    source.read(9), source.read(8), source.read(0)
    assert read == [2, 0]
    source.close()
    assert not [key for key in BLOCKS._blocks if key[0] == str(tmp_path / "a.parquet")]
    cache = BlockCache(budget=10)
    for key in "abc":
        assert cache.get(key, lambda key=key: (key, 6)) == key
    assert len(cache) == 1 and cache.bytes == 6


def test_training_sees_the_same_images_on_any_number_of_ranks_and_after_a_resume(tmp_path, rows):
    write(tmp_path / "a.parquet", rows(24), [n % 3 for n in range(24)])
    settings = {"image_size": (32, 32), "seed": 3, "threads": 1, "labels": True}
    with build_train_loader(tmp_path, micro_batch=8, **settings) as loader:
        batches = [loader.next_micro_batch() for _ in range(4)]
        state = loader.state_dict()
        after = loader.next_micro_batch()
    for rank in range(2):
        with build_train_loader(tmp_path, micro_batch=4, rank=rank, world_size=2, **settings) as loader:
            mine = loader.next_micro_batch()
            own = [batches[0].positions.tolist().index(position) for position in mine.positions.tolist()]
            assert mine.images.equal(batches[0].images[own]) and mine.labels.equal(batches[0].labels[own])
            loader.load_state_dict(state)
            mine = loader.next_micro_batch()
            own = [after.positions.tolist().index(position) for position in mine.positions.tolist()]
            assert mine.images.equal(after.images[own])


def test_a_broken_row_is_found_left_out_and_replaced(tmp_path, rows, capsys):
    images = rows(12)
    images[5] = {"bytes": b"no picture", "path": "im 0.jpg"}
    write(tmp_path / "a.parquet", images, [n % 3 for n in range(12)])
    report = validate_data(tmp_path, progress=False)
    assert [(row.path, row.reason) for row in report.bad] == [
        ("a.parquet::5/im 0.jpg", "not an image of a known format")
    ]
    assert report.overviews[0].counts == {"n01 tench": 4, "n02 ray": 4, "n03 gull": 3}
    assert len(report.overviews[0].mean) == 3
    source = open_source(tmp_path, labels=True)
    assert source.num_images == 11 and source.path(5).endswith("::6/im 1.jpg") and source.label(5) == 0
    by_manifest = open_source(report.manifest, labels=True)
    assert [by_manifest.path(index) for index in range(11)] == [source.path(index) for index in range(11)]
    assert load_images([source.path(5)], image_size=(16, 16)).shape == (1, 16, 16, 3)
    with pytest.raises(UserError, match="a.parquet::77: the file has no such member; check the path"):
        load_images([tmp_path / "a.parquet::77"], image_size=(16, 16))
    bench_loader(tmp_path, image_sizes=[(16, 16)], threads=[1], micro_batch=4, seconds=0.05)
    assert "data 11 images from 13 rows of 1 parquet file and files (2 left out: 1 broken by" in capsys.readouterr().out


def test_a_copy_has_the_class_folders(tmp_path, rows):
    write(tmp_path / "in/a.parquet", rows(6), [n % 3 for n in range(6)])
    prepare_data(tmp_path / "in", tmp_path / "out", short_side=32, progress=False)
    copy = open_source(tmp_path / "out", labels=True)
    assert copy.classes == CLASSES and copy.num_images == 6
    assert (tmp_path / "out/n02 ray/a.parquet/4/im 4.jpg").is_file()


def test_columns_are_chosen_by_their_features_or_by_name(tmp_path, rows):
    images = rows(4)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    classes = ({"names": ["a", "b"], "_type": "ClassLabel"}, {"names": ["c", "d"], "_type": "ClassLabel"})
    write(
        tmp_path / "a.parquet",
        images,
        column="img",
        other=(pa.array(images[::-1], kind), {"_type": "Image"}),
        fine_label=(pa.array([0, 1, 0, 1]), classes[0]),
        coarse_label=(pa.array([1, 1, 0, -1]), classes[1]),
    )
    place = tmp_path / "a.parquet"
    with pytest.raises(UserError, match=r"has 2 columns of images \(img, other\): choose one, .*a.parquet:img$"):
        open_source(place)
    source = open_source(f"{place}:other")
    assert source.read(0) == images[3]["bytes"] and source.path(0) == f"{place}:other::0/im 3.jpg"
    assert load_images([source.path(0)], image_size=(16, 16)).shape == (1, 16, 16, 3)
    with pytest.raises(UserError, match=r"has 2 columns of labels \(fine_label, coarse_label\): choose"):
        open_source(f"{place}:img", labels=True)
    source = open_source(f"{tmp_path}:img,coarse_label", labels=True)
    assert source.classes == ["c", "d"] and [source.label(n) for n in range(3)] == [1, 1, 0]
    with pytest.raises(ImageError, match="its label is missing, not a class number"):
        source.label(3)
    with pytest.raises(UserError, match="has no column 'pixels': give one of img, other"):
        open_source(f"{place}:pixels")
    with pytest.raises(UserError, match="column 'fine_label' of .* is int64: give one of images"):
        open_source(f"{place}:fine_label")
    # Bytes alone, without metadata.
    parquet.write_table(pa.table({"jpg": [row["bytes"] for row in images], "n": [1, 2, 3, 4]}), tmp_path / "b.parquet")
    plain = open_source(tmp_path / "b.parquet")
    assert plain.read(2) == images[2]["bytes"] and plain.path(2) == f"{tmp_path}/b.parquet::2"


def test_beside_pictures_a_table_is_left_out(tmp_path, rows, jpeg_folder):
    folder = jpeg_folder(2)
    write(folder / "metadata.parquet", rows(2))
    assert str(open_source(folder).ledger) == "2 images from 3 files (1 left out: 1 .parquet)"
    with pytest.raises(UserError, match="has nothing that 'image' could choose"):
        open_source(f"{folder}:image")


def test_what_cannot_be_read_is_one_line(tmp_path, rows, monkeypatch):
    good = tmp_path / "good.parquet"
    write(good, rows(8), [0] * 8)
    cut = tmp_path / "cut" / "cut.parquet"
    cut.parent.mkdir()
    cut.write_bytes(good.read_bytes()[:-50])
    numbers = tmp_path / "numbers.parquet"
    parquet.write_table(pa.table({"n": [1, 2]}), numbers)
    text = tmp_path / "text.parquet"
    write(text, rows(1), column="image", label=(pa.array(["cat"]), {"_type": "Value"}))
    other = tmp_path / "two" / "b.parquet"
    write(other, rows(1), [0], ["x"])
    shutil.copy(good, other.with_name("a.parquet"))
    empty = tmp_path / "empty.parquet"
    write(empty, [])
    for place, labels, problem in (
        (cut.parent, False, r"parquet file .*cut.parquet cannot be read \(.*\): (check it|write it again)"),
        (numbers, False, r"has no column of images, .* it has n \(int64\)"),
        (text, True, "column 'label' of .* is string, no class numbers: write it as a ClassLabel"),
        (numbers.parent / "nothing.parquet", False, "does not exist"),
        (other.parent, True, "a.parquet and .*b.parquet name different classes: give them one by one"),
        (empty, False, r"empty.parquet has no image: give other files; 0 images from 0 rows"),
    ):
        with pytest.raises(UserError, match=problem) as error:
            open_source(place, labels=labels)
        assert "\n" not in str(error.value)
    joined = open_source([other, other.with_name("a.parquet")], labels=True)
    assert joined.classes == [*CLASSES, "x"] and joined.label(0) == 3

    # A row group that was damaged after the file was opened is broken images, as is a file that was replaced.
    source = open_source(good)
    content = bytearray(good.read_bytes())
    stat = good.stat()
    content[40:400] = bytes(360)
    good.write_bytes(content)
    with pytest.raises(ImageError, match="the file was written again after it was opened"):
        source.read(0)
    os.utime(good, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(ImageError, match="row group 0 cannot be read"):
        source.read(0)
    assert source.read(7)
    good.unlink()
    source.close()
    with pytest.raises(ImageError, match="the file no longer exists"):
        source.read(7)

    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(containers.importlib, "import_module", missing)
    with pytest.raises(
        UserError, match=r"parquet files need pyarrow \(.*\): pip install pyarrow \(in the extra parquet"
    ):
        open_source(other)
