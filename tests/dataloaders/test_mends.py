"""What a message tells to do is done here, as told, and the problem is gone."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
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
    command = re.search(r"sed -E .* > (.*)", refusal(listed, labels=True))
    subprocess.run(["bash", "-c", command[0]], check=True, cwd=tmp_path)
    source = open_source(*shlex.split(command[1]), labels=True)
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


# --- manifests


def told_command(message: str) -> list[str]:
    """The words behind `mirl` of the command that ends the message."""
    return shlex.split(message.rpartition("mirl ")[2])


@pytest.mark.parametrize("damage", ["a line", "another version"])
@pytest.mark.parametrize("place", ["in the folder", "elsewhere", "moved"])
def test_the_command_for_a_manifest_writes_the_one_that_was_refused(place, damage, jpeg_folder, tmp_path):
    folder = jpeg_folder(3, name="it's/my photos")
    elsewhere = tmp_path / "my lists" / "photos.tsv"
    elsewhere.parent.mkdir()
    manifest = elsewhere if place == "elsewhere" else folder / "mirl-manifest.tsv"
    (folder / "001.jpg").write_bytes(b"")
    validate_data(folder, manifest=manifest, progress=False)
    if place == "moved":
        folder = folder.rename(tmp_path / "other photos")
        manifest = folder / manifest.name
    text = manifest.read_text()
    manifest.write_text(text + "too\tlittle\n" if damage == "a line" else text.replace("bytes\theight", "bytes"))
    message = refusal(manifest)
    assert ("line 6 is damaged" if damage == "a line" else "not a manifest of this version") in message
    assert dispatch(told_command(message)) == 1, "one image is broken"
    assert open_source(manifest).num_images == 2


def test_the_command_for_a_manifest_of_shards_that_changed(photo, tmp_path):
    shards, manifest = tmp_path / "the shards", tmp_path / "of shards.tsv"
    shards.mkdir()

    def write(count: int) -> None:
        with tarfile.open(shards / "a.tar", "w") as shard:
            for number in range(count):
                add_member(shard, f"{number}.png", photo(number, 32, 32))
        make_index(shards, force=True, progress=False)

    write(3)
    validate_data(shards, manifest=manifest, progress=False)
    write(2)
    message = refusal(manifest)
    assert "names 3 members, the shards have 2" in message
    assert dispatch(told_command(message)) == 0
    source = open_source(manifest)
    assert source.num_images == 2
    source.close()


# --- shards


def test_a_cut_shard_is_indexed_by_its_whole_members_with_the_flag(photo, tmp_path, capsys):
    shard = tmp_path / "a.tar"
    with tarfile.open(shard, "w") as tar:
        for number in range(3):
            add_member(tar, f"{number}.png", photo(number, 32, 32))
    shard.write_bytes(shard.read_bytes()[: tar.offset // 2])
    with pytest.raises(UserError) as caught:
        dispatch(["make-index", str(shard)])
    flag = re.search(r"--[a-z-]+", str(caught.value))[0]
    assert dispatch(["make-index", flag, str(shard)]) == 0
    told = int(re.search(r"data (\d+) images? from", capsys.readouterr().out)[1])
    source = open_source(shard)
    assert source.num_images == told in (1, 2)
    source.close()


def test_a_folder_of_both_kinds_has_a_path_to_give(photo, jpeg_folder):
    folder = jpeg_folder(2, name="both kinds")
    with tarfile.open(folder / "a.tar", "w") as shard:
        add_member(shard, "0.png", photo(0, 32, 32))
    make_index(folder, progress=False)
    named = re.search(r"--data (.*), or", refusal(folder))[1]
    source = open_source(*shlex.split(named))
    assert source.num_images == 1
    source.close()
    assert open_source(folder, layout="files").num_images == 2


# --- a limit of open files


@pytest.mark.process
def test_the_limit_of_open_files_is_raised_as_it_is_told():
    """Where this process may not raise it itself, its shell does as told; a hard limit is said to be one."""
    program = (
        "import resource\n"
        "from mirl.dataloaders.sources.handles import mend_of_too_many\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE)[0], mend_of_too_many())\n"
    )

    def run(*limits: str) -> tuple[int, str]:
        shell = " && ".join([*limits, 'exec "$0" -c "$1"'])
        done = subprocess.run(
            ["bash", "-c", shell, sys.executable, program], capture_output=True, text=True, check=True, timeout=60
        )
        limit, _, mend = done.stdout.strip().partition(" ")
        return int(limit), mend

    limits = ["ulimit -Sn 64", "ulimit -Hn 100"]
    limit, mend = run(*limits)
    assert limit == 64 and "the limit of 64 open files" in mend
    limit, mend = run(*limits, re.search(r"ulimit -n \d+$", mend)[0])
    assert limit == 100 and "the limit of 100 open files is a hard one" in mend


@pytest.mark.process
def test_too_few_open_files_for_shards_is_one_line_with_that_mend(photo, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        add_member(shard, "0.png", photo(0, 32, 32))
    make_index(tmp_path, progress=False)
    program = (
        "import os, resource, sys\n"
        "from mirl.dataloaders.sources import tar_source, handles\n"
        "from pathlib import Path\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))\n"
        "source = tar_source.TarSource([Path(sys.argv[1])])\n"
        "source.close()\n"
        "held = []\n"
        "try:\n"
        "    while True: held.append(os.open('/dev/null', os.O_RDONLY))\n"
        "except OSError: pass\n"
        "source._check()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "a.tar"], capture_output=True, text=True, timeout=60
    )
    last = done.stderr.strip().splitlines()[-1]
    assert "a.tar cannot be read (Too many open files): the limit of 40 open files is a hard one" in last
