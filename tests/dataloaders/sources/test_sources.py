"""Folders, lists, manifests and several roots; every way of naming no data is one line with its mend."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from mirl.dataloaders.errors import ImageError
from mirl.dataloaders.sources.opening import open_source
from mirl.dataloaders.sources.paths import PathTable


def names(source):
    return [source.path(index) for index in range(source.num_images)]


def touch(root, *files):
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(b"x")
    return root


def test_folders_of_any_depth_in_one_order(tmp_path):
    touch(tmp_path, "b/2.JPEG", "b/10.jpg", "a/deep/er/1.png", "z.webp", "notes.txt", "._z.webp", ".hidden/3.jpg")
    source = open_source(tmp_path)
    assert names(source) == [str(tmp_path / n) for n in ("a/deep/er/1.png", "b/10.jpg", "b/2.JPEG", "z.webp")]
    assert source.read(0) == b"x"


def test_links_are_followed_once(tmp_path):
    touch(tmp_path, "real/1.jpg")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/linked").symlink_to(tmp_path / "real")
    (tmp_path / "real/loop").symlink_to(tmp_path / "data")
    assert open_source(tmp_path / "data").num_images == 1


def test_train_is_chosen_beside_other_splits(tmp_path):
    touch(tmp_path, "train/cat/1.jpg", "train/dog/2.jpg", "val/cat/3.jpg")
    source = open_source(tmp_path, labels=True)
    assert names(source) == [str(tmp_path / "train/cat/1.jpg"), str(tmp_path / "train/dog/2.jpg")]
    assert names(open_source(tmp_path, split="val")) == [str(tmp_path / "val/cat/3.jpg")]
    assert names(open_source(tmp_path / "train", split="val")) == names(source)  # no splits there: it is what it is
    assert source.classes == ["cat", "dog"]
    assert open_source(tmp_path / "val").num_images == 1


def test_several_roots_are_one_data_set_with_joined_classes(tmp_path):
    touch(tmp_path, "a/cat/1.jpg", "a/eel/2.jpg", "b/bee/3.jpg", "b/cat/4.jpg")
    source = open_source([tmp_path / "a", tmp_path / "b"], labels=True)
    assert source.classes == ["bee", "cat", "eel"]
    assert [source.label(i) for i in range(4)] == [1, 2, 0, 1]
    assert [path[-5:] for path in names(source)] == ["1.jpg", "2.jpg", "3.jpg", "4.jpg"]
    assert source.fingerprint() != open_source([tmp_path / "b", tmp_path / "a"]).fingerprint()
    assert source.read(3) == b"x"


def test_a_list_of_paths(tmp_path):
    touch(tmp_path, "one.jpg", "sub/zwei ü.jpg")
    listing = tmp_path / "images.txt"
    listing.write_text(f"# mine\none.jpg\n\nsub/zwei ü.jpg\n{tmp_path}/one.jpg\n")
    assert names(open_source(listing)) == [str(tmp_path / n) for n in ("one.jpg", "sub/zwei ü.jpg", "one.jpg")]
    listing.write_text("one.jpg\t3\nsub/zwei ü.jpg\t0\n")
    assert [open_source(listing, labels=True).label(i) for i in (0, 1)] == [3, 0]


def make_unreadable(tmp_path):
    folder = touch(tmp_path / "secret", "closed/1.jpg", "open/2.jpg")
    (folder / "closed").chmod(0)
    return folder


def text(tmp_path, content):
    path = tmp_path / "list.txt"
    path.write_text(content)
    return path


def both(tmp_path):
    return touch(tmp_path / "both", "1.jpg", "2.tar")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda t: t / "nowhere", "data folder .*nowhere does not exist; check the path"),
        (lambda t: touch(t / "empty", "x/readme.md"), r"no images in .*empty \(it holds x\); expected files ending in"),
        (lambda t: (t / "void").mkdir() or t / "void", r"no images in .*void \(it is empty\)"),
        (lambda t: touch(t, "a.zip") / "a.zip", "a.zip is not a folder, a list"),
        (lambda t: text(t, "\n# nothing\n"), "names no image; write one path a line"),
        (lambda t: text(t, "gone/1.jpg\n"), "its first entry .*gone/1.jpg does not exist; use absolute paths"),
        (lambda t: [], "data is an empty list"),
        (both, "holds 1 .tar files and 1 images; choose layout tar or files"),
    ],
)
def test_no_data_is_a_value_error_of_one_line(tmp_path, make, message):
    with pytest.raises(ValueError, match=message) as caught:
        open_source(make(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0 and not os.path.exists("/usr/bin/setpriv"), reason="root reads every folder")
def test_a_folder_that_may_not_be_read_is_named():
    code = "import sys; from mirl.dataloaders.sources.opening import open_source; open_source(sys.argv[1])"
    # Not in tmp_path: whichever pytest starts next closes the folder above it to all others.
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        folder = make_unreadable(Path(place))
        command = [sys.executable, "-c", code, str(folder)]
        if os.geteuid() == 0:  # root may read everything: ask as nobody
            command = ["setpriv", "--reuid=65534", "--clear-groups", *command]
        env = os.environ | {"HOME": "/nonexistent"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
        os.chmod(place, 0o700)
        closed = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
        (folder / "closed").chmod(0o755)
    assert "mirl.errors.UserError: data folder" in done.stderr
    assert "secret/closed cannot be read (permission denied)" in done.stderr
    if os.geteuid() == 0:  # the owner of a folder without search permission cannot even ask what is in it
        assert "cannot be read (permission denied); grant read and search permission on it" in closed.stderr


def test_labels_need_class_folders(tmp_path):
    touch(tmp_path, "cat/1.jpg", "loose.jpg")
    with pytest.raises(ValueError, match="loose.jpg is in no class folder; arrange the images as .*CLASS/image.jpg"):
        open_source(tmp_path, labels=True)
    with pytest.raises(ValueError, match="opened without labels"):
        open_source(tmp_path).label(0)
    with pytest.raises(ValueError, match="labels were asked for, but .*list.txt has none"):
        open_source(text(tmp_path, "loose.jpg\n"), labels=True)
    with pytest.raises(ValueError, match="'cat' is not 'path<TAB>label'"):
        open_source(text(tmp_path, "loose.jpg\t1\ncat\n"))


def test_a_file_that_goes_away_is_an_image_error(tmp_path):
    source = open_source(touch(tmp_path, "1.jpg"))
    (tmp_path / "1.jpg").unlink()
    with pytest.raises(ImageError, match="no longer exists"):
        source.read(0)
    (tmp_path / "1.jpg").mkdir()
    with pytest.raises(ImageError, match="cannot be read"):
        source.read(0)


def test_path_table_keeps_every_kind_of_name():
    kept = ["a.jpg", "with space/ü.jpg", os.fsdecode(b"latin\xe9.jpg"), "/absolute/b.jpg", ""]
    table = PathTable("/root", kept)
    assert [table.name(i) for i in range(5)] == kept
    assert table[0] == "/root/a.jpg" and table[3] == "/absolute/b.jpg"
    with pytest.raises(IndexError):
        table[5]
    assert table.digest() == PathTable("/elsewhere", kept).digest()
    assert table.digest() != PathTable("/root", ["a.jpgwith", " space/ü.jpg", *kept[2:]]).digest()
