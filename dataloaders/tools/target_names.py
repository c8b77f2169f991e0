"""Name the files that a copy of a data set is written to: always inside of the copy, each only once.

Names come from the data: a list may say ../a.jpg, a tar member may be called /etc/a.jpg or ../../a.jpg. Every name is
changed so that it stays below the folder, that the loaders see it (no hidden entries) and that a text list can hold it.
"""

from __future__ import annotations

import hashlib
import os
import re

from mirl.dataloaders.sources.base import FileSource, Source
from mirl.dataloaders.sources.member_source import MemberSource

_CONTROL = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]")
_LONGEST = 180  # bytes of one component: file systems take 255, and a suffix and a temporary name are added


def name_in_source(source: Source, index: int) -> str:
    """Return the name below the source's folder; a tar member's is below a folder named for its shard."""
    if isinstance(source, FileSource) and not os.path.isabs(source.paths.name(index)):
        return source.paths.name(index)
    if isinstance(source, MemberSource):
        return source.plain_name(index)
    shard, separator, member = source.path(index).partition(".tar::")
    return f"{os.path.basename(shard)}/{member}" if separator else source.path(index)


def safe_name(name: str) -> str:
    """Return a relative name without "..", hidden parts, control characters and parts that are too long."""
    parts = [_safe_part(part) for part in name.split("/") if part not in ("", ".", "..")]
    return "/".join(parts) or "_"


class TargetNames:
    """This object hands out names ending in .jpg below one folder, none twice. One order of calls gives one result."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def take(self, name: str) -> str:
        """Return the safe name of an image: a.jpg for a.png, a.png.jpg if a.jpg is taken, then a.png~2.jpg."""
        wanted = safe_name(name)
        stem, suffix = os.path.splitext(wanted)
        chosen, number = f"{stem}.jpg", 1
        while chosen in self._taken:
            chosen = f"{stem}{suffix}.jpg" if number == 1 else f"{stem}{suffix}~{number}.jpg"
            number += 1
        self._taken.add(chosen)
        return chosen


def _safe_part(part: str) -> str:
    part = _CONTROL.sub("_", part)
    part = f"_{part[1:]}" if part.startswith(".") else part
    part = part.strip() or "_"
    encoded = os.fsencode(part)
    if len(encoded) <= _LONGEST:
        return part
    digest = hashlib.blake2b(encoded, digest_size=8).hexdigest()
    stem, suffix = os.path.splitext(part)
    suffix = suffix if len(os.fsencode(suffix)) <= 10 else ""
    kept = os.fsencode(stem)[: _LONGEST - 30].decode("utf-8", "ignore")
    return f"{kept}-{digest}{suffix}"
