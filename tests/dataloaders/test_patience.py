"""A file system that fails for a moment costs time and no image; one that fails for long is told from a bad file."""

from __future__ import annotations

import errno
import os
import tarfile
import threading
import time

import pytest

from mirl.dataloaders import StorageLost, build_train_loader, open_source
from mirl.dataloaders.errors import StorageError
from mirl.dataloaders.sources import patience
from mirl.dataloaders.sources.tar_index import make_index
from mirl.dataloaders.tools.validate import validate_data
from tests.support.tars import add_member

SIZE = (32, 32)


class Flaky:
    """os.open, os.read and os.pread of images and shards, with faults that a test switches on."""

    def __init__(self, monkeypatch) -> None:
        self.fails = lambda path: False  # a read of `path` fails with EIO
        self.stale: set[int] = set()
        self.tries = 0
        self._paths: dict[int, str] = {}
        self._real = {name: getattr(os, name) for name in ("open", "read", "pread", "close")}
        for name in self._real:
            monkeypatch.setattr(os, name, getattr(self, f"_{name}"))

    def make_stale(self) -> None:
        """Every handle that is open is stale for ever; a new one is good."""
        self.stale = set(self._paths)

    def _open(self, path, *arguments, **options):
        handle = self._real["open"](path, *arguments, **options)
        if str(path).endswith((".jpg", ".tar")):
            self._paths[handle] = str(path)
            self.stale.discard(handle)
        return handle

    def _close(self, handle):
        self._paths.pop(handle, None)
        return self._real["close"](handle)

    def _read(self, handle, *arguments):
        self._fault(handle)
        return self._real["read"](handle, *arguments)

    def _pread(self, handle, *arguments):
        self._fault(handle)
        return self._real["pread"](handle, *arguments)

    def _fault(self, handle: int) -> None:
        if handle not in self._paths:
            return
        self.tries += 1
        if handle in self.stale:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        if self.fails(self._paths[handle]):
            raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.fixture
def flaky(monkeypatch) -> Flaky:
    monkeypatch.setattr(patience, "_outage", patience._Outage())
    monkeypatch.setattr(patience, "_FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(patience, "PATIENCE_S", 0.5)
    return Flaky(monkeypatch)


def load(data, steps: int, **options):
    settings = {"image_size": SIZE, "micro_batch": 4, "seed": 1, "threads": 1, "bad_image_limit": 1.0}
    with build_train_loader(data, **(settings | options)) as loader:
        batches = [loader.next_micro_batch() for _ in range(steps)]
        return [batch.images.numpy().tobytes() for batch in batches], loader.bad_images


def test_a_moment_of_eio_costs_no_image(jpeg_folder, flaky, caplog):
    folder = jpeg_folder(16)
    wanted, _ = load(folder, 8)
    began = time.monotonic()
    flaky.fails = lambda path: 0.1 < time.monotonic() - began < 0.3 or flaky.tries in range(20, 24)
    flaky.tries = 0
    while time.monotonic() - began < 0.12:
        time.sleep(0.01)
    found, bad = load(folder, 8)
    assert found == wanted and bad == []
    assert "cannot be read (Input/output error): trying again for" in caplog.text


def test_stale_handles_are_opened_again(jpeg_folder, flaky):
    folder = jpeg_folder(16)
    with tarfile.open(folder / "all.tar", "w") as shard:
        for path in sorted(folder.glob("*.jpg")):
            add_member(shard, path.name, path.read_bytes())
    make_index(folder / "all.tar", progress=False)
    source = open_source(folder / "all.tar")
    wanted = [source.read(index) for index in range(source.num_images)]
    flaky.make_stale()
    assert [source.read(index) for index in range(source.num_images)] == wanted
    # Read from many threads at once, while handles are dropped again and again.
    wrong = []

    def reader() -> None:
        for _ in range(20):
            wrong.extend(index for index in range(source.num_images) if source.read(index) != wanted[index])

    threads = [threading.Thread(target=reader) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        flaky.make_stale()
        time.sleep(0.005)
    for thread in threads:
        thread.join()
    assert not wrong
    source.close()
    assert not flaky._paths, "every handle was closed"


def test_a_file_with_a_bad_sector_is_one_broken_image_and_waited_for_once(jpeg_folder, flaky):
    folder = jpeg_folder(16)
    bad_path = str(sorted(folder.rglob("*.jpg"))[3])
    flaky.fails = lambda path: path == bad_path
    began = time.monotonic()
    _, bad = load(folder, 12)  # three epochs
    assert [image.path for image in bad] == [bad_path]
    assert bad[0].reason == "cannot be read: Input/output error"
    assert time.monotonic() - began < 5 * patience.PATIENCE_S


def test_a_share_that_does_not_come_back_is_no_broken_image(jpeg_folder, flaky):
    folder = jpeg_folder(16)
    settings = {"image_size": SIZE, "micro_batch": 4, "seed": 1, "threads": 1, "bad_image_limit": 1.0}
    with build_train_loader(folder, **settings) as loader:
        loader.next_micro_batch()
        flaky.fails = lambda path: True
        began = time.monotonic()
        with pytest.raises(StorageLost, match="does not answer .*Input/output error, nor can 3 other images"):
            for _ in range(10):
                loader.next_micro_batch()
        assert time.monotonic() - began < 6 * patience.PATIENCE_S, (
            "the patience is that of the outage, not of each file"
        )
        assert loader.bad_images == []
    with pytest.raises(StorageLost):
        build_train_loader(folder, **settings)
    with pytest.raises(StorageLost):
        validate_data(folder, progress=False)
    assert not (folder / "mirl-manifest.tsv").exists()


def test_what_is_no_fault_of_a_moment_is_not_waited_for(jpeg_folder, flaky):
    def read() -> bytes:
        raise PermissionError(errno.EACCES, "no")

    began = time.monotonic()
    with pytest.raises(PermissionError):
        patience.patiently(read, "x")
    with pytest.raises(StorageError):
        patience.patiently(lambda: (_ for _ in ()).throw(OSError(errno.EIO, "io")), "y")
    assert patience.PATIENCE_S < time.monotonic() - began < 4 * patience.PATIENCE_S
