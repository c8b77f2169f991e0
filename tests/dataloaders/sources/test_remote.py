"""Shards behind s3:// and http://, against servers on the loopback: moto's S3, web servers with ranges and without."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import tarfile
import threading
import time
from pathlib import Path

import pytest

from mirl.dataloaders import StorageLost, build_train_loader, load_images, open_source
from mirl.dataloaders.sources import containers, patience, remote_cache, remote_files
from mirl.dataloaders.sources.remote import expand_braces
from mirl.dataloaders.sources.tar_index import make_index
from mirl.dataloaders.tools.bench import bench_loader
from mirl.dataloaders.tools.validate import validate_data
from mirl.errors import UserError
from tests.support.tars import add_member
from tests.support.web_server import WebServer


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MIRL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(patience, "_outage", patience._Outage())
    monkeypatch.setattr(patience, "_FIRST_WAIT_S", 0.02)
    monkeypatch.setattr(patience, "PATIENCE_S", 0.6)
    return tmp_path / "cache"


@pytest.fixture
def shards(tmp_path, photo, encoded) -> Path:
    """A folder with shard-00.tar and shard-01.tar, 5 labelled images each, and the names of their three classes."""
    return write_shards(tmp_path / "local", photo, encoded)


def write_shards(folder: Path, photo, encoded, first: int = 0) -> Path:
    folder.mkdir(parents=True)
    for number in range(2):
        with tarfile.open(folder / f"shard-{number:02d}.tar", "w") as tar:
            for image in range(first + 5 * number, first + 5 * number + 5):
                add_member(tar, f"{image:03d}.jpg", encoded(photo(image, 64, 48)))
                add_member(tar, f"{image:03d}.cls", str(image % 3).encode())
    (folder / "mirl-classes.txt").write_text("ant\nbee\ncat\n")
    return folder


@pytest.fixture(scope="module")
def s3():
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def bucket(s3, monkeypatch):
    """bucket(folder, prefix): puts the files of a folder below s3://data/prefix."""
    host, port = s3.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    remote_files._open_system.cache_clear()
    import boto3

    client = boto3.client("s3")
    client.create_bucket(Bucket="data")

    def put(folder: Path, prefix: str) -> str:
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            client.upload_file(str(file), "data", f"{prefix}/{file.relative_to(folder)}")
        return f"s3://data/{prefix}"

    yield put
    remote_files._open_system.cache_clear()


def images_of(source) -> list[bytes]:
    return [source.read(index) for index in range(source.num_images)]


def fetched(server: WebServer) -> list[tuple[str, str | None]]:
    return [(path, part) for method, path, part in server.asked if method == "GET" and path.endswith(".tar")]


def test_a_prefix_on_s3_is_the_data_set_that_the_folder_is(shards, bucket, cache, tmp_path, photo, encoded):
    (shards / "notes.json").write_text("{}")
    root = tmp_path / "root"
    shutil.copytree(shards, root / "train")
    write_shards(root / "val", photo, encoded, first=50)
    url = bucket(root, "set")
    source = open_source(url, labels=True)
    make_index(shards, progress=False)
    local = open_source(shards, labels=True)
    assert images_of(source) == images_of(local) and source.classes == local.classes == ["ant", "bee", "cat"]
    assert [source.label(index) for index in range(10)] == [local.label(index) for index in range(10)]
    assert source.fingerprint() == local.fingerprint()
    assert source.path(7) == f"{url}/train/shard-01.tar::007.jpg"
    assert "10 images from 21 members of 2 tar shards and objects (11 left out: 10 .cls, 1 .json)" in str(source.ledger)
    assert f"train/ of {url} is read, not val" in str(source.ledger)
    assert f"in {cache}/shards/" in str(source.ledger)
    assert open_source(url, split="val").path(0) == f"{url}/val/shard-00.tar::050.jpg"

    # A run that began with the local shards goes on with these, on another number of ranks.
    settings = {"image_size": (32, 32), "seed": 3, "threads": 1, "labels": True}
    with build_train_loader(shards, micro_batch=4, **settings) as loader:
        loader.next_micro_batch()
        state, wanted = loader.state_dict(), loader.next_micro_batch()
    place = Path(f"{url}/train")  # as a command has it: a path has one slash where an address has two
    with build_train_loader(place, micro_batch=2, rank=1, world_size=2, **settings) as loader:
        loader.load_state_dict(state)
        batch = loader.next_micro_batch()
    own = [wanted.positions.tolist().index(position) for position in batch.positions.tolist()]
    assert batch.images.equal(wanted.images[own]) and batch.labels.equal(wanted.labels[own])


def test_s3_says_what_is_wrong_in_one_line(bucket, shards, monkeypatch, tmp_path):
    (tmp_path / "loose").mkdir()
    (tmp_path / "loose/a.jpg").write_bytes(b"x")
    url = bucket(tmp_path / "loose", "loose")
    bucket(shards, "good")
    for place, problem in (
        ("s3://data/nothing", "s3://data/nothing holds nothing: check the address"),
        ("s3://other/x.tar", r"s3://other/x.tar does not exist"),
        ("s3://data/good/shard-07.tar", "s3://data/good/shard-07.tar does not exist"),
        (url, r"no .tar below .*loose: images are read from shards there \(0 images from 1 objects \(1 left out: 1 "),
    ):
        with pytest.raises(UserError, match=problem) as error:
            open_source(place)
        assert "\n" not in str(error.value)
    with monkeypatch.context() as patch:
        patch.setattr(remote_files, "_open_system", lambda scheme, process: (_ for _ in ()).throw(forbidden()))
        with pytest.raises(UserError, match=r"may not be read \(403\): export AWS_PROFILE, or AWS_ACCESS_KEY_ID"):
            open_source("s3://data/good/shard-00.tar")


def forbidden() -> Exception:
    """What s3fs raises for a bucket of somebody else."""
    from botocore.exceptions import ClientError

    answer = {"ResponseMetadata": {"HTTPStatusCode": 403}, "Error": {"Code": "403", "Message": "Forbidden"}}
    error = PermissionError("Forbidden")
    error.__cause__ = ClientError(answer, "HeadObject")
    return error


def test_an_object_that_is_written_again_while_it_is_fetched_is_one_version(bucket, shards, monkeypatch):
    url = bucket(shards, "changing") + "/shard-00.tar"
    monkeypatch.setattr(remote_files, "_BLOCK", 4096)
    original, blocks = remote_files._write, []

    def change_after_two(file, data):
        blocks.append(len(data))
        if len(blocks) == 2:
            shutil.copy(shards / "shard-01.tar", shards / "shard-00.tar")
            bucket(shards, "changing")
        return original(file, data)

    monkeypatch.setattr(remote_files, "_write", change_after_two)
    assert images_of(open_source(url)) == images_of_local(shards / "shard-01.tar")


def test_s3_that_is_gone_is_waited_for_and_then_told_in_one_line(bucket, shards, s3, monkeypatch, caplog):
    from moto.server import ThreadedMotoServer

    url = bucket(shards, "gone") + "/shard-00.tar"
    host, port = s3.get_host_and_port()
    monkeypatch.setattr(remote_files, "_BLOCK", 4096)
    original, blocks = remote_files._write, []
    other = ThreadedMotoServer(ip_address=host, port=port, verbose=False)

    def stop_after_two(file, data):
        blocks.append(len(data))
        if len(blocks) == 2:
            s3.stop()
            threading.Timer(0.2, other.start).start()
        return original(file, data)

    monkeypatch.setattr(remote_files, "_write", stop_after_two)
    source = open_source(url)
    assert source.num_images == 5 and images_of(source)
    assert sum(blocks) == (shards / "shard-00.tar").stat().st_size, "what had come was kept"
    assert "trying again" in caplog.text
    other.stop()
    began = time.monotonic()
    with pytest.raises(StorageLost, match=r"does not answer \(s3://data/gone/shard-01.tar cannot be read: Could not"):
        open_source("s3://data/gone/shard-01.tar")
    assert patience.PATIENCE_S < time.monotonic() - began < 10
    s3.start()  # for the tests that follow


def test_shards_of_the_web_are_fetched_once(shards, cache, tmp_path, capsys):
    with WebServer(shards) as server:
        url = f"{server.url}/shard-{{00..01}}.tar"
        source = open_source(url, labels=True)
        assert source.num_images == 10 and source.classes == ["ant", "bee", "cat"]
        assert sorted(fetched(server)) == [("/shard-00.tar", None), ("/shard-01.tar", None)]
        report = validate_data(url, manifest=tmp_path / "m.tsv", progress=False)
        assert report.num_images == 10 and not report.bad
        assert report.overviews[0].counts == {"ant": 4, "bee": 3, "cat": 3}
        assert f"{server.url}/shard-01.tar::007.jpg\t" in (tmp_path / "m.tsv").read_text()
        listed = open_source(tmp_path / "m.tsv", labels=True)
        assert [listed.path(n) for n in range(10)] == [source.path(n) for n in range(10)]
        assert listed.label(7) == 1
        assert load_images([Path(source.path(7))], image_size=(16, 16)).shape == (1, 16, 16, 3)
        bench_loader(url, image_sizes=[(16, 16)], threads=[1], micro_batch=2, seconds=0.05)
        assert "data 10 images from 20 members of 2 tar shards (10 left out: 10 .cls)" in capsys.readouterr().out
        joined = open_source([f"{server.url}/shard-00.tar", f"{server.url}/shard-01.tar"])
        assert images_of(joined) == images_of(source)
        assert len(fetched(server)) == 2, "all of these read the copies"

        # Another version is another copy; whoever has the first goes on with it.
        first = images_of(source)
        shutil.copy(shards / "shard-01.tar", shards / "shard-00.tar")
        assert images_of(open_source(url))[:5] == first[5:]
        assert images_of(source) == first
    (left,) = (cache / "shards").iterdir()
    assert len([name for name in os.listdir(left) if name.endswith(".tar")]) == 3
    assert not [name for name in os.listdir(left) if name.endswith(".part")]


def test_many_at_once_fetch_each_shard_once_and_no_half_copy_is_read(shards):
    with WebServer(shards) as server:
        url = f"{server.url}/shard-{{00..01}}.tar"
        server.fault = lambda method, path, part: time.sleep(0.05) if method == "GET" else None
        found = []
        threads = [threading.Thread(target=lambda: found.append(images_of(open_source(url)))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 4 and all(images == found[0] for images in found)
        assert len(fetched(server)) == 2
        # What a killed process left, and a copy that was cut.
        place = remote_cache._place(remote_files.describe(f"{server.url}/shard-00.tar"))
        content = place.read_bytes()
        place.write_bytes(content[:1000])
        place.with_name(f".{place.name}.part").write_bytes(content[:500] + b"rubbish")
        assert images_of(open_source(url)) == found[0] and place.read_bytes() == content


@pytest.mark.parametrize("ranges", [True, False])
def test_a_body_that_is_cut_is_continued_or_begun_again(shards, ranges):
    with WebServer(shards, ranges=ranges) as server:
        url = f"{server.url}/shard-00.tar"
        cuts = iter([-3000, -2000, -1])
        server.fault = lambda method, path, part: next(cuts, None) if method == "GET" and "tar" in path else None
        assert images_of(open_source(url)) == images_of_local(shards / "shard-00.tar")
        if ranges:
            # What came is kept, down to a single byte.
            assert [part for _, part in fetched(server)] == [None, "bytes=3000-", "bytes=5000-", "bytes=5001-"]
            faults = iter([-700, *[503] * 1000])
            server.fault = lambda method, path, part: next(faults) if method == "GET" else None
            with pytest.raises(StorageLost, match=r"shard-01.tar cannot be read: .*503"):
                open_source(f"{server.url}/shard-01.tar")


def images_of_local(shard: Path) -> list[bytes]:
    with tarfile.open(shard) as tar:
        return [tar.extractfile(member).read() for member in tar if member.name.endswith(".jpg")]


def test_a_body_that_is_always_cut_ends_in_one_line(shards, cache):
    with WebServer(shards, ranges=False) as server:
        cuts = itertools.cycle([-3000, -4000])
        server.fault = lambda method, path, part: next(cuts) if method == "GET" else None
        with pytest.raises(StorageLost, match="does not answer .*shard-00.tar cannot be read") as error:
            open_source(f"{server.url}/shard-00.tar")
        assert "\n" not in str(error.value)
    assert not list(cache.rglob("*.tar")), "nothing that could be taken for a copy"


def test_a_file_that_is_written_again_while_it_is_fetched_is_one_version(shards):
    with WebServer(shards) as server:
        url = f"{server.url}/shard-00.tar"

        def cut_and_change(method, path, part):
            if method == "GET" and len(fetched(server)) == 1:
                return -3000
            if method == "GET" and len(fetched(server)) == 2:
                shutil.copy(shards / "shard-01.tar", shards / "shard-00.tar")
            return None

        server.fault = cut_and_change
        assert images_of(open_source(url)) == images_of_local(shards / "shard-01.tar")
        assert [part for _, part in fetched(server)] == [None, "bytes=3000-", None]
        assert 412 in server.answered, "nothing of the new version was put behind the old one"

        def always(method, path, part):
            if method == "GET":
                with tarfile.open(shards / "shard-00.tar", "a") as tar:
                    add_member(tar, f"{time.monotonic_ns()}.jpg", b"x")

        server.fault = always
        (shards / "shard-00.tar").write_bytes((shards / "shard-01.tar").read_bytes() + bytes(512))
        with pytest.raises(UserError, match="is written again while it is read: wait until it is whole"):
            open_source(url)


def test_the_web_says_what_is_wrong_in_one_line(shards, monkeypatch):
    with WebServer(shards) as server:
        server.fault = lambda method, path, part: 403 if "01" in path else None
        for place, problem in (
            (
                f"{server.url}/shard-01.tar",
                r"shard-01.tar may not be read \(403\): give an address that needs no login",
            ),
            (f"{server.url}/shard-07.tar", r"shard-07.tar does not exist \(404\): check the address"),
            (
                f"{server.url}/folder",
                r"is no .tar, and the web has no folders: name the shards, http:.*folder/shard-.000..099",
            ),
            (f"{server.url}/shard-{{5..2}}.tar", "give a range that rises"),
            (f"{server.url}/shard-{{x}}.tar", r"has \{x\}: give \{000..127\} or \{a,b\}"),
        ):
            with pytest.raises(UserError, match=problem) as error:
                open_source(place)
            assert "\n" not in str(error.value)
        good = f"{server.url}/shard-00.tar"
        with monkeypatch.context() as patch:
            patch.setattr(remote_cache.shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(9, 9, 5000))
            with pytest.raises(UserError, match=r"the cache .* has 0.0 MiB free and the shards need .*: set MIRL"):
                open_source(good)
        with monkeypatch.context() as patch:
            patch.setenv("MIRL_CACHE", "/dev/null/cache")
            with pytest.raises(UserError, match="the cache /dev/null/cache/.* cannot be written .*set MIRL_CACHE"):
                open_source(good)
    with tarfile.open(shards / "two.tar", "w") as tar:
        for suffix in ("jpg", "png"):
            add_member(tar, f"a.{suffix}", b"x")
    with WebServer(shards) as server, pytest.raises(UserError, match=r"two.tar: .*choose the image.*make-index"):
        open_source(f"{server.url}/two.tar")

    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(containers.importlib, "import_module", missing)
    remote_files._open_system.cache_clear()
    for place, package in (("s3://a/b.tar", "s3fs"), ("http://a/b.tar", "aiohttp")):
        with pytest.raises(UserError, match=rf"places need {package} .*: pip install {package} \(in the extra remote"):
            open_source(place)


def test_braces_are_expanded_as_a_shell_does():
    assert expand_braces("s3://b/{a,b}-{08..10}.tar") == [
        f"s3://b/{word}-{number}.tar" for word in "ab" for number in ("08", "09", "10")
    ]
    assert expand_braces("http://x/{8..10}.tar") == [f"http://x/{number}.tar" for number in (8, 9, 10)]
