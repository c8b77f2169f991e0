"""Read and write the text of an index file: DALI's wds2idx, version 1.2, with names that may hold any byte.

    v1.2 NUMBER_OF_SAMPLES mirl {"left_out": [...], "image_part": null}
    jpg 1536 68853 n01/im0.jpg cls 71168 1 n01/im0.cls

A sample has one line: for each part its extension, the offset of its first byte, its size and its name. DALI passes
over the rest of the first line, from the word `mirl` on. It names the members that are in no sample and the choice of
the image part. In a file with this word, white space, control characters and % are written as %XX in names and
extensions. Files without it, by DALI or by earlier versions, have names as they are; they are refused if a name with
spaces cannot be told from several parts.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import IO, NamedTuple

_VERSION = b"v1.2"
_MARK = b"mirl"
_TO_ESCAPE = re.compile(rb"[\x00-\x20%\x7f]")
_ESCAPED = re.compile(rb"%([0-9A-F]{2})")
_NUMBERS = re.compile(rb" (\d+) (\d+) ")
_BLOCK = 512


class Part(NamedTuple):  # cheap to make: there are millions
    """A part is one member of a sample: extension, offset of the data in the tar, bytes, member name."""

    extension: str
    offset: int
    size: int
    name: str

    @property
    def raw_name(self) -> bytes:
        return to_bytes(self.name)


@dataclass(frozen=True)
class ShardIndex:
    """An index holds the samples of a shard. left_out: (member, reason) for the rest. image_part: see `make_index`."""

    samples: list[list[Part]]
    left_out: list[tuple[str, str]] = field(default_factory=list)
    image_part: str | None = None


class DamagedIndex(Exception):
    """The file is no index, or not a whole one. The message says where, without the path."""


def to_bytes(name: str) -> bytes:
    """Return a member's name as it stands in the tar."""
    return name.encode("utf-8", "surrogateescape")


def write_index_text(file: IO[bytes], index: ShardIndex) -> None:
    """Write the index."""
    extra = json.dumps({"left_out": index.left_out, "image_part": index.image_part})
    file.write(b"%s %d %s %s\n" % (_VERSION, len(index.samples), _MARK, extra.encode("ascii")))
    for parts in index.samples:
        fields = (b"%s %d %d %s" % (_escape(p.extension), p.offset, p.size, _escape(p.name)) for p in parts)
        file.write(b" ".join(fields) + b"\n")


def parse_index_text(data: bytes) -> ShardIndex:
    """Parse an index. DamagedIndex if `data` is none."""
    head, *lines = data.removesuffix(b"\n").split(b"\n")
    version, count, mark, extra = (*head.split(b" ", 3), b"", b"", b"", b"")[:4]
    if not version.startswith(b"v1.") or not count.isdigit() or int(count) != len(lines):
        raise DamagedIndex("is damaged or of an unknown version")
    if version != _VERSION:
        raise DamagedIndex(f"has version {version.decode(errors='replace')}, which holds no names (v1.2 does)")
    if mark != _MARK:
        return ShardIndex([_plain_parts(line.removesuffix(b"\r")) for line in lines])
    try:
        stored = json.loads(extra)
        left_out = [(str(name), str(reason)) for name, reason in stored["left_out"]]
        return ShardIndex([_escaped_parts(line) for line in lines], left_out, stored["image_part"])
    except (ValueError, KeyError, TypeError) as error:
        raise error if isinstance(error, DamagedIndex) else DamagedIndex("is damaged in its first line") from None


def _escaped_parts(line: bytes) -> list[Part]:
    fields = line.split(b" ")
    if len(fields) % 4:
        raise _damage(line)
    parts = []
    for at in range(0, len(fields), 4):
        extension, offset, size, name = fields[at : at + 4]
        if not offset.isdigit() or not size.isdigit():
            raise _damage(line)
        parts.append(Part(_extension(extension), int(offset), int(size), _unescape(name)))
    return parts


def _plain_parts(line: bytes) -> list[Part]:
    fields = line.split(b" ")
    if len(fields) % 4 == 0 and (parts := _split_at_spaces(fields)) is not None:
        return parts
    readings = _readings(line, 0, None, limit=2)
    if not readings:
        raise _damage(line)
    if len(readings) > 1:
        raise DamagedIndex(f"can be read in two ways at {_text(line[:80])!r}, since a name has spaces")
    return readings[0]


def _split_at_spaces(fields: list[bytes]) -> list[Part] | None:
    """Return the parts if no name has a space in it, as nearly always; else None."""
    parts, common = [], None
    for at in range(0, len(fields), 4):
        extension, offset, size, name = fields[at : at + 4]
        key = _key(name, extension)
        if not offset.isdigit() or not size.isdigit() or key is None or key != (common or key):
            return None
        common = key
        parts.append(Part(_text(extension), int(offset), int(size), _text(name)))
    return parts


def _key(name: bytes, extension: bytes) -> bytes | None:
    """Return the name up to its first dot, which all parts of a sample share; None if the rest is not the extension."""
    dot = name.find(b".", name.rfind(b"/") + 1)
    return name[:dot] if dot >= 0 and name[dot + 1 :].lower() == extension.lower() else None


def _readings(line: bytes, after: int, common: bytes | None, limit: int) -> list[list[Part]]:
    """Find the ways, at most `limit`, to take a line of names with spaces as the parts of one sample.

    They are few, because data starts at a multiple of 512, behind the part before; and a name ends with its extension
    and begins as the names of the other parts do.
    """
    found: list[list[Part]] = []
    for match in _NUMBERS.finditer(line):
        extension, offset, size = line[: match.start()], int(match[1]), int(match[2])
        if offset % _BLOCK or offset < after + _BLOCK or not extension:
            continue
        rest = line[match.end() :]
        for end in (len(rest), *(place.start() for place in re.finditer(b" ", rest))):
            key = _key(rest[:end], extension)
            if key is None or key != (common or key):
                continue
            part = Part(_text(extension), offset, size, _text(rest[:end]))
            tails = [[]] if end == len(rest) else _readings(rest[end + 1 :], offset + size, key, limit)
            found += [[part, *tail] for tail in tails]
            if len(found) >= limit:
                return found[:limit]
    return found


def _damage(line: bytes) -> DamagedIndex:
    return DamagedIndex(f"is damaged at {_text(line[:80])!r}")


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def _escape(text: str) -> bytes:
    return _TO_ESCAPE.sub(lambda match: b"%%%02X" % match[0][0], to_bytes(text))


@lru_cache(maxsize=4096)
def _extension(raw: bytes) -> str:
    return _unescape(raw)


def _unescape(raw: bytes) -> str:
    return _text(_ESCAPED.sub(lambda match: bytes([int(match[1], 16)]), raw) if b"%" in raw else raw)
