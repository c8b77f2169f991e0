"""What is there is either an image of the data set or counted with its reason, for any tree, list and tar."""

from __future__ import annotations

import json
import os

import pytest

from mirl.dataloaders.few_images import load_images
from mirl.dataloaders.sources.listing import find_files
from mirl.dataloaders.sources.manifest import ManifestRow, write_manifest
from mirl.dataloaders.sources.opening import open_source
from mirl.dataloaders.sources.paths import shown
from mirl.dataloaders.sources.tar_index import make_index
from mirl.dataloaders.tools.validate import validate_data
from mirl.errors import UserError
from tests.dataloaders.sources.generated import FLAVOURS, HEIC, STEMS, Tree, make_shard, make_tree, picture

SEEDS = range(12)


def names(source):
    return [source.path(index) for index in range(source.num_images)]


@pytest.mark.parametrize("seed", SEEDS)
def test_every_entry_of_a_tree_is_used_or_counted(tmp_path, seed):
    tree = make_tree(tmp_path / "root", tmp_path / "outside", seed)
    found = find_files(tree.root, every_name=True)
    assert found.images == tree.images and not found.shards
    assert found.ledger.left_out == tree.left_out == len(found.ledger.names)
    source = open_source(tree.root)
    assert [source.read(i)[:2] in (b"\xff\xd8", b"\x89P") for i in range(source.num_images)] == [True] * len(
        tree.images
    )
    assert str(source.ledger).startswith(f"{len(tree.images)} images from {len(tree.images) + tree.left_out} files")


@pytest.mark.parametrize("seed", SEEDS)
def test_names_survive_a_list_and_a_manifest(tmp_path, seed):
    tree = make_tree(tmp_path / "root", tmp_path / "outside", seed)
    expected = [os.path.join(tree.root, name) for name in tree.images]
    manifest = tmp_path / "m.tsv"
    write_manifest(manifest, os.fspath(tree.root), [ManifestRow(name, 1, 4, 4, "JPEG", "") for name in tree.images])
    assert names(open_source(manifest)) == expected
    on_one_line = [name for name in tree.images if "\n" not in name]  # a list has no way to write the others
    (tree.root / "list.txt").write_bytes(b"".join(os.fsencode(name) + b"\n" for name in on_one_line))
    assert names(open_source(tree.root / "list.txt")) == [os.path.join(tree.root, name) for name in on_one_line]
    for path in expected:
        assert shown(path).isprintable() and json.loads(json.dumps(path)) == path


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("seed", SEEDS)
def test_every_member_of_a_tar_is_used_or_counted(tmp_path, flavour, seed):
    shard = make_shard(tmp_path / "x.tar", flavour, seed)
    make_index(tmp_path, progress=False)
    source = open_source(tmp_path, every_name=True)
    assert {path.partition("::")[2]: source.read(i) for i, path in enumerate(names(source))} == shard.images
    assert source.num_images == len(shard.images)
    assert source.ledger.total == shard.members and len(source.ledger.names) == source.ledger.left_out
    source.close()


@pytest.mark.parametrize("flavour", ["gnu", "pax"])
def test_names_longer_than_a_header_has_room_for(tmp_path, flavour):
    stems = tuple(f"{stem} " * 9 for stem in STEMS)
    shard = make_shard(tmp_path / "x.tar", "gnu" if flavour == "gnu" else "pax", 5, stems)
    make_index(tmp_path, progress=False)
    source = open_source(tmp_path)
    assert {path.partition("::")[2]: source.read(i) for i, path in enumerate(names(source))} == shard.images
    source.close()


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_manifest_of_shards_is_a_data_set_and_leaves_broken_members_out(tmp_path, flavour):
    shard = make_shard(tmp_path / "x.tar", flavour, 3)
    make_index(tmp_path, progress=False)
    report = validate_data(tmp_path, manifest=tmp_path / "m.tsv", progress=False)
    # The generated arrays and pictures with a number behind them decode; names that claim .npy hold pictures too.
    good = {name for name in shard.images if f"x.tar::{name}" not in {row.path for row in report.bad}}
    assert good and len(report.left_out) == shard.members - len(shard.images)
    source = open_source(tmp_path / "m.tsv")
    assert {path.partition("::")[2] for path in names(source)} == good
    broken = names(source)[0].partition("::")[2]
    rows = [ManifestRow(f"x.tar::{name}", 1, 4, 4, "", "cut" if name == broken else "") for name in shard.images]
    write_manifest(tmp_path / "mirl-manifest.tsv", os.fspath(tmp_path), rows)
    left = open_source(tmp_path)
    assert {path.partition("::")[2] for path in names(left)} == set(shard.images) - {broken}
    assert left.ledger.reasons["broken by the manifest"] == 1


def test_shards_behind_links_are_found_as_loose_files_are(tmp_path):
    for folder in ("data", "disk2"):
        (tmp_path / folder).mkdir()
        make_shard(tmp_path / folder / f"{folder}.TAR", "pax", 1)
    (tmp_path / "data/more").symlink_to(tmp_path / "disk2")
    (tmp_path / "data/named.tar").mkdir()
    (tmp_path / "disk2/back").symlink_to(tmp_path / "data")
    assert len(make_index(tmp_path / "data", progress=False)) == 2
    source = open_source(tmp_path / "data")
    one = open_source(tmp_path / "disk2/disk2.TAR")
    assert source.num_images == 2 * one.num_images
    assert source.ledger.reasons["links to a folder above them"] == 1


def test_a_tar_without_a_suffix_and_formats_that_nothing_here_decodes(tmp_path):
    shard = make_shard(tmp_path / "no suffix", "gnu", 2)
    make_index(tmp_path, progress=False)
    assert open_source(tmp_path).num_images == len(shard.images)
    tree = Tree(tmp_path / "phone")
    tree.root.mkdir()
    for name, data in (
        ("a.HEIC", HEIC),
        ("b.jxl", b"\xff\x0a" + bytes(20)),
        ("c", picture()),
        ("d.zip", b"PK\x03\x04"),
        ("e", b""),
    ):
        (tree.root / name).write_bytes(data)
    text = str(open_source(tree.root).ledger)
    assert text.startswith("1 image from 5 files (4 left out: ")
    for reason in ("1 HEIC (convert to JPEG or PNG)", "1 JPEG XL (convert", "1 archives (unpack them)", "1 empty"):
        assert reason in text


def test_an_avif_is_an_image_whatever_it_is_called(tmp_path):
    from PIL import features

    if not features.check("avif"):
        pytest.skip("this build of Pillow has no AVIF")
    names_of = ["a.avif", "b.AVIF", "c.jpg", "d", "e.avif?width=1200", "f.avif.1"]
    for name in names_of:
        (tmp_path / name).write_bytes(picture("AVIF"))
    report = validate_data(tmp_path, progress=False)
    assert (report.num_images, report.formats, report.bad) == (len(names_of), {"AVIF": len(names_of)}, [])


def test_what_lies_beside_a_split_is_named(tmp_path):
    for folder in ("train", "val", "extra"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.jpg").write_bytes(picture())
    assert f"train/ of {tmp_path} is read, not extra, val" in str(open_source(tmp_path).ledger)


def test_validation_writes_down_each_file_that_is_left_out(tmp_path):
    tree = make_tree(tmp_path / "root", tmp_path / "outside", 4)
    report = validate_data(tree.root, progress=False)
    expected = {os.path.relpath(path, tree.root) for path, _ in find_files(tree.root, every_name=True).ledger.names}
    written = {row.path for row in report.left_out}
    assert written | {"mirl-manifest.tsv"} == expected and len(written) == tree.left_out
    assert f"({tree.left_out} left out: " in str(report)
    assert open_source(tree.root).num_images == len(tree.images) - len(report.bad)


def test_single_images_are_read_by_the_names_that_a_source_gives(tmp_path):
    shard = make_shard(tmp_path / "x::y.TAR", "pax", 6)
    make_index(tmp_path, progress=False)
    source = open_source(tmp_path)
    pictures = [path for path in names(source) if not path.endswith((".png", ".npy"))]
    assert len(pictures) > len(shard.images) // 2
    assert load_images(pictures, image_size=(4, 4)).shape == (len(pictures), 4, 4, 3)
    with pytest.raises(UserError, match="has no such member; check the path"):
        load_images([f"{tmp_path}/x::y.TAR::nothing.jpg"], image_size=(4, 4))
