"""A file system that fails for a moment while images are being found costs none of them, in any form of a data set."""

from __future__ import annotations

import errno
import io
import os
import tarfile
from pathlib import Path

import pytest

from mirl.dataloaders import StorageLost, open_source
from mirl.dataloaders.sources import kinds, listing, patience, tar_index
from mirl.dataloaders.sources.tar_index import make_index
from mirl.dataloaders.tools.validate import validate_data
from mirl.errors import UserError
from tests.support.tars import add_member

FORMS = ("folder", "linked folder", "no suffix", "list", "manifest", "shards", "shard with classes")


class FailingTimes:
    """Reads of names and of small files; each place below a folder fails its first `times` times."""

    def __init__(self, monkeypatch, code: int) -> None:
        self.code, self.times, self.failed = code, 0, {}
        self._only = None
        for owner, name in (
            (os, "scandir"), (kinds, "read_head"), (Path, "read_bytes"), (Path, "is_file"), (tar_index.tarfile, "open"),
            (io, "open"),
        ):  # fmt: skip
            monkeypatch.setattr(owner, name, self._failing(getattr(owner, name)), raising=True)

    def _failing(self, real):
        def call(path=".", *arguments, **options):
            place = os.fspath(path) if isinstance(path, str | os.PathLike) else ""
            if place and self.times and (self._only is None or place == self._only):
                key = (real, place)
                self.failed[key] = self.failed.get(key, 0) + 1
                if self.failed[key] <= self.times:
                    raise OSError(self.code, os.strerror(self.code), place)
            return real(path, *arguments, **options)

        return call

    def only(self, path: Path, times: int) -> None:
        self._only, self.times = os.fspath(path), times


@pytest.fixture(params=[errno.EIO, errno.ESTALE], ids=["EIO", "ESTALE"])
def failing(request, monkeypatch) -> FailingTimes:
    monkeypatch.setattr(patience, "_outage", patience._Outage())
    monkeypatch.setattr(patience, "_FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(patience, "_LONGEST_WAIT_S", 0.01)
    monkeypatch.setattr(patience, "PATIENCE_S", 20.0)
    return FailingTimes(monkeypatch, request.param)


def make(form: str, jpeg_folder, tmp_path: Path) -> tuple[Path, bool]:
    """(the data set of six images, whether it has labels)"""
    folder = jpeg_folder(6, name="root/a")
    root = folder.parent
    names = sorted(folder.iterdir())
    if form == "no suffix":
        for path in names:
            path.rename(path.with_suffix(""))
    elif form == "linked folder":
        root = tmp_path / "links"
        root.mkdir()
        (root / "a").symlink_to(folder)
    elif form == "list":
        root = tmp_path / "list.txt"
        root.write_text("".join(f"{path}\t{number}\n" for number, path in enumerate(names)))
        return root, True
    elif form == "manifest":
        validate_data(root, progress=False)
        root = root / "mirl-manifest.tsv"
    elif form.startswith("shard"):
        root = tmp_path / "shards"
        root.mkdir()
        with tarfile.open(root / "x.tar", "w") as shard:
            for number, path in enumerate(names):
                add_member(shard, path.name, path.read_bytes())
                add_member(shard, f"{path.stem}.cls", str(number % 2).encode())
        make_index(root, progress=False)
        if form == "shard with classes":
            (root / "classes.txt").write_text("ant\nbee\n")
    return root, form not in ("no suffix", "manifest")


@pytest.mark.parametrize("form", FORMS)
def test_a_moment_while_images_are_found_costs_none(form, jpeg_folder, tmp_path, failing):
    data, labels = make(form, jpeg_folder, tmp_path)
    with_faults = []
    for times in (0, 2):
        failing.times = times
        source = open_source(data, labels=labels)
        facts = [source.path(index) for index in range(source.num_images)], source.classes, str(source.ledger)
        with_faults.append((facts, [source.label(index) for index in range(6)] if labels else None))
        source.close()
    assert failing.failed, "no read failed: the test proves nothing"
    assert with_faults[0] == with_faults[1]
    assert len(with_faults[0][0][0]) == 6


def test_an_index_is_made_through_a_moments_fault(jpeg_folder, tmp_path, failing):
    data, _ = make("shards", jpeg_folder, tmp_path)
    whole = (data / "x.idx").read_bytes()
    failing.times = 2
    make_index(data, force=True, progress=False)
    failing.times = 0
    assert failing.failed and (data / "x.idx").read_bytes() == whole


def test_one_file_that_goes_on_failing_is_left_out_and_counted(jpeg_folder, tmp_path, failing, monkeypatch):
    monkeypatch.setattr(patience, "PATIENCE_S", 0.05)
    data, _ = make("no suffix", jpeg_folder, tmp_path)
    failing.only(data / "a" / "003", 10**6)
    ledger = listing.find_files(data).ledger
    assert ledger.images == 5
    assert str(ledger).endswith(f"1 unreachable ({os.strerror(failing.code)}))")


@pytest.mark.parametrize("form", ["folder", "list", "manifest", "shards"])
def test_a_file_system_that_stays_away_is_no_fault_of_the_data(form, jpeg_folder, tmp_path, failing, monkeypatch):
    data, labels = make(form, jpeg_folder, tmp_path)
    monkeypatch.setattr(patience, "PATIENCE_S", 0.05)
    failing.times = 10**6
    with pytest.raises(StorageLost, match="the file system of the data does not answer"):
        open_source(data, labels=labels)


def test_other_faults_are_not_waited_for(jpeg_folder, tmp_path, monkeypatch):
    folder = jpeg_folder(3)
    listed = tmp_path / "list.txt"
    listed.write_text("photos/000.jpg\n")
    monkeypatch.setattr(patience, "PATIENCE_S", 1e6)
    monkeypatch.setattr(os, "scandir", lambda path: (_ for _ in ()).throw(PermissionError(errno.EACCES, "no", path)))
    with pytest.raises(UserError, match="permission denied"):
        open_source(folder)
