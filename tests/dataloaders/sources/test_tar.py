"""Tar shards: the index, its agreement with DALI's tool, and what happens when tar and index part ways."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from mirl.dataloaders import build_train_loader
from mirl.dataloaders.errors import ImageError
from mirl.dataloaders.sources.opening import open_source
from mirl.dataloaders.sources.tar_index import index_path, make_index, read_index

SIZE = (32, 32)


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def shards(tmp_path, photo, encoded):
    """Two shards of ten samples: jpg (or png), cls, and a json that is not an image."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"{shard:03d}.tar", "w", format=tarfile.PAX_FORMAT) as tar:
            for number in range(shard * 10, shard * 10 + 10):
                form = "PNG" if number % 3 == 0 else "JPEG"
                name = f"some/long folder/{'x' * 90 if number == 4 else ''}{number:04d}"
                add(tar, f"{name}.{'png' if form == 'PNG' else 'jpg'}", encoded(photo(number), form))
                add(tar, f"{name}.cls", str(number % 7).encode())
                add(tar, f"{name}.meta.json", b"{}")
    return folder


def test_a_shard_gives_the_images_and_labels_that_went_in(shards, photo, encoded):
    written = make_index(shards, progress=False)
    assert written == [shards / "000.idx", shards / "001.idx"]
    source = open_source(shards, labels=True)
    assert source.num_images == 20
    for number in range(20):
        assert source.read(number) == encoded(photo(number), "PNG" if number % 3 == 0 else "JPEG")
        assert source.label(number) == number % 7
    assert source.path(13) == f"{shards}/001.tar::some/long folder/0013.jpg"
    source.close()
    assert source.read(0)  # opens the shard again


def test_the_index_is_that_of_dali(shards, tmp_path):
    tool = Path(sys.executable).parent / "wds2idx"
    if not tool.exists():
        pytest.skip("wds2idx, DALI's tool, is not beside this Python")
    make_index(shards, progress=False)
    for shard in sorted(shards.glob("*.tar")):
        subprocess.run([tool, shard, tmp_path / "dali.idx"], check=True, capture_output=True, timeout=60)
        assert read_index(tmp_path / "dali.idx") == read_index(index_path(shard))


def test_training_from_shards_equals_training_from_the_same_files(shards, tmp_path):
    make_index(shards, progress=False)
    loose = tmp_path / "loose"
    loose.mkdir()
    for shard in sorted(shards.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith((".jpg", ".png")):
                    (loose / f"{Path(member.name).stem[-4:]}{Path(member.name).suffix}").write_bytes(
                        tar.extractfile(member).read()
                    )
    batches = []
    for data in (shards, loose):
        with build_train_loader(data, image_size=SIZE, micro_batch=20, threads=1, bad_image_limit=0) as loader:
            batches.append(loader.next_micro_batch())
    assert np.array_equal(batches[0].sample_ids, batches[1].sample_ids)
    assert (batches[0].images == batches[1].images).all()


def test_indexing_again_keeps_what_is_fresh(shards):
    make_index(shards, progress=False)
    (shards / "000.idx").write_text("mine")
    seen = []
    make_index(shards, progress=lambda done, total: seen.append((done, total)))
    assert (shards / "000.idx").read_text() == "mine" and seen == [(1, 2), (2, 2)]
    make_index(shards, progress=False, force=True)
    assert len(read_index(shards / "000.idx")) == 10


def test_indexes_may_stand_elsewhere(shards, tmp_path):
    written = make_index(shards, index_dir=tmp_path / "indexes", progress=False)
    assert written[0] == tmp_path / "indexes/000.idx" and not (shards / "000.idx").exists()
    assert open_source(shards, index_dir=tmp_path / "indexes").num_images == 20


def test_a_missing_index_names_the_command(shards):
    with pytest.raises(ValueError, match="index .*000.idx is missing; make it with: mirl make-index"):
        open_source(shards)


@pytest.mark.parametrize("sample", [4, 9])
def test_a_tar_cut_in_the_middle_is_refused_by_the_index_and_by_training(shards, sample):
    make_index(shards, progress=False)
    image = read_index(shards / "000.idx")[sample][0]
    data = (shards / "000.tar").read_bytes()
    (shards / "000.tar").write_bytes(data[: image.offset + image.size // 2])
    with pytest.raises(ValueError, match="index of .*000.tar does not match the tar .* mirl make-index --force"):
        open_source(shards)
    with pytest.raises(ValueError, match="tar shard .*000.tar is cut or damaged .*; copy or write it again"):
        make_index(shards, force=True, progress=False)
    make_index(shards, force=True, allow_cut=True, progress=False)
    source = open_source(shards)
    assert 10 < source.num_images < 20
    for number in range(source.num_images):
        assert source.read(number)


def test_a_tar_cut_between_two_members_is_noticed(shards):
    shard = shards / "000.tar"
    make_index(shard, progress=False)
    end = read_index(shards / "000.idx")[4][0].offset - 512
    shard.write_bytes(shard.read_bytes()[:end])
    with pytest.raises(ValueError, match="cut or damaged"):
        make_index(shard, force=True, progress=False)


def test_a_tar_cut_while_training_loses_single_images(shards):
    make_index(shards, progress=False)
    with build_train_loader(shards, image_size=SIZE, micro_batch=20, threads=1, bad_image_limit=1.0, seed=2) as loader:
        data = (shards / "001.tar").read_bytes()
        with open(shards / "001.tar", "r+b") as file:
            file.truncate(len(data) // 2)
        loader.next_micro_batch()
        reasons = {bad.reason for bad in loader.bad_images}
        assert 0 < len(loader.bad_images) < 10
        assert reasons == {"the tar ends before this sample does; it was cut after its index was made"}


def test_an_index_of_another_tar_is_refused(shards):
    make_index(shards, progress=False)
    (shards / "000.idx").write_text((shards / "001.idx").read_text())
    with pytest.raises(ValueError, match="index of .*000.tar does not match the tar at sample"):
        open_source(shards)


def test_a_single_member_that_moved_is_a_broken_image(shards):
    make_index(shards, progress=False)
    index = shards / "000.idx"
    lines = index.read_text().splitlines()
    lines[3], lines[4] = lines[4], lines[3]  # both still right
    fields = lines[7].split(" ")
    fields[1] = str(int(fields[1]) + 512)
    index.write_text("\n".join([*lines[:7], " ".join(fields), *lines[8:]]) + "\n")
    source = open_source(shards)
    with pytest.raises(ImageError, match="index does not match the tar"):
        source.read(6)
    assert source.read(5) and source.read(7)


@pytest.mark.parametrize("content", ["", "v1.2 2\njpg 512 3 a.jpg\n", "v1.2 1\nnonsense\n", "v9.9 0\n", "v1.1 0\n"])
def test_a_damaged_index_is_refused(shards, content):
    make_index(shards, progress=False)
    (shards / "000.idx").write_text(content)
    with pytest.raises(ValueError, match="index .*000.idx .*mirl make-index --force"):
        open_source(shards)


def test_a_file_that_is_no_tar_and_a_folder_without_tars(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"not a tar" * 100)
    with pytest.raises(ValueError, match="x.tar is cut or damaged"):
        make_index(tmp_path, progress=False)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="no .tar files in"):
        make_index(tmp_path / "none", progress=False)


def test_labels_need_cls_parts(shards):
    with tarfile.open(shards / "002.tar", "w") as tar:
        add(tar, "a.jpg", b"x")
    make_index(shards, progress=False)
    with pytest.raises(ValueError, match="sample a.jpg of .*002.tar has no cls part"):
        open_source(shards, labels=True)
