"""A million names in a few dozen megabytes: one block of bytes and an array of offsets instead of a list of strings."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

_URL = re.compile(r"(s3|https?):/+(?=[^/])", re.IGNORECASE)


class PathTable:
    """Immutable table of names below one root.

    A list of strings costs about 120 bytes a path in every process; this costs the characters of the name and 8 bytes.
    """

    def __init__(self, root: str | os.PathLike[str], names: Iterable[str | bytes]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self.root = os.fspath(root)
        self._text = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def name(self, index: int) -> str:
        """The name relative to the root."""
        return os.fsdecode(self.raw(index))

    def raw(self, index: int) -> bytes:
        """The name relative to the root, as the file system's bytes."""
        if not 0 <= index < len(self):
            raise IndexError(f"path {index} of {len(self)}")
        return self._text[self._ends[index] : self._ends[index + 1]]

    def __getitem__(self, index: int) -> str:
        """The whole path; a name that is absolute stays as it is."""
        return os.path.join(self.root, self.name(index))

    def digest(self) -> str:
        """Fingerprint of the names in order; the root is left out, so that a data set may be moved as a whole."""
        hasher = hashlib.blake2b(self._text, digest_size=8)
        hasher.update(self._ends.tobytes())
        return hasher.hexdigest()


def shown(path: str | os.PathLike[str]) -> str:
    """The path for a message of one line on any terminal: control characters, line breaks of every kind and bytes that
    are no UTF-8 are written as escapes."""
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
    """The address that a place is, with the two slashes of which `Path` makes one; None for a place on this machine."""
    text = os.fspath(place)
    match = _URL.match(text)
    return f"{match[1].lower()}://{text[match.end() :]}" if match is not None else None


def joined(root: str, path: str) -> str:
    """`path` below `root`; an address stays as it is."""
    return path if url_of(path) is not None else os.path.join(root, path)


def default_cache_dir() -> Path:
    """$MIRL_CACHE, else $XDG_CACHE_HOME/mirl, else ~/.cache/mirl."""
    if "MIRL_CACHE" in os.environ:
        return Path(os.environ["MIRL_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "mirl"


def below(path: str, base: str) -> str:
    """`path` relative to the folder `base`, or as it is if it is elsewhere; of shard.tar::member the member stays
    byte for byte what it is, as does an address."""
    if url_of(path) is not None:
        return path
    file = shard_of(path) or path
    return os.path.relpath(os.path.abspath(file), base) + path[len(file) :]


def chosen_in(place: str | os.PathLike[str]) -> tuple[Path, str]:
    """(file or folder, what is chosen in it) of a place FILE:KEY; (place, "") for one that is there, or has no file."""
    text = os.fspath(place)
    file, colon, key = text.rpartition(":")
    if not colon or not file or not key or os.path.exists(text) or not os.path.exists(file):
        return Path(place), ""
    return Path(file), key


def shard_of(path: str, root: str = "") -> str | None:
    """The shard in shard.tar::member, both below `root`; None if `path` is a file of its own, which may hold :: too.

    Of FILE:KEY::member it is FILE:KEY.
    """
    at = path.find("::")
    if at < 0 or os.path.exists(os.path.join(root, path)):
        return None
    while at >= 0:
        if os.path.isfile(chosen_in(os.path.join(root, path[:at]))[0]):
            return path[:at]
        at = path.find("::", at + 1)
    return None
