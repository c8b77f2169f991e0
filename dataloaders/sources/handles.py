"""Keep the open files of the whole process under one budget, which any number of shards and sources share."""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_MOST = 65536  # containers often have a limit of a billion, and some libraries loop up to the limit
TOO_MANY = (errno.EMFILE, errno.ENFILE)


@dataclass(slots=True)
class _Lent:
    handle: int
    users: int = 0
    dropped: bool = False


class HandlePool:
    """The pool keeps the files that were read last open, at most `budget` of them. It lends handles to many threads."""

    def __init__(self, budget: int | None = None) -> None:
        """Begin empty. budget: open files; default: a quarter of the process's limit when the first file is opened."""
        self._budget = budget
        self._files: OrderedDict[str, _Lent] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._files)

    @contextmanager
    def lend(self, path: str) -> Iterator[int]:
        """Lend a handle for reading; it stays open until the block ends. OSError if the file cannot be opened."""
        lent = self._take(path)
        try:
            yield lent.handle
        finally:
            with self._lock:
                lent.users -= 1
                if lent.dropped and not lent.users:
                    os.close(lent.handle)
                self._shrink(self._limit())

    def drop(self, path: str) -> None:
        """Close the file as soon as nobody reads it."""
        with self._lock:
            lent = self._files.pop(path, None)
            if lent is not None:
                lent.dropped = True
                if not lent.users:
                    os.close(lent.handle)

    def _take(self, path: str) -> _Lent:
        with self._lock:
            lent = self._files.get(path)
            if lent is not None:
                lent.users += 1
                self._files.move_to_end(path)
                return lent
            self._shrink(self._limit() - 1)
        handle = self._open(path)
        with self._lock:
            lent = self._files.get(path)
            if lent is None:
                lent = self._files[path] = _Lent(handle)
            else:  # another thread was faster
                os.close(handle)
            lent.users += 1
            return lent

    def _open(self, path: str) -> int:
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            if error.errno not in TOO_MANY:
                raise
            with self._lock:
                self._shrink(0)
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def _shrink(self, count: int) -> None:
        """Close files that nobody reads, oldest first, until `count` are open. The caller holds the lock."""
        if len(self._files) <= count:
            return
        for path, lent in list(self._files.items()):
            if not lent.users:
                del self._files[path]
                os.close(lent.handle)
                if len(self._files) <= count:
                    return

    def _limit(self) -> int:
        if self._budget is None:
            self._budget = max(4, raise_file_limit() // 4)
        return self._budget


def raise_file_limit() -> int:
    """Raise this process's soft limit of open files to its hard limit (at most 65536). Returns the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return _MOST
    wanted = _MOST if hard == resource.RLIM_INFINITY else min(hard, _MOST)
    if soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
        except (OSError, ValueError):  # some sandboxes forbid it; the old limit holds
            pass
    return min(soft, _MOST)


def mend_of_too_many() -> str:
    """Say what the user can do if no more files can be opened, although `raise_file_limit` has raised the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= _MOST:
        return "close other programs, or the system's limit is to be raised (sysctl fs.file-max)"
    if hard == resource.RLIM_INFINITY or soft < hard:
        return f"raise the limit of {soft} open files: ulimit -n {_MOST if hard == resource.RLIM_INFINITY else hard}"
    return (
        f"the limit of {hard} open files is a hard one (ulimit -Hn) and is raised from outside: in Docker by "
        f"--ulimit nofile={_MOST}, of a service by LimitNOFILE={_MOST}, in a batch system by its administrator"
    )


POOL = HandlePool()
