"""A data set from elsewhere writes nothing outside of the copy, loads no code and fills no memory."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from mirl.dataloaders import open_source
from mirl.dataloaders.sources.tar_index import make_index
from mirl.dataloaders.tools.prepare import prepare_data
from mirl.dataloaders.tools.target_names import TargetNames, safe_name
from tests.support.tars import add_member


def all_files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("a/b.jpg", "a/b.jpg"),
        ("../../b.jpg", "b.jpg"),
        ("/etc/b.jpg", "etc/b.jpg"),
        ("a/../../../b.jpg", "a/b.jpg"),
        ("....//b.jpg", "_.../b.jpg"),
        (".hidden/.b.jpg", "_hidden/_b.jpg"),
        ("a\n\tb\x85.jpg", "a__b_.jpg"),
        ("..", "_"),
        ("./a//b.jpg", "a/b.jpg"),
    ],
)
def test_names_stay_inside(name, safe):
    assert safe_name(name) == safe


def test_a_name_that_no_file_system_takes_is_cut():
    name = safe_name("é" * 300 + ".jpg")
    assert name.endswith(".jpg") and len(os.fsencode(name)) < 220
    assert safe_name("é" * 301 + ".jpg") != name


def test_no_two_images_share_a_name():
    names = TargetNames()
    given = ["a.jpg", "../a.jpg", "/a.jpg", "a.png", "./a.png", "a.jpeg", "a.jpg.jpg"]
    assert len({names.take(name) for name in given}) == len(given)


@pytest.mark.parametrize("shard_size", [None, 2])
def test_members_that_leave_the_folder_are_written_inside(tmp_path, photo, shard_size):
    names = ["ok/0.jpg", "../../../escaped.jpg", f"{tmp_path}/victim.jpg", "ok/../../../3.jpg", "link/4.jpg"]
    (tmp_path / "src").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "victim.jpg").write_bytes(b"mine")
    with tarfile.open(tmp_path / "src/x.tar", "w") as shard:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "outside")
        shard.addfile(link)
        hard = tarfile.TarInfo("hard.jpg")
        hard.type, hard.linkname = tarfile.LNKTYPE, "/etc/passwd"
        shard.addfile(hard)
        for number, name in enumerate(names):
            add_member(shard, name, photo(number), "JPEG")
    make_index(tmp_path / "src", progress=False)
    before = all_files(tmp_path)
    report = prepare_data(
        tmp_path / "src", tmp_path / "deep/er/dst", short_side=32, shard_size=shard_size, workers=1, progress=False
    )
    assert (tmp_path / "victim.jpg").read_bytes() == b"mine"
    new = all_files(tmp_path) - before
    assert new and all(name.startswith("deep/er/dst/") for name in new)
    assert not list((tmp_path / "outside").iterdir())
    assert not [path for path in (tmp_path / "deep").rglob("*") if path.is_symlink()]
    assert report.written == len(names) and open_source(tmp_path / "deep/er/dst").num_images == len(names)


def test_lists_with_absolute_and_parent_names_are_copied_inside(jpeg_folder, tmp_path):
    folder = jpeg_folder(3, name="a/photos")
    (tmp_path / "b").mkdir()
    lines = ["../a/photos/000.jpg", str(folder / "001.jpg"), "../a/../a/photos/002.jpg", "../b/../a/photos/000.jpg"]
    (tmp_path / "b/list.txt").write_text("\n".join(lines))
    before = all_files(tmp_path)
    prepare_data(tmp_path / "b/list.txt", tmp_path / "dst", short_side=32, workers=1, progress=False)
    new = {name for name in all_files(tmp_path) - before if name.endswith(".jpg")}
    assert len(new) == 4 and all(name.startswith("dst/") for name in new)


def test_bytes_of_a_member_are_never_a_program(tmp_path):
    """An array with Python objects would run code when it is unpickled: it is refused without being loaded."""
    import numpy as np

    from mirl.dataloaders.decoding.arrays import ArrayFormat
    from mirl.dataloaders.errors import ImageError

    trap = tmp_path / "ran"

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(trap),)

    buffer = io.BytesIO()
    np.save(buffer, np.array([Trap()], dtype=object), allow_pickle=True)
    with pytest.raises(ImageError, match="[Oo]bject arrays cannot be loaded"):
        ArrayFormat(1, np.dtype(np.float32)).read(buffer.getvalue())
    assert not trap.exists()
