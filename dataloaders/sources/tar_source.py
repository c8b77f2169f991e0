"""Images inside WebDataset tar shards, each read by one positioned read with the help of the shard's index.

That an index belongs to its tar is checked twice: when the source is opened, at the first, middle and last sample and
at the end of the file; and at every read, which takes in the 512-byte tar header that stands before the data.
"""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mirl.dataloaders.errors import ImageError
from mirl.dataloaders.sources.listing import ARRAY_SUFFIXES, IMAGE_SUFFIXES
from mirl.dataloaders.sources.paths import PathTable
from mirl.dataloaders.sources.tar_index import BLOCK, Part, index_path, read_index
from mirl.errors import UserError

_EXTENSIONS = frozenset(suffix[1:] for suffix in IMAGE_SUFFIXES + ARRAY_SUFFIXES)


class TarSource:
    """All samples of some shards that have an image part; labels come from their `cls` parts."""

    def __init__(
        self,
        shards: Sequence[Path],
        *,
        index_dir: Path | None = None,
        labels: bool = False,
        skip: frozenset[str] = frozenset(),
    ) -> None:
        """skip: paths (shard.tar::member) to leave out.

        UserError if an index is missing, damaged or does not match its tar, or if no sample has an image.
        """
        self.shards = [os.fspath(shard) for shard in shards]
        self.classes: list[str] | None = None
        self._handles: dict[int, int] = {}
        self._lock = threading.Lock()
        # A quarter of the process's file handles; shards beyond that are opened for each read.
        self._max_handles = max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)

        sizes: list[int] = []
        label_parts: list[tuple[int, int]] = []
        offsets: list[int] = []
        counts: list[int] = []

        def names() -> Iterator[str]:
            for number, shard in enumerate(shards):
                before = len(offsets)
                for parts in read_index(index_path(shard, index_dir)):
                    image = next((part for part in parts if part.extension.split(".")[-1] in _EXTENSIONS), None)
                    if image is None or (skip and f"{self.shards[number]}::{image.name}" in skip):
                        continue
                    offsets.append(image.offset)
                    sizes.append(image.size)
                    if labels:
                        label_parts.append(_label_part(parts, self.shards[number]))
                    yield image.name
                counts.append(len(offsets) - before)

        self._names = PathTable("", names())
        self.num_images = len(self._names)
        self._offsets, self._sizes = np.asarray(offsets, np.int64), np.asarray(sizes, np.int64)
        self._label_parts = np.asarray(label_parts, np.int64).reshape(-1, 2) if labels else None
        self._first = np.cumsum([0, *counts])
        if not self.num_images:
            known = ", ".join(sorted(_EXTENSIONS))
            raise UserError(f"no sample of {self.shards[0]} (or {len(shards) - 1} more shards) has an image: {known}")
        self._check()

    def path(self, index: int) -> str:
        return f"{self.shards[self._shard(index)]}::{self._names.name(index)}"

    def read(self, index: int) -> bytes:
        shard, offset, size = self._shard(index), int(self._offsets[index]), int(self._sizes[index])
        try:
            block = self._pread(shard, offset - BLOCK, size + BLOCK)
        except OSError as error:
            raise ImageError(f"the tar cannot be read: {error.strerror}") from error
        if len(block) < size + BLOCK:
            raise ImageError("the tar ends before this sample does; it was cut after its index was made")
        if not _header_matches(block[:BLOCK], self._names.raw(index), size):
            raise ImageError("the index does not match the tar; make it again with: mirl make-index --force")
        return block[BLOCK:]

    def label(self, index: int) -> int:
        if self._label_parts is None:
            raise ValueError("this data set was opened without labels; open it with labels=True")
        offset, size = self._label_parts[index]
        text = self._pread(self._shard(index), int(offset), int(size))
        try:
            return int(text)
        except ValueError:
            raise ImageError(f"its cls part is {text[:20]!r}, not a class number") from None

    def fingerprint(self) -> str:
        return self._names.digest()

    def close(self) -> None:
        with self._lock:
            for handle in self._handles.values():
                os.close(handle)
            self._handles.clear()

    def _shard(self, index: int) -> int:
        return int(np.searchsorted(self._first, index, side="right")) - 1

    def _pread(self, shard: int, offset: int, size: int) -> bytes:
        handle = self._handles.get(shard)
        if handle is not None:
            return os.pread(handle, size, offset)
        handle = os.open(self.shards[shard], os.O_RDONLY)
        try:
            return os.pread(handle, size, offset)
        finally:
            with self._lock:
                if shard in self._handles or len(self._handles) >= self._max_handles:
                    os.close(handle)
                else:
                    self._handles[shard] = handle

    def _check(self) -> None:
        for number, shard in enumerate(self.shards):
            first, end = int(self._first[number]), int(self._first[number + 1])
            for index in sorted({first, (first + end) // 2, end - 1}) if end > first else ():
                try:
                    self.read(index)
                except ImageError:
                    raise UserError(
                        f"index of {shard} does not match the tar at sample {self._names.name(index)} "
                        f"(the tar was cut, or written again after the index); check the tar, "
                        f"then run: mirl make-index --force {shard}"
                    ) from None


def _label_part(parts: list[Part], shard: str) -> tuple[int, int]:
    for part in parts:
        if part.extension == "cls":
            return part.offset, part.size
    raise UserError(f"labels were asked for, but sample {parts[0].name} of {shard} has no cls part")


def _header_matches(header: bytes, name: bytes, size: int) -> bool:
    """Whether a tar header is that of member `name` with `size` bytes of data.

    Long names are kept elsewhere and the header holds their beginning (GNU, pax) or their end (ustar prefix).
    """
    short = header[:100].rstrip(b"\0")
    if header[257:262] != b"ustar" or not short or not (name.startswith(short) or name.endswith(short)):
        return False
    field = header[124:136]
    if field[0] & 0x80:  # base-256 size of a member above 8 GiB
        return int.from_bytes(field[1:], "big") == size
    digits = field.rstrip(b"\0 ").lstrip(b" ")
    return digits.isdigit() and int(digits, 8) == size


def read_member(shard: Path, member: str, index_dir: Path | None = None) -> bytes:
    """One member of an indexed shard by name; ImageError if it is not there."""
    source = TarSource([shard], index_dir=index_dir)
    try:
        for index in range(source.num_images):
            if source._names.name(index) == member:
                return source.read(index)
        raise ImageError("the shard has no such member")
    finally:
        source.close()
