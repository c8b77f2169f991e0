"""validate_data, prepare_data, bench_loader, prepare_demo: what the commands of the same names do."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from mirl.dataloaders import build_train_loader, open_source, prepare_demo
from mirl.dataloaders.sources.manifest import ManifestRow, read_manifest, write_manifest
from mirl.dataloaders.sources.tar_index import make_index
from mirl.dataloaders.tools.bench import bench_loader, format_row
from mirl.dataloaders.tools.prepare import prepare_data
from mirl.dataloaders.tools.validate import validate_data
from tests.dataloaders.test_faults import FAULTS, break_file

SIZE = (32, 32)


# --- validate


def test_validation_finds_what_is_broken_and_training_leaves_it_out(jpeg_folder):
    folder = jpeg_folder(24)
    for number, fault in enumerate(("cut", "empty", "html", "noise")):
        break_file(folder / f"{number:03d}.jpg", fault)
    calls = []
    report = validate_data(folder, workers=2, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(i, 24) for i in range(1, 25)]
    assert report.num_images == 24 and report.formats["JPEG"] == 20
    assert [row.path for row in report.bad] == ["000.jpg", "001.jpg", "002.jpg", "003.jpg"]
    for row, fault in zip(report.bad, ("cut", "empty", "html", "noise"), strict=True):
        import re

        assert re.search(FAULTS[fault][1], row.reason)
    assert "4 broken" in str(report) and "002.jpg: not an image: an HTML" in str(report)
    _, rows = read_manifest(report.manifest)
    good = rows[10]
    assert (good.path, good.height, good.width, good.format) == ("010.jpg", 96, 128, "JPEG")
    assert good.bytes == os.path.getsize(folder / "010.jpg")
    # The folder, and the manifest itself, stand for the good images.
    for data in (folder, report.manifest):
        with build_train_loader(data, image_size=SIZE, micro_batch=20, threads=1, bad_image_limit=0) as loader:
            assert loader.num_images == 20
            loader.next_micro_batch()
    # Validated again after a repair, the image is back.
    (folder / "001.jpg").write_bytes((folder / "010.jpg").read_bytes())
    assert len(validate_data(folder, progress=False).bad) == 3
    assert open_source(folder).num_images == 21


def test_validation_of_shards(jpeg_folder, tmp_path):
    folder = jpeg_folder(12)
    prepare_data(folder, tmp_path / "tars", shard_size=5, progress=False)
    assert validate_data(tmp_path / "tars", progress=False).num_images == 12
    with open(tmp_path / "tars/shard-000001.tar", "r+b") as file:
        file.seek(600)
        file.write(bytes(3000))
    report = validate_data(tmp_path / "tars", progress=False)
    assert [row.path.split("::")[0] for row in report.bad] == ["shard-000001.tar"]
    assert open_source(tmp_path / "tars").num_images == 11


def test_classes_keep_their_numbers_when_one_is_all_broken(jpeg_folder):
    root = jpeg_folder(3, name="set/b").parent
    jpeg_folder(1, name="set/a")
    (root / "a/000.jpg").write_bytes(b"")
    validate_data(root, progress=False)
    source = open_source(root, labels=True)
    assert source.classes == ["a", "b"] and [source.label(i) for i in range(3)] == [1, 1, 1]


def test_a_set_of_nothing_but_broken_images_is_refused(jpeg_folder):
    folder = jpeg_folder(2)
    for path in folder.iterdir():
        path.write_bytes(b"<html>")
    validate_data(folder, progress=False)
    with pytest.raises(ValueError, match="all images of .* are broken by mirl-manifest.tsv"):
        open_source(folder)


def test_a_manifest_needs_a_place(jpeg_folder, tmp_path):
    listing = tmp_path / "list.txt"
    listing.write_text(f"{jpeg_folder(3)}/001.jpg\n")
    with pytest.raises(ValueError, match="say where the manifest goes"):
        validate_data(listing)
    with pytest.raises(ValueError, match="cannot be written to .*nowhere"):
        validate_data(listing, manifest=tmp_path / "nowhere/m.tsv")
    report = validate_data(listing, manifest=tmp_path / "m.tsv", progress=False)
    assert open_source(report.manifest).path(0) == str(tmp_path / "photos/001.jpg")


def test_manifest_keeps_odd_names_and_refuses_damage(tmp_path):
    rows = [ManifestRow(name, 1, 2, 3, "JPEG", "why\tnot") for name in ("a\tb", "c\\td", "e\nf", "g\\", "ü", "\udce9")]
    path = tmp_path / "m.tsv"
    write_manifest(path, "/some\troot", rows)
    assert read_manifest(path) == ("/some\troot", rows)
    path.write_text(path.read_text(errors="surrogateescape").replace("\t1\t2", "\tx\t2"), errors="surrogateescape")
    with pytest.raises(ValueError, match="line 3 is damaged; write it again with: mirl validate-data"):
        read_manifest(path)


# --- prepare


def test_preparing_shrinks_turns_upright_and_copies_what_is_small(jpeg_folder, tmp_path, photo, encoded):
    folder = jpeg_folder(4, name="src/a", width=300, height=200)
    (folder / "rotated.jpg").write_bytes(encoded(photo(9, 300, 200), orientation=6))
    (folder / "small.jpg").write_bytes(encoded(photo(9, 60, 50)))
    (folder / "grey.png").write_bytes(encoded(photo(9, 300, 400).convert("L"), "PNG"))
    (folder / "grey.jpg").write_bytes(encoded(photo(8, 300, 400)))
    (folder / "bad.jpg").write_bytes(encoded(photo(9))[:700])
    report = prepare_data(folder.parent, tmp_path / "dst", short_side=100, train_size=64, progress=False)
    assert (report.written, report.kept, len(report.broken)) == (8, 0, 1)
    assert report.broken[0][0].endswith("bad.jpg")
    sizes = {path.name: Image.open(path).size for path in (tmp_path / "dst/a").iterdir()}
    assert sizes == {
        **{f"00{i}.jpg": (150, 100) for i in range(4)},
        "rotated.jpg": (100, 150),
        "small.jpg": (60, 50),
        "grey.jpg": (100, 133),
        "grey.png.jpg": (100, 133),
    }
    for path in (tmp_path / "dst/a").iterdir():
        with Image.open(path) as image:
            assert image.mode == "RGB" and image.getexif().get(0x0112, 1) == 1
    assert (tmp_path / "dst/a/small.jpg").read_bytes() == (folder / "small.jpg").read_bytes()
    original = Image.open(folder / "000.jpg").resize((150, 100), Image.Resampling.BICUBIC)
    copy = Image.open(tmp_path / "dst/a/000.jpg")
    # Levels of 255: JPEG at quality 90 of a picture with full contrast.
    assert np.abs(np.asarray(original).astype(int) - np.asarray(copy)).mean() < 6


def test_the_report_tells_how_many_more_crops_are_enlarged(jpeg_folder, tmp_path):
    report = prepare_data(
        jpeg_folder(4, width=300, height=300), tmp_path / "dst", short_side=100, train_size=100, progress=False
    )
    # Square pictures: a crop of area share s has s * side^2 pixels, s is at least 0.2 and at most 1. Of a 300 px
    # picture all have more than 100^2 (0.2 * 300^2 = 18,000); of a 100 px picture only the rare whole one does not.
    assert report.enlarged_before == 0 and report.enlarged_after > 0.9
    assert "random crops with fewer pixels than 100 x 100: 0%" in str(report)


@pytest.mark.parametrize("shard_size", [None, 4])
def test_preparing_goes_on_where_it_was_killed(jpeg_folder, tmp_path, shard_size):
    folder = jpeg_folder(12, width=300, height=200)
    code = (
        "import sys, os\n"
        "from mirl.dataloaders.tools.prepare import prepare_data\n"
        "stop = int(sys.argv[4])\n"
        "prepare_data(sys.argv[1], sys.argv[2], short_side=64, workers=1, shard_size=eval(sys.argv[3]),\n"
        "             progress=lambda done, total: os._exit(9) if done == stop else None)\n"
    )
    arguments = [str(folder), str(tmp_path / "dst"), str(shard_size), "2"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], timeout=120, capture_output=True, text=True)
    assert done.returncode == 9, done.stderr
    report = prepare_data(folder, tmp_path / "dst", short_side=64, shard_size=shard_size, progress=False)
    assert report.kept >= 2 and report.kept + report.written == 12
    shards = sorted(path.with_suffix("") for path in (tmp_path / "dst").rglob("*.tar"))
    assert sorted(path.with_suffix("") for path in (tmp_path / "dst").rglob("*.idx")) == shards
    assert bool(shards) == bool(shard_size)
    prepare_data(folder, tmp_path / "again", short_side=64, shard_size=shard_size, progress=False)
    ours, theirs = (open_source(tmp_path / name) for name in ("dst", "again"))
    assert ours.num_images == theirs.num_images == 12
    assert all(ours.read(i) == theirs.read(i) for i in range(12))


def test_shards_carry_the_classes(jpeg_folder, tmp_path):
    root = jpeg_folder(3, name="set/b").parent
    jpeg_folder(4, name="set/a")
    prepare_data(root, tmp_path / "dst", short_side=64, shard_size=3, progress=False)
    assert len(list((tmp_path / "dst").glob("*.tar"))) == 3
    source = open_source(tmp_path / "dst", labels=True)
    assert [source.label(i) for i in range(7)] == [0, 0, 0, 0, 1, 1, 1]
    make_index(tmp_path / "dst", progress=False)
    image = Image.open(io.BytesIO(source.read(0)))
    assert min(image.size) == 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"short_side": 32}, "was begun with short_side 64 .now 32.; go on with that, or choose an empty folder"),
        ({"dst": "photos/in"}, "is inside src"),
        ({"dst": "other"}, "is not empty and was not made by prepare-data"),
        ({"quality": 0}, "quality 0 within 1..100"),
    ],
)
def test_preparing_refuses_what_would_mix_or_destroy(jpeg_folder, tmp_path, change, message):
    folder = jpeg_folder(3)
    prepare_data(folder, tmp_path / "dst", short_side=64, progress=False)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/mine.txt").write_text("keep")
    settings = {"dst": "dst", "short_side": 64} | change
    with pytest.raises(ValueError, match=message):
        prepare_data(folder, tmp_path / settings.pop("dst"), progress=False, **settings)
    assert (tmp_path / "other/mine.txt").read_text() == "keep"


# --- bench and demo


def test_bench_measures_every_combination(jpeg_folder):
    rows = []
    folder = jpeg_folder(24)
    (folder / "000.jpg").write_bytes(b"")
    returned = bench_loader(
        folder, image_sizes=[(32, 32), (48, 64)], threads=[1, 2], micro_batch=8, seconds=0.3, progress=rows.append
    )
    assert returned == rows and [(r.image_size, r.threads) for r in rows] == [
        ((32, 32), 1), ((32, 32), 2), ((48, 64), 1), ((48, 64), 2),
    ]  # fmt: skip
    for row in rows:
        assert row.images_per_s > 0 and row.read_images_per_s > row.images_per_s and row.bad_images == 1
    assert "32x32 px, 1 threads, batch 8" in format_row(rows[0])
    with pytest.raises(ValueError, match="seconds is 0"):
        bench_loader(folder, seconds=0)


def test_demo_photographs_are_made_once_by_any_number_of_processes(tmp_path):
    code = "import sys; from mirl.dataloaders import prepare_demo; print(prepare_demo(sys.argv[1], many=True))"
    workers = [
        subprocess.Popen([sys.executable, "-c", code, tmp_path / "cache"], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    places = {worker.communicate(timeout=120)[0].strip() for worker in workers}
    assert len(places) == 1
    folder = prepare_demo(tmp_path / "cache", many=True)
    assert {str(folder)} == places
    assert os.listdir(tmp_path / "cache") == [folder.name]  # no remains of the slower process
    photographs = sorted(folder.rglob("*.jpg"))
    assert 300 <= len(photographs) <= 600
    assert all(Image.open(path).size == (256, 256) for path in photographs[::20])
    before = {path: path.stat().st_mtime_ns for path in photographs}
    prepare_demo(tmp_path / "cache", many=True)
    assert before == {path: path.stat().st_mtime_ns for path in photographs}
    assert len({path.read_bytes() for path in photographs}) == len(photographs)
    colourful = [np.asarray(Image.open(path)).astype(int) for path in photographs[::10]]
    assert np.mean([np.ptp(image.reshape(-1, 3).mean(0)) > 5 for image in colourful]) > 0.5


def test_a_cache_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="demo cache folder .* cannot be written .*; set MIRL_CACHE"):
        prepare_demo(tmp_path / "file/cache")
