"""What stands behind the last member that is known: other tars, members that were appended, or no tar at all."""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import tarfile
import zipfile

import pytest

from mirl.dataloaders import open_source
from mirl.dataloaders.errors import ImageError
from mirl.dataloaders.sources.tar_index import make_index
from mirl.dataloaders.sources.tar_source import TarSource
from mirl.dataloaders.tools.validate import validate_data
from mirl.engine.cli import dispatch
from mirl.errors import UserError
from tests.dataloaders.sources.generated import picture
from tests.support.tars import add_member


def tar_of(*names: str, format: int = tarfile.GNU_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as tar:
        for name in names:
            add_member(tar, name, picture())
    return stream.getvalue()


def names_in(source: TarSource) -> list[str]:
    names = [source.path(index).rpartition("::")[2] for index in range(source.num_images)]
    assert all(source.read(index) == picture() for index in range(source.num_images))
    source.close()
    return names


@pytest.mark.parametrize("padding", [0, 512, 10240, 3 * 2**20])
def test_tars_in_one_file_are_one_shard(padding, tmp_path):
    """`cat a.tar b.tar`: a tar ends at its mark, and the rest was lost."""
    whole = tar_of("a.jpg", "b.jpg") + bytes(padding) + tar_of("c.jpg", format=tarfile.PAX_FORMAT) + tar_of("d.jpg")
    (tmp_path / "x.tar").write_bytes(whole)
    make_index(tmp_path, progress=False)
    assert names_in(open_source(tmp_path)) == ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]


@pytest.mark.parametrize("how", ["tar -r", "cat", "into the padding"])
@pytest.mark.parametrize("index_of", ["this version", "another tool"])
def test_what_is_added_after_the_index_was_made_is_noticed_and_the_mend_works(how, index_of, tmp_path):
    shard = tmp_path / "x.tar"
    shard.write_bytes(tar_of("a.jpg", "b.jpg"))
    make_index(tmp_path, progress=False)
    if index_of == "another tool":
        head, _, lines = (tmp_path / "x.idx").read_bytes().partition(b"\n")
        (tmp_path / "x.idx").write_bytes(b" ".join(head.split()[:2]) + b"\n" + lines)
    size = shard.stat().st_size
    if how == "cat":
        with open(shard, "ab") as file:
            file.write(tar_of("c.jpg"))
    else:
        with tarfile.open(shard, "a") as tar:
            for name in ["c.jpg"] + ["d.jpg"] * 20 * (how == "tar -r"):
                add_member(tar, name, picture())
    assert (shard.stat().st_size == size) == (how == "into the padding")
    os.utime(tmp_path / "x.idx")  # copied later than the tar, so that times tell nothing
    with pytest.raises(UserError, match=r"does not match the tar: c.jpg and what follows was added after") as refused:
        open_source(tmp_path)
    assert dispatch(str(refused.value).rpartition("mirl ")[2].split()) == 0
    assert names_in(open_source(tmp_path))[:3] == ["a.jpg", "b.jpg", "c.jpg"]


def test_what_is_no_image_may_follow(tmp_path):
    (tmp_path / "x.tar").write_bytes(tar_of("a.jpg", "b.jpg", "README.txt", ".hidden.jpg"))
    make_index(tmp_path, progress=False)
    index = (tmp_path / "x.idx").read_bytes().split(b"\n")
    # As a tool writes it that lists images alone.
    (tmp_path / "x.idx").write_bytes(b"v1.2 2\n" + b"\n".join(index[1:3]) + b"\n")
    assert names_in(open_source(tmp_path)) == ["a.jpg", "b.jpg"]


def test_bytes_behind_the_end_that_are_no_tar_are_told(tmp_path):
    (tmp_path / "x.tar").write_bytes(tar_of("a.jpg") + bytes(512) + b"\x01" * 700)
    with pytest.raises(UserError, match=r"what stands behind its end mark, from byte \d+ on, is no tar.*--allow-cut"):
        make_index(tmp_path, progress=False)
    make_index(tmp_path, allow_cut=True, progress=False)
    assert names_in(open_source(tmp_path)) == ["a.jpg"]


def test_a_compressed_shard_is_called_that(tmp_path):
    (tmp_path / "x.tar").write_bytes(gzip.compress(tar_of("a.jpg")))
    with zipfile.ZipFile(tmp_path / "y.tar", "w") as archive:
        archive.writestr("a.jpg", picture())
    for name in ("x.tar", "y.tar"):
        with pytest.raises(UserError, match=f"{name} is compressed, or an archive of another kind: unpack it"):
            make_index(tmp_path / name, progress=False)


def test_a_tar_of_the_oldest_form_is_one_by_its_content(tmp_path):
    (tmp_path / "files").mkdir()
    for number in range(3):
        (tmp_path / "files" / f"{number}.jpg").write_bytes(picture())
    (tmp_path / "shards").mkdir()
    subprocess.run(
        ["tar", "--format", "v7", "-C", tmp_path / "files", "-cf", tmp_path / "shards/no-suffix", "."], check=True
    )
    make_index(tmp_path / "shards", progress=False)
    assert len(names_in(open_source(tmp_path / "shards"))) == 3


@pytest.mark.parametrize("text", [b"-1", b"3.0", b"1_0", b"", b"9" * 20, "٣".encode()])
def test_a_class_that_is_no_number_is_named(text, tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for number, label in enumerate([b" 7\n", text]):
            add_member(tar, f"{number}.jpg", picture())
            add_member(tar, f"{number}.cls", label)
    make_index(tmp_path, progress=False)
    source = open_source(tmp_path, labels=True)
    assert source.label(0) == 7
    with pytest.raises(ImageError, match="its cls part is .*, not a class number"):
        source.label(1)
    source.close()
    told = str(validate_data(tmp_path, progress=False))
    assert "1 of 2 images have no class number that can be used" in told and "classes 1: 7 1" in told


def test_images_that_are_named_twice_are_told(tmp_path):
    for name in ("a/b/0.jpg", "a/1.jpg", "c/2.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(picture())
    (tmp_path / "link").symlink_to(tmp_path / "c")
    assert "twice" not in str(open_source([tmp_path / "a", tmp_path / "c"]).ledger)
    inside = str(open_source([tmp_path / "a/b", tmp_path / "a"]).ledger)
    assert f"{tmp_path}/a/b lies in {tmp_path}/a: its images count twice" in inside
    assert f"{tmp_path}/link is given twice" in str(open_source([tmp_path / "c", tmp_path / "link"]).ledger)


def test_splits_are_found_in_any_case(tmp_path):
    for split in ("Train", "VAL"):
        for label in ("ant", "bee"):
            (tmp_path / split / label).mkdir(parents=True)
            (tmp_path / split / label / f"{split}.jpg").write_bytes(picture())
    for split, name in (("train", "Train"), ("val", "VAL")):
        source = open_source(tmp_path, labels=True, split=split)
        assert source.classes == ["ant", "bee"] and f"/{name}/" in source.path(0)
        assert f"{name}/ of {tmp_path} is read" in str(source.ledger)
    (tmp_path / "train/ant").mkdir(parents=True)
    (tmp_path / "train/ant/1.jpg").write_bytes(picture())
    source = open_source(tmp_path)
    assert source.num_images == 1 and "is read, not Train, VAL" in str(source.ledger)


def test_pages_that_are_no_image_are_told(tmp_path):
    from PIL import Image

    pages = [Image.new("RGB", (8, 8), (40 * number, 0, 0)) for number in range(5)]
    for name in ("stack.tif", "film.gif"):
        pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
    pages[0].save(tmp_path / "one.tif")
    assert "2 of the files have several pages or frames, of which the first is the image: 8 pages are not used" in str(
        validate_data(tmp_path, progress=False)
    )
    (tmp_path / "stack.tif").unlink()
    (tmp_path / "film.gif").unlink()
    assert "several pages" not in str(validate_data(tmp_path, progress=False))
