"""Index files of WebDataset tar shards: where each sample's parts lie, so that any sample is one read away.

The format is that of DALI's wds2idx, version 1.2, so indexes made by either can be used by both:

    v1.2 NUMBER_OF_SAMPLES
    jpg 1536 68853 n01/im0.jpg cls 71168 1 n01/im0.cls

one line per sample: for each part its extension, the offset of its first byte, its size and its name. As in WebDataset,
a sample is a run of members whose names agree up to the first dot of the base name.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from mirl.dataloaders.sources.manifest import atomic_writer
from mirl.errors import UserError

BLOCK = 512
_VERSION = "v1.2"
_PART = re.compile(r"(\S+) (\d+) (\d+) (.+?)(?= \S+ \d+ \d+ |$)")


@dataclass(frozen=True, slots=True)
class Part:
    """One member of a sample: extension, offset of the data in the tar, bytes, member name."""

    extension: str
    offset: int
    size: int
    name: str


def index_path(shard: Path, index_dir: Path | None = None) -> Path:
    """x.idx beside x.tar, or in `index_dir`."""
    return (index_dir or shard.parent) / f"{shard.stem}.idx"


def make_index(
    data: str | Path,
    *,
    index_dir: str | Path | None = None,
    workers: int = 4,
    force: bool = False,
    allow_cut: bool = False,
    progress: bool | Callable[[int, int], None] = True,
) -> list[Path]:
    """Writes x.idx for every x.tar below `data` (a folder, or one tar) and returns their paths.

    index_dir: where to write, for shards on a read-only disk; default: beside each tar. workers: shards at a time.
    force: also those whose index is newer than the tar. allow_cut: index the whole members of a tar that ends in the
    middle, instead of refusing it. progress: a bar on stderr, nothing, or a function of (done, total).
    UserError names a tar that is cut, is not a tar or is empty, and the mend; indexes of the others are written first.
    """
    shards = find_shards(Path(data))
    folder = None if index_dir is None else Path(index_dir)
    if folder is not None and len({shard.stem for shard in shards}) < len(shards):
        raise UserError(f"index_dir is {folder}, but two shards have the same name; leave it out")
    problems: list[str] = []

    def write(shard: Path) -> Path:
        target = index_path(shard, folder)
        fresh = target.exists() and target.stat().st_mtime >= shard.stat().st_mtime
        if force or not fresh:
            try:
                samples = list(scan_shard(shard, allow_cut=allow_cut))
            except UserError as error:
                problems.append(str(error))
                return target
            with atomic_writer(target) as file:
                file.write(f"{_VERSION} {len(samples)}\n")
                for parts in samples:
                    file.write(" ".join(f"{p.extension} {p.offset} {p.size} {p.name}" for p in parts) + "\n")
        return target

    written = []
    with (
        ThreadPoolExecutor(max(1, workers)) as pool,
        tqdm(total=len(shards), unit="tar", disable=progress is not True) as bar,
    ):
        for done, target in enumerate(pool.map(write, shards), start=1):
            written.append(target)
            bar.update()
            if callable(progress):
                progress(done, len(shards))
    if problems:
        raise UserError("; ".join(sorted(problems)))
    return written


def find_shards(data: Path) -> list[Path]:
    """Sorted .tar files: `data` itself, or all below the folder `data`."""
    if data.is_file():
        return [data]
    if not data.is_dir():
        raise UserError(f"{data} does not exist; give a .tar file or a folder of them")
    shards = sorted(path for path in data.rglob("*.tar") if path.is_file() and not path.name.startswith("."))
    if not shards:
        raise UserError(f"no .tar files in {data}; compressed shards (.tar.gz) must be unpacked to .tar first")
    return shards


def scan_shard(shard: Path, *, allow_cut: bool = False) -> Iterator[list[Part]]:
    """The samples of one tar, read header by header; UserError if it is cut, empty or not a tar."""
    total = os.path.getsize(shard)
    mend = "copy or write it again, or index its whole members with allow_cut (--allow-cut)"
    key, parts, found = None, [], False
    try:
        with tarfile.open(shard, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # tarfile remembers every member; a shard can have millions
                if not member.isreg():
                    continue
                if member.offset_data + member.size > total:
                    raise tarfile.ReadError(f"{member.name} ends beyond byte {total}, the last of the file")
                folder, _, base = member.name.rpartition("/")
                stem, _, extension = base.partition(".")
                if not extension or base.startswith("."):
                    continue
                if (folder, stem) != key and parts:
                    found = True
                    yield parts
                    parts = []
                key = (folder, stem)
                parts.append(Part(extension.lower(), member.offset_data, member.size, member.name))
            end = tar.offset
        if not allow_cut and not _has_end_mark(shard, end):
            raise tarfile.ReadError("no end-of-archive mark")
    except (tarfile.TarError, ValueError) as error:  # tarfile lets ValueErrors of damaged sparse headers through
        if not allow_cut or (not found and not parts):
            raise UserError(f"tar shard {shard} is cut or damaged ({error}); {mend}") from None
    if parts:
        yield parts
    elif not found:
        raise UserError(f"tar shard {shard} holds no samples; remove it or write it again")


def read_index(index: Path) -> list[list[Part]]:
    """The samples of an index file; UserError with the mend if it is missing or damaged."""
    mend = f"make it again with: mirl make-index --force {index.parent}"
    try:
        lines = index.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except FileNotFoundError:
        raise UserError(f"index {index} is missing; make it with: mirl make-index {index.parent}") from None
    version, _, count = lines[0].partition(" ") if lines else ("", "", "")
    if not version.startswith("v1.") or not count.isdigit() or int(count) != len(lines) - 1:
        raise UserError(f"index {index} is damaged or of an unknown version; {mend}")
    if version != _VERSION:
        raise UserError(f"index {index} has version {version}, which holds no names ({_VERSION} does); {mend}")
    samples = []
    for line in lines[1:]:
        parts = [Part(ext, int(offset), int(size), name) for ext, offset, size, name in _PART.findall(line)]
        if not parts:
            raise UserError(f"index {index} is damaged at {line[:80]!r}; {mend}")
        samples.append(parts)
    return samples


def _has_end_mark(shard: Path, end: int) -> bool:
    """Whether a block of zeros follows the last member, as it does in every tar that was written to its end."""
    with open(shard, "rb") as file:
        file.seek(end)
        return file.read(BLOCK) == bytes(BLOCK)
