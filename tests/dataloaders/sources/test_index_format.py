"""Indexes hold any name, those of DALI and of earlier versions are read, and the mend of every refusal works."""

from __future__ import annotations

import io
import shlex
import tarfile

import numpy as np
import pytest

from mirl.dataloaders.sources.index_format import DamagedIndex, Part, ShardIndex, parse_index_text, write_index_text
from mirl.dataloaders.sources.opening import open_source
from mirl.dataloaders.sources.tar_header import header_matches
from mirl.dataloaders.sources.tar_index import make_index
from mirl.engine.cli import dispatch
from mirl.errors import UserError
from tests.dataloaders.sources.generated import STEMS, make_shard


def text_of(index):
    stream = io.BytesIO()
    write_index_text(stream, index)
    return stream.getvalue()


def test_names_come_back_from_the_index_as_they_went_in():
    samples = [[Part("jpg", 512, 3, f"{stem}.jpg"), Part("02.02 pm.png", 1536, 4, f"{stem} 5 6 z")] for stem in STEMS]
    index = ShardIndex(samples, [("two\nlines", "hidden"), ("latin\udce9", "empty")], "jpg")
    assert parse_index_text(text_of(index)) == index
    assert all(len(line.split()) == 8 for line in text_of(index).splitlines()[1:])  # as DALI splits it


def plain(*parts):
    """A line of an index of another tool."""
    return f"v1.2 1\n{' '.join(f'{p.extension} {p.offset} {p.size} {p.name}' for p in parts)}\n".encode()


@pytest.mark.parametrize(
    "stem", ["a", "holiday 1", "trip 2019 05 12 001", "x 512 100 y", "100%25", "nel\u0085x", "x jpg 1536 9"]
)
def test_an_index_without_escapes_is_read(stem):
    parts = [Part("jpg", 512, 3, f"n/{stem}.jpg"), Part("cls", 1536, 1, f"n/{stem}.cls")]
    assert parse_index_text(plain(*parts)).samples == [parts]


def test_what_can_be_read_in_two_ways_is_refused():
    parts = [Part("jpg", 512, 3, "a.jpg png 1536 9 b.png")]  # as one name, or two
    with pytest.raises(DamagedIndex):
        parse_index_text(plain(Part("png", 512, 3, "a.png png 1536 9 b.png")))
    with pytest.raises(DamagedIndex):
        parse_index_text(plain(*parts).replace(b"v1.2 1", b"v1.2 2"))


@pytest.mark.parametrize(
    "content", [b"v1.2 1 mirl {}\njpg 512 3 a.jpg\n", b"v1.2 1 mirl\na\n", b"v1.2 1 mirl [1]\na\n", b"\0\xff"]
)
def test_a_damaged_mark_is_damage_and_no_fault_of_ours(content):
    with pytest.raises(DamagedIndex):
        parse_index_text(content)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_the_command_of_a_refusal_mends_it(tmp_path, elsewhere):
    shards, indexes = tmp_path / "my shards", tmp_path / "my indexes"
    shards.mkdir()
    shard = make_shard(shards / "x.tar", "pax", 1)
    options = {"index_dir": indexes} if elsewhere else {}
    index = (indexes if elsewhere else shards) / "x.idx"
    index.parent.mkdir(exist_ok=True)
    for content in (None, b"v1.2 7\nnonsense\n", b"v1.2 1\njpg 512 9 zzz.jpg\n"):
        index.unlink(missing_ok=True)
        if content is not None:
            index.write_bytes(content)
        with pytest.raises(UserError) as caught:
            open_source(shards, **options)
        command = str(caught.value).partition(": mirl ")[2]
        assert dispatch(shlex.split(command)) == 0
        source = open_source(shards, **options)
        assert source.num_images == len(shard.images)
        source.close()


def test_two_shards_that_would_share_an_index_are_refused(tmp_path):
    for name in ("x.tar", "x.TAR"):
        make_shard(tmp_path / name, "gnu", 1)
    with pytest.raises(UserError, match="two shards have the same name for an index.*rename one"):
        make_index(tmp_path, progress=False)


def test_a_header_belongs_to_its_name_size_and_sum():
    def header(name, format=tarfile.PAX_FORMAT):
        info = tarfile.TarInfo(name)
        info.size = 7
        return info.tobuf(format)[-512:]

    for name in ("a.jpg", "猫.jpg", "3-café.jpg", "x" * 150 + ".jpg", "dir/" * 30 + "y.jpg"):
        for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
            block = header(name, form)
            assert header_matches(block, name.encode(), 7)
            assert not header_matches(block, name.encode(), 8)
            assert not header_matches(block, b"other.png", 7)
            assert not header_matches(block, "ö4.png".encode(), 7)
            damaged = bytearray(block)
            damaged[140] ^= 1
            assert not header_matches(bytes(damaged), name.encode(), 7)
    assert not header_matches(bytes(512), b"a.jpg", 0)


def test_dali_reads_the_index(tmp_path):
    """Its reader takes the same samples, whatever the names and the words behind the count."""
    pytest.importorskip("nvidia.dali")
    from nvidia.dali import fn, pipeline_def

    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for number in range(6):
            for extension in ("jpg", "json"):
                info = tarfile.TarInfo(f"trip 2019 05 12 {number}.{extension}")
                data = f"{extension} {number}".encode()
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    make_index(tmp_path, progress=False)

    @pipeline_def(batch_size=6, num_threads=1, device_id=None)
    def reader():
        return fn.readers.webdataset(
            paths=[str(tmp_path / "x.tar")], index_paths=[str(tmp_path / "x.idx")], ext=["jpg"]
        )

    pipe = reader()
    pipe.build()
    (batch,) = pipe.run()
    assert [bytes(np.asarray(batch.at(i))) for i in range(6)] == [f"jpg {i}".encode() for i in range(6)]
