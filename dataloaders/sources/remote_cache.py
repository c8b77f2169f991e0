"""Copy remote files to this machine: a copy is whole or absent, and each version has a name of its own.

A copy is called NAME-VERSION. VERSION is made of the file's tag (`RemoteFile`) and size, so that a file that is written
again on the server is another copy, and a run that is under way keeps the copy that it began with. The process that
holds the copy's lock writes it under a hidden name, and renames it when its size is right and the server still tells of
the same version. Other processes that want the copy wait, and find it. Nothing is deleted: the ledger says how much
room the copies take, and the folder may be removed whenever no run uses it.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from mirl.dataloaders.sources.handles import POOL
from mirl.dataloaders.sources.paths import default_cache_dir, shown
from mirl.dataloaders.sources.patience import find_patiently
from mirl.dataloaders.sources.remote_files import Changed, Download, RemoteFile, describe
from mirl.errors import UserError

_AT_ONCE = 8
_VERSIONS = 3  # a file that shows more versions while it is fetched is refused
_POLL_S, _SAID_AFTER_S = 0.1, 10.0
_log = logging.getLogger(__name__)


def copies_of(files: Sequence[RemoteFile]) -> list[Path]:
    """Return whole copies of the files, in their order. Those that are missing are fetched, several at once.

    UserError if the folder cannot be written or has no room; StorageLost if the server does not answer for longer than
    the patience of a file system.
    """
    missing = [file for file in files if not _is_whole(_place(file), file)]
    if missing:
        need = sum(file.size for file in missing)
        _require_room(_place(missing[0]).parent, need)
        count = f"{len(missing)} file{'s' if len(missing) > 1 else ''}"
        _log.warning("fetching %s, %s, from %s", count, gib(need), shown(missing[0].url.rpartition("/")[0]))
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="mirl-fetch") as pool:
        return list(pool.map(_copy_of, files))


def described(urls: Sequence[str]) -> list[RemoteFile]:
    """Ask the server to describe each file, several at once."""
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="mirl-fetch") as pool:
        return list(pool.map(lambda url: find_patiently(partial(describe, url), shown(url)), urls))


def gib(size: int) -> str:
    """Write a number of bytes for people."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"


def folder_of(url: str) -> Path:
    """Return the folder with the copies of the files of one remote folder."""
    folder = url.partition("?")[0].rpartition("/")[0]
    return default_cache_dir() / "shards" / hashlib.blake2b(folder.encode(), digest_size=8).hexdigest()


def _place(file: RemoteFile) -> Path:
    stem, suffix = os.path.splitext(file.name)
    version = hashlib.blake2b(f"{file.tag} {file.size}".encode(), digest_size=6).hexdigest()
    return folder_of(file.url) / f"{stem}-{version}{suffix}"


def _is_whole(place: Path, file: RemoteFile) -> bool:
    try:
        return place.stat().st_size == file.size
    except OSError:  # if the folder is at fault, writing to it will say so
        return False


def _copy_of(file: RemoteFile) -> Path:
    for _ in range(_VERSIONS):
        place = _place(file)
        if _is_whole(place, file):
            return place
        with _locked(place):
            if _is_whole(place, file):  # the process that had the lock has fetched it
                return place
            try:
                _fetch(file, place)
                return place
            except Changed:
                file = find_patiently(partial(describe, file.url), shown(file.url))
    raise UserError(f"{shown(file.url)} is written again while it is read: wait until it is whole")


def _fetch(file: RemoteFile, place: Path) -> None:
    """Write the copy; the caller holds its lock. `Changed` if the server has another version now."""
    part = place.with_name(f".{place.name}.part")
    with open(part, "wb") as target:
        download = Download(file, target)
        while target.tell() < file.size:
            find_patiently(download.more, shown(file.url))
        target.flush()
        os.fsync(target.fileno())
    now = find_patiently(partial(describe, file.url), shown(file.url))
    if (now.tag, now.size) != (file.tag, file.size) or part.stat().st_size != file.size:
        part.unlink()
        raise Changed
    os.replace(part, place)
    POOL.drop(os.fspath(place))  # a damaged copy that was fetched again may still be open


@contextmanager
def _locked(place: Path) -> Iterator[None]:
    """Hold the lock of the file `place`, alone among all processes."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(place.with_name(f".{place.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UserError(
            f"the cache {shown(place.parent)} cannot be written ({error.strerror}): set MIRL_CACHE to one that can"
        ) from None
    try:
        since, said = time.monotonic(), False
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not said and time.monotonic() - since > _SAID_AFTER_S:
                    _log.warning("waiting for another process, which fetches %s", shown(place.name))
                    said = True
                time.sleep(_POLL_S)
        yield
    finally:
        os.close(handle)


def _require_room(folder: Path, need: int) -> None:
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    free = shutil.disk_usage(there).free
    if need > free:
        raise UserError(
            f"the cache {shown(default_cache_dir())} has {gib(free)} free and the shards need {gib(need)}: set "
            "MIRL_CACHE to a folder with room"
        )
