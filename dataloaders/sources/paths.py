"""A million names in a few dozen megabytes: one block of bytes and an array of offsets instead of a list of strings."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable

import numpy as np


class PathTable:
    """Immutable table of names below one root.

    A list of strings costs about 120 bytes a path in every process; this costs the characters of the name and 8 bytes.
    """

    def __init__(self, root: str | os.PathLike[str], names: Iterable[str]) -> None:
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
