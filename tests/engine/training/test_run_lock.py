"""One run, one folder: a live run is not joined by a second, and one that is gone does not keep its folder."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from mirl.engine.training import run_lock
from mirl.engine.training.folder_probe import probe_folder
from mirl.engine.training.run_lock import Holder, RunLock
from mirl.errors import UserError


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT_S", 0.05)
    monkeypatch.setattr(run_lock, "WATCH_S", 0.5)


def lock_of(out: Path, **changes: object) -> Holder:
    """A lock in ``out`` like this process's own, with other fields."""
    holder = dataclasses.replace(Holder.of_this_process(), **changes)
    out.mkdir(exist_ok=True)
    (out / run_lock.NAME).write_bytes(holder.to_bytes())
    return holder


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert not psutil.pid_exists(process.pid)
    return process.pid


def test_a_live_run_is_named_and_its_lock_untouched(tmp_path):
    first = RunLock(tmp_path)
    assert first.acquire() == []
    before = (tmp_path / run_lock.NAME).read_bytes()
    with pytest.raises(UserError) as refused:
        RunLock(tmp_path).acquire()
    assert f"process {os.getpid()} on {os.uname().nodename}, started 20" in str(refused.value)
    assert "give another --out" in str(refused.value)
    assert (tmp_path / run_lock.NAME).read_bytes() == before
    first.release()
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_dead_process_of_this_host_is_taken_over_at_once(tmp_path):
    holder = lock_of(tmp_path, process=dead_process())
    lock = RunLock(tmp_path)
    began = time.monotonic()
    (line,) = lock.acquire()
    assert time.monotonic() - began < 2
    assert f"process {holder.process} on {holder.host}" in line and "gone" in line
    assert Holder.read(lock.path).process == os.getpid()
    lock.release()


def test_a_number_that_is_another_process_by_now_and_a_zombie_are_gone(tmp_path):
    lock_of(tmp_path, born=1.0)
    lock = RunLock(tmp_path)
    assert len(lock.acquire()) == 1
    lock.release()
    zombie = subprocess.Popen([sys.executable, "-c", ""])
    while psutil.Process(zombie.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert dataclasses.replace(Holder.of_this_process(), process=zombie.pid, born=run_lock._born(zombie.pid)).is_gone()
    zombie.wait()


def test_a_run_on_another_host_is_known_by_its_beat(tmp_path, fast, caplog):
    holder = lock_of(tmp_path, machine="elsewhere", host="node7", process=1)
    lock = RunLock(tmp_path)
    began = time.monotonic()
    (line,) = lock.acquire()
    assert 0.4 < time.monotonic() - began < 5 and "process 1 on node7" in line
    assert f"is held by {holder}: watching for" in caplog.text
    lock.release()

    holder = lock_of(tmp_path, machine="elsewhere", host="node7", process=1)
    path, ended = tmp_path / run_lock.NAME, threading.Event()

    def live() -> None:
        count = 0
        while not ended.wait(0.05):
            count += 1
            path.write_bytes(dataclasses.replace(holder, beat=f"{count:012d}").to_bytes())

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(UserError, match="process 1 on node7"):
            RunLock(tmp_path).acquire()
    finally:
        ended.set()
        thread.join()


def test_the_beat_moves_and_keeps_its_length(tmp_path, fast):
    lock = RunLock(tmp_path)
    lock.acquire()
    first = lock.path.read_bytes()
    deadline = time.monotonic() + 5
    while lock.path.read_bytes() == first:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    later = lock.path.read_bytes()
    assert len(later) == len(first) and json.loads(later)["beat"] > json.loads(first)["beat"]
    lock.path.unlink()  # by hand: it comes again
    while not lock.path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    lock.release()
    assert not lock.path.exists()


def test_a_run_whose_folder_was_taken_over_learns_it_and_leaves_the_new_lock(tmp_path, fast):
    lock = RunLock(tmp_path)
    lock.acquire()
    taker = lock_of(tmp_path, token="f" * 16)
    deadline = time.monotonic() + 5
    while not lock.lost:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    lock.release()
    assert Holder.read(lock.path) == taker


def test_of_many_starts_at_once_over_a_stale_lock_one_wins(tmp_path):
    lock_of(tmp_path, process=dead_process())
    locks, results = [RunLock(tmp_path) for _ in range(8)], []

    def start(lock: RunLock) -> None:
        try:
            results.append(lock.acquire())
        except UserError as error:
            results.append(str(error))

    threads = [threading.Thread(target=start, args=(lock,)) for lock in locks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8 and sum(isinstance(result, list) for result in results) == 1, results
    for lock in locks:
        lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_start_that_judged_an_older_lock_lets_nobody_in_beside_the_newer_one(tmp_path, monkeypatch):
    """The second start is held up between the two system calls in which it learns that the first was faster."""
    old = lock_of(tmp_path, process=dead_process()).to_bytes()
    first, second, third = (RunLock(tmp_path) for _ in range(3))
    first.acquire()
    real, renamed = os.rename, threading.Event()

    def slowly(*names) -> None:
        real(*names)
        renamed.set()
        time.sleep(0.2)

    monkeypatch.setattr(os, "rename", slowly)
    holding_up = threading.Thread(target=second._remove_stale, args=(old,))
    holding_up.start()
    renamed.wait()
    with pytest.raises(UserError, match="is training"):
        third.acquire()
    holding_up.join()
    first.release()
    assert list(tmp_path.iterdir()) == []


def test_a_refused_start_leaves_no_folder_that_it_made(tmp_path):
    (tmp_path / "kept").mkdir()
    lock = RunLock(tmp_path / "kept" / "a" / "b")
    lock.make_folder()
    lock.acquire()
    lock.release()
    assert (tmp_path / "kept").is_dir() and list((tmp_path / "kept").iterdir()) == []


def failing(name: str, number: int, only_folders: bool = False):
    real = getattr(os, name)

    def call(target, *arguments, **options):
        if only_folders and not os.path.isdir(f"/proc/self/fd/{target}"):
            return real(target, *arguments, **options)
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize(
    ("name", "number", "words"),
    [
        ("fsync", errno.EIO, "a file cannot be synced to the disk"),
        ("replace", errno.ENOTSUP, "a file cannot be renamed onto another"),
        ("unlink", errno.EPERM, "a file cannot be removed"),
        ("mkdir", errno.EROFS, "a folder cannot be made"),
    ],
)
def test_a_folder_that_cannot_hold_checkpoints_is_refused_in_one_line(name, number, words, tmp_path, monkeypatch):
    monkeypatch.setattr(os, name, failing(name, number))
    with pytest.raises(UserError) as refused:
        probe_folder(tmp_path)
    monkeypatch.undo()
    assert f"out is {tmp_path}, where {words}: [Errno {number}]" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_probe_leaves_nothing_and_does_without_a_sync_of_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", failing("fsync", errno.EINVAL, only_folders=True))
    probe_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []
