"""What a message tells to do is done here, as told, and the problem is gone."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest

from mirl.dataloaders import open_source
from mirl.dataloaders.sources.tar_index import make_index
from mirl.dataloaders.tools.validate import validate_data
from mirl.engine.cli import dispatch
from mirl.errors import UserError
from tests.support.tars import add_member


def refusal(data: Path, **options) -> str:
    with pytest.raises(UserError) as caught:
        open_source(data, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def run_mirl(message: str) -> None:
    """Runs the command that ends the message."""
    assert dispatch(shlex.split(re.search(r"mirl ((?:make-index|validate-data) .*)$", message)[1])) == 0


@pytest.mark.parametrize("separator", [" ", "  ", ",", ", ", ";"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("folder", ["img", "my images"])
def test_the_sed_of_a_list_without_tabs(separator, end, folder, jpeg_folder, tmp_path):
    images = jpeg_folder(3, name=f"it's/{folder}")
    listed = images.parent / "list 1.txt"
    listed.write_text("".join(f"{folder}/{n:03d}.jpg{separator}{7 - n}{end}" for n in range(3)), newline="")
    command = re.search(r"sed -E .* > NEW", refusal(listed, labels=True))[0]
    mended = listed.with_name("mended.txt")
    shell = command.replace("> NEW", f"> {shlex.quote(os.fspath(mended))}")
    subprocess.run(["bash", "-c", shell], check=True, cwd=tmp_path)
    source = open_source(mended, labels=True)
    assert [source.label(index) for index in range(3)] == [7, 6, 5]
    assert all(source.read(index) for index in range(3))


@pytest.mark.parametrize("elsewhere", [False, True])
def test_the_command_for_a_sample_of_several_images(elsewhere, photo, tmp_path):
    shards, indexes = tmp_path / "the shards", tmp_path / "the indexes" if elsewhere else None
    shards.mkdir()
    with tarfile.open(shards / "a b.tar", "w") as shard:
        for number in range(2):
            for part in ("left.png", "right.png"):
                add_member(shard, f"{number}.{part}", photo(number, 32, 32))
    with pytest.raises(UserError) as caught:
        make_index(shards, index_dir=indexes, progress=False)
    run_mirl(str(caught.value))
    source = open_source(shards, index_dir=indexes)
    assert source.num_images == 2 and "left.png" in source.path(0)
    source.close()


def test_the_command_for_a_damaged_manifest(jpeg_folder):
    folder = jpeg_folder(3)
    validate_data(folder, progress=False)
    manifest = folder / "mirl-manifest.tsv"
    manifest.write_text(manifest.read_text() + "a line\twith too little\n")
    message = refusal(folder)
    assert "damaged" in message
    run_mirl(message)
    assert open_source(folder).num_images == 3


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user whose permissions count")
@pytest.mark.parametrize("what", ["folder", "sub-folder"])
def test_the_chmod_for_what_may_not_be_read(what, jpeg_folder):
    root = Path(tempfile.mkdtemp())
    os.chmod(root, 0o777)
    folder = root / "photos"
    shutil.copytree(jpeg_folder(3, name="photos/sub").parent, folder)
    nobody = 65534
    for path in (folder, *folder.rglob("*")):
        os.chown(path, nobody, nobody)
    closed = folder if what == "folder" else folder / "sub"
    os.chmod(closed, 0)
    try:
        os.seteuid(nobody)
        try:
            message = refusal(folder)
            command = re.search(r"chmod \S+ u\+rX", message)[0]
        finally:
            os.seteuid(0)
        subprocess.run([*command.split(), closed], check=True, user=nobody)
        os.seteuid(nobody)
        try:
            assert open_source(folder).num_images == 3
        finally:
            os.seteuid(0)
    finally:
        shutil.rmtree(root)


def test_names_beside_numbers_are_refused_and_the_mend_works(jpeg_folder, tmp_path):
    for name in ("ant", "bee"):
        jpeg_folder(2, name=f"classes/{name}")
    listed = tmp_path / "list.txt"
    listed.write_text("classes/ant/000.jpg\t0\nclasses/bee/000.jpg\t1\n")
    message = None
    with pytest.raises(UserError) as caught:
        open_source([tmp_path / "classes", listed], labels=True)
    message = str(caught.value)
    assert "class names in" in message and "class numbers alone in" in message
    assert open_source([tmp_path / "classes", listed]).num_images == 6, "without labels any parts go together"
    assert open_source([listed, listed], labels=True).num_images == 4
