"""Iterate over a tar's members in their order, also behind an end mark: `cat a.tar b.tar > c.tar` holds two tars."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from mirl.dataloaders.sources.tar_header import BLOCK, is_header

_CHUNK = 2**20


class TarMembers:
    """It iterates over the headers from byte `start` on. Then `whole` says whether the last tar has its end mark.

    tarfile.TarError, or ValueError of a damaged sparse header, if the file is cut, damaged or no tar.
    """

    def __init__(self, shard: Path, start: int = 0) -> None:
        self.shard, self.start, self.whole = shard, start, False

    def __iter__(self) -> Iterator[tarfile.TarInfo]:
        start: int | None = self.start
        with open(self.shard, "rb") as file:
            while start is not None:
                file.seek(start)
                # Names are bytes to us: pax headers are UTF-8 by their standard, others whatever the writer's disk had.
                with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
                    while (member := tar.next()) is not None:
                        tar.members.clear()  # tarfile remembers every member; a shard can have millions
                        yield member
                    end = tar.offset
                file.seek(end)
                self.whole = file.read(BLOCK) == bytes(BLOCK)
                # Without a mark tarfile has met the end of the file, or a block that is no header.
                start = _next_block(file, end) if self.whole else None
                if start is not None:
                    file.seek(start)
                    if not (len(head := file.read(BLOCK)) == BLOCK and is_header(head)):
                        raise tarfile.ReadError(f"what stands behind its end mark, from byte {start} on, is no tar")


def _next_block(file: IO[bytes], start: int) -> int | None:
    """Return the first block from `start` on that is not of zeros; None if all are."""
    file.seek(start)
    while chunk := file.read(_CHUNK):
        zeros = len(chunk) - len(chunk.lstrip(b"\0"))
        if zeros < len(chunk):
            return start + zeros // BLOCK * BLOCK
        start += len(chunk)
    return None
