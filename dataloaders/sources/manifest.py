"""Write the manifest of `mirl validate-data` and read it for training: a line per image, with the reason if it is bad.

It is a text file of tab-separated lines, so that it can be read, sorted and edited with any tool:

    # mirl-manifest 1<TAB>ROOT
    path<TAB>bytes<TAB>height<TAB>width<TAB>format<TAB>reason

Paths are relative to ROOT; sizes are upright pixels. The reason is empty for a good image, and begins with "left out: "
for a file that is no image of the data set. A member of a tar shard is shard.tar::member. Backslash, tab, newline and
carriage return in a path are written as \\\\, \\t, \\n and \\r.
"""

from __future__ import annotations

import os
import shlex
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from mirl.dataloaders.sources.paths import shown, url_of
from mirl.disk import set_mode
from mirl.errors import UserError

MANIFEST_NAME = "mirl-manifest.tsv"
LEFT_OUT = "left out: "
_MAGIC = "# mirl-manifest 1"
_COLUMNS = "path\tbytes\theight\twidth\tformat\treason"


@dataclass(frozen=True, slots=True)
class ManifestRow:
    """A row is one image. If its header could not be read, height and width are 0 and format is ""."""

    path: str
    bytes: int
    height: int
    width: int
    format: str
    reason: str


@contextmanager
def atomic_writer(target: Path, mode: str = "w") -> Iterator[IO]:
    """Open a file beside `target` that takes its place when the block ends well and vanishes when it does not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
    try:
        options = {} if "b" in mode else {"encoding": "utf-8", "errors": "surrogateescape"}
        with os.fdopen(handle, mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        set_mode(temporary, 0o666 & ~umask)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_manifest(target: Path, root: str, rows: Iterable[ManifestRow]) -> None:
    """Write the manifest atomically."""
    with atomic_writer(target) as file:
        file.write(f"{_MAGIC}\t{escape(root)}\n{_COLUMNS}\n")
        for row in rows:
            fields = (escape(row.path), row.bytes, row.height, row.width, row.format, escape(row.reason))
            file.write("\t".join(map(str, fields)) + "\n")


def is_manifest(path: Path) -> bool:
    """Say whether the file begins as a manifest does."""
    with open(path, "rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC.encode()


def read_manifest(path: Path) -> tuple[str, list[ManifestRow]]:
    """Return (root, rows). UserError with the number of a damaged line."""
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        magic, _, root = file.readline().rstrip("\n").partition("\t")
        root = unescape(root)
        command = manifest_command(path, root)
        if magic != _MAGIC or file.readline().rstrip("\n") != _COLUMNS:
            raise UserError(f"{shown(path)} is not a manifest of this version; write it again with: {command}")
        rows = []
        for number, line in enumerate(file, start=3):
            fields = line.rstrip("\n").split("\t")
            if len(fields) != 6 or not all(field.isdigit() for field in fields[1:4]):
                raise UserError(f"{shown(path)} line {number} is damaged; write it again with: {command}")
            name, size, height, width, kind, reason = fields
            rows.append(ManifestRow(unescape(name), int(size), int(height), int(width), kind, unescape(reason)))
    return root, rows


def manifest_command(path: Path, root: str) -> str:
    """Return the command that writes the manifest `path` of the data set `root` again."""
    remote = url_of(root) is not None
    moved = not remote and (not root or not os.path.exists(root))
    words = ["mirl", "validate-data", os.fspath(path.parent if moved else root)]
    if moved or remote or path.name != MANIFEST_NAME or os.path.realpath(path.parent) != os.path.realpath(root):
        words += ["--manifest", os.fspath(path)]
    return shown(shlex.join(words))


def escape(text: str) -> str:
    """Return the text without tabs and line ends, for a table of lines."""
    return text.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")


def unescape(text: str) -> str:
    """Return the text that `escape` was given."""
    if "\\" not in text:
        return text
    parts = text.split("\\\\")
    return "\\".join(part.replace("\\t", "\t").replace("\\n", "\n").replace("\\r", "\r") for part in parts)
