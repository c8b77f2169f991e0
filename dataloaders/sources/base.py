"""Define `Source`, a data set as a numbered list of encoded images, and its forms for loose files, parts and subsets.

A source knows names, labels and bytes, nothing of pixels. `open_source` in dataloaders/sources/opening.py makes one
from what the user names; tar shards are in dataloaders/sources/tar_source.py.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from mirl.dataloaders.errors import ImageError
from mirl.dataloaders.sources.ledger import Ledger, join_ledgers
from mirl.dataloaders.sources.paths import PathTable
from mirl.dataloaders.sources.patience import patiently


class Source(Protocol):
    """A source has num_images items numbered from 0, in one order on every machine. Many threads may read it."""

    num_images: int
    classes: list[str] | None
    ledger: Ledger

    def path(self, index: int) -> str:
        """Return the place of the image, for messages: a file path, or shard.tar::member."""

    def read(self, index: int) -> bytes:
        """Read the encoded image. ImageError (without the path) if it cannot be had."""

    def label(self, index: int) -> int:
        """Return the class number. ValueError if the source was opened without labels."""

    def fingerprint(self) -> str:
        """Return a hex digest of all names in order."""

    def close(self) -> None:
        """Release file handles."""


class FileSource:
    """This source has loose files below one root (or with absolute names)."""

    def __init__(
        self,
        paths: PathTable,
        *,
        labels: Sequence[int] | np.ndarray | None = None,
        classes: list[str] | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        """Keep the paths. ledger: counts what else was found; default: nothing. Its count of images is set here."""
        self.paths, self.classes = paths, classes
        self.ledger = ledger or Ledger()
        self.num_images = self.ledger.images = len(paths)
        self._labels = None if labels is None else np.asarray(labels, dtype=np.int32)

    def path(self, index: int) -> str:
        return self.paths[index]

    def read(self, index: int) -> bytes:
        return read_whole_file(self.paths[index])

    def label(self, index: int) -> int:
        if self._labels is None:
            raise ValueError("this data set was opened without labels; open it with labels=True")
        return int(self._labels[index])

    def fingerprint(self) -> str:
        return self.paths.digest()

    def close(self) -> None:
        """Do nothing: no file is held open."""


class JoinedSource:
    """This source joins several, numbered one after the other. Its classes are the sorted union of theirs."""

    def __init__(self, parts: Sequence[Source]) -> None:
        self.parts = list(parts)
        self._first = np.cumsum([0, *(part.num_images for part in self.parts)])
        self.num_images = int(self._first[-1])
        self.ledger = join_ledgers(part.ledger for part in self.parts)
        self.classes: list[str] | None = None
        self._relabel: list[list[int]] | None = None
        if all(part.classes is not None for part in self.parts):
            self.classes = sorted({name for part in self.parts for name in part.classes or []})
            number = {name: label for label, name in enumerate(self.classes)}
            self._relabel = [[number[name] for name in part.classes or []] for part in self.parts]

    def _locate(self, index: int) -> tuple[int, int]:
        part = int(np.searchsorted(self._first, index, side="right")) - 1
        return part, index - int(self._first[part])

    def path(self, index: int) -> str:
        part, local = self._locate(index)
        return self.parts[part].path(local)

    def read(self, index: int) -> bytes:
        part, local = self._locate(index)
        return self.parts[part].read(local)

    def label(self, index: int) -> int:
        part, local = self._locate(index)
        label = self.parts[part].label(local)
        return self._relabel[part][label] if self._relabel is not None else label

    def fingerprint(self) -> str:
        joined = "/".join(part.fingerprint() for part in self.parts)
        return hashlib.blake2b(joined.encode(), digest_size=8).hexdigest()

    def close(self) -> None:
        for part in self.parts:
            part.close()


def read_whole_file(path: str) -> bytes:
    """Read the bytes of a file in as few system calls as possible. ImageError names the cause.

    A file system that fails for a moment is tried again.
    """
    try:
        return patiently(lambda: _read_once(path), path)
    except OSError as error:
        known = {errno.ENOENT: "the file no longer exists", errno.EACCES: "permission denied"}
        raise ImageError(known.get(error.errno or 0, f"cannot be read: {error.strerror}")) from error


def _read_once(path: str) -> bytes:
    handle = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(handle).st_size
        data = os.read(handle, size)
        while len(data) < size:  # a read may stop early on network file systems
            more = os.read(handle, size - len(data))
            if not more:
                raise ImageError(f"the file ended after {len(data)} of {size} bytes")
            data += more
        return data
    finally:
        os.close(handle)


class SubsetSource:
    """This source has some items of another source, numbered anew in the order of ``indices``."""

    def __init__(self, source: Source, indices: Sequence[int]) -> None:
        self.source, self.indices = source, list(indices)
        self.classes, self.num_images = source.classes, len(self.indices)
        self.ledger = join_ledgers([source.ledger])
        self.ledger.notes.append(f"{self.num_images} of them are used")

    def path(self, index: int) -> str:
        return self.source.path(self.indices[index])

    def read(self, index: int) -> bytes:
        return self.source.read(self.indices[index])

    def label(self, index: int) -> int:
        return self.source.label(self.indices[index])

    def fingerprint(self) -> str:
        numbers = ",".join(map(str, self.indices))
        return hashlib.sha256(f"{self.source.fingerprint()} {numbers}".encode()).hexdigest()

    def close(self) -> None:
        self.source.close()
