"""Files as tests want them: waited for, damaged, or dangerous to unpickle."""

from __future__ import annotations

import time
from pathlib import Path


def wait_for(path: Path, text: str, seconds: float = 120) -> str:
    """Wait until ``text`` stands in the file at ``path``; returns all that stands in it."""
    deadline = time.monotonic() + seconds
    while not path.exists() or text not in path.read_text():
        assert time.monotonic() < deadline, path.read_text()[-3000:] if path.exists() else f"{path} was never written"
        time.sleep(0.02)
    return path.read_text()


def flip_bit(path: Path, place: int | None = None) -> None:
    """Change one bit of the byte at ``place``, by default the one in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if place is None else place] ^= 1
    path.write_bytes(content)


class CreatesFile:
    """An object whose unpickling creates the file ``path``: plain pickle would run what a stranger wrote."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)
