"""Keep a million names in a few dozen megabytes, and handle paths, addresses and the places that users give."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

_URL = re.compile(r"(s3|https?):/+(?=[^/])", re.IGNORECASE)


class PathTable:
    """A table holds names below one root, in one block of bytes with an array of offsets. It does not change.

    A list of strings costs about 120 bytes a path in every process; a table costs the characters of the name and 8
    bytes.
    """

    def __init__(self, root: str | os.PathLike[str], names: Iterable[str | bytes]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self.root = os.fspath(root)
        self._text = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def name(self, index: int) -> str:
        """Return the name relative to the root."""
        return os.fsdecode(self.raw(index))

    def raw(self, index: int) -> bytes:
        """Return the name relative to the root, as the file system's bytes."""
        if not 0 <= index < len(self):
            raise IndexError(f"path {index} of {len(self)}")
        return self._text[self._ends[index] : self._ends[index + 1]]

    def __getitem__(self, index: int) -> str:
        """Return the whole path; a name that is absolute stays as it is."""
        return os.path.join(self.root, self.name(index))

    def digest(self) -> str:
        """Return a fingerprint of the names in order. The root is left out, so that a data set may be moved whole."""
        hasher = hashlib.blake2b(self._text, digest_size=8)
        hasher.update(self._ends.tobytes())
        return hasher.hexdigest()


def shown(path: str | os.PathLike[str]) -> str:
    """Return the path for a message of one line on any terminal.

    Control characters, line breaks of every kind and bytes that are no UTF-8 are written as escapes."""
    text = os.fspath(path)
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else _escaped(character) for character in text)


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is no UTF-8, as os.fsdecode gives it
        return f"\\x{code - 0xDC00:02x}"
    return character if character == " " else character.encode("unicode_escape").decode("ascii")


def url_of(place: str | os.PathLike[str]) -> str | None:
    """Return the address that a place is, with both slashes (`Path` keeps one of them); None for a local place."""
    text = os.fspath(place)
    match = _URL.match(text)
    return f"{match[1].lower()}://{text[match.end() :]}" if match is not None else None


def joined(root: str, path: str) -> str:
    """Return `path` below `root`; an address stays as it is."""
    return path if url_of(path) is not None else os.path.join(root, path)


def default_cache_dir() -> Path:
    """Return $MIRL_CACHE, else $XDG_CACHE_HOME/mirl, else ~/.cache/mirl."""
    if "MIRL_CACHE" in os.environ:
        return Path(os.environ["MIRL_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "mirl"


def below(path: str, base: str) -> str:
    """Return `path` relative to the folder `base`, with .. if it is elsewhere; an address stays as it is.

    In shard.tar::member the member stays byte for byte what it is."""
    if url_of(path) is not None:
        return path
    file = shard_of(path) or path
    return os.path.relpath(os.path.abspath(file), base) + path[len(file) :]


def chosen_in(place: str | os.PathLike[str]) -> tuple[Path, str]:
    """Split a place FILE:KEY into (file or folder, key); (place, "") if the place itself exists or FILE does not."""
    text = os.fspath(place)
    file, colon, key = text.rpartition(":")
    if not colon or not file or not key or os.path.exists(text) or not os.path.exists(file):
        return Path(place), ""
    return Path(file), key


def shard_of(path: str, root: str = "") -> str | None:
    """Return the shard of shard.tar::member, both below `root`; for FILE:KEY::member it is FILE:KEY.

    None if `path` is a file of its own, whose name may have :: too.
    """
    at = path.find("::")
    if at < 0 or os.path.exists(os.path.join(root, path)):
        return None
    while at >= 0:
        if os.path.isfile(chosen_in(os.path.join(root, path[:at]))[0]):
            return path[:at]
        at = path.find("::", at + 1)
    return None
