"""The tools on mounts that lack what a local disk has: no chmod (S3, CIFS, NTFS), no sync of a folder (FUSE)."""

from __future__ import annotations

import errno
import os
import stat

import pytest

from mirl.dataloaders import open_source
from mirl.dataloaders.sources.tar_index import make_index
from mirl.dataloaders.tools.prepare import prepare_data
from mirl.dataloaders.tools.validate import validate_data


@pytest.fixture
def refused(monkeypatch) -> list[str]:
    """The calls that were refused."""
    calls: list[str] = []
    sync = os.fsync

    def refuse_mode(*arguments: object, **options: object) -> None:
        calls.append("chmod")
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    def refuse_sync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            calls.append("fsync")
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        sync(handle)

    monkeypatch.setattr(os, "chmod", refuse_mode)
    monkeypatch.setattr(os, "fchmod", refuse_mode)
    monkeypatch.setattr(os, "fsync", refuse_sync)
    return calls


def test_every_tool_writes_its_files(refused, jpeg_folder, tmp_path):
    folder = jpeg_folder(5)
    assert validate_data(folder, progress=False).manifest.is_file()
    for size in (None, 2):
        copy = tmp_path / f"copy-{size}"
        report = prepare_data(folder, copy, short_side=32, shard_size=size, workers=1, progress=False)
        assert report.written == 5
        if size is not None:
            make_index(copy, force=True, progress=False)
        source = open_source(copy)
        assert source.num_images == 5 and all(source.read(index) for index in range(5))
        source.close()
    assert "chmod" in refused
