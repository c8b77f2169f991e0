"""Make and load index files of WebDataset tar shards: they say where a sample's parts lie, so one read gets a part.

index_format.py has the text of an index, tar_samples.py the rule for the image of a sample.
"""

from __future__ import annotations

import os
import shlex
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from tqdm import tqdm

from mirl.dataloaders.sources.index_format import DamagedIndex, Part, ShardIndex, parse_index_text, write_index_text
from mirl.dataloaders.sources.kinds import (
    ARCHIVES,
    HEAD_BYTES,
    IMAGE,
    image_format,
    kind_by_content,
    kind_by_name,
    read_head,
)
from mirl.dataloaders.sources.listing import find_files
from mirl.dataloaders.sources.manifest import atomic_writer
from mirl.dataloaders.sources.paths import shown
from mirl.dataloaders.sources.patience import find_patiently, is_of_a_moment
from mirl.dataloaders.sources.tar_members import TarMembers
from mirl.dataloaders.sources.tar_samples import AmbiguousSample, choose_images, is_image
from mirl.errors import UserError


def index_path(shard: Path, index_dir: Path | None = None) -> Path:
    """Return x.idx beside x.tar, or in `index_dir`."""
    return (index_dir or shard.parent) / f"{shard.stem}.idx"


def make_index(
    data: str | Path,
    *,
    index_dir: str | Path | None = None,
    workers: int = 4,
    force: bool = False,
    allow_cut: bool = False,
    image_part: str | None = None,
    progress: bool | Callable[[int, int], None] = True,
) -> list[Path]:
    """Write x.idx for every x.tar below `data` (a folder, or one tar). Returns the paths of the indexes.

    index_dir: the folder to write to, for shards on a read-only disk; default: beside each tar. workers: shards at a
    time. force: write an index again although it is newer than the tar. allow_cut: index the whole members of a tar
    that ends in the middle, instead of refusing it. image_part: the extension of the part of each sample that is the
    image, or "each" for all its image parts. It is kept in the index, so that every command follows it; an index with
    another choice is written again. progress: a bar on stderr, nothing, or a function of (done, total).
    UserError names a tar that is cut, is not a tar, is empty, or whose images cannot be told, and the mend. Indexes of
    the others are written first.
    """
    shards = find_shards(Path(data))
    folder = None if index_dir is None else Path(index_dir)
    wanted = None if image_part is None else image_part.lower().removeprefix(".")
    _refuse_shared_index(shards, folder)
    problems: list[str] = []

    def write(shard: Path) -> Path:
        target = index_path(shard, folder)
        fresh = target.exists() and target.stat().st_mtime >= shard.stat().st_mtime
        if force or not fresh or (wanted is not None and not _has_choice(target, wanted)):
            try:
                scan = partial(scan_shard, shard, allow_cut=allow_cut, image_part=wanted)
                index = find_patiently(scan, shown(shard))
                for parts in index.samples:
                    choose_images(parts, wanted)
                with atomic_writer(target, "wb") as file:
                    write_index_text(file, index)
            except AmbiguousSample as error:
                problems.append(ambiguity(shard, folder, error))
            except UserError as error:
                problems.append(str(error))
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
    """Return sorted tar shards: `data` itself, or all below the folder `data`."""
    return find_patiently(partial(_find_shards, data), shown(data))


def _find_shards(data: Path) -> list[Path]:
    if data.is_file():
        return [data]
    if not data.is_dir():
        raise UserError(f"{shown(data)} does not exist; give a .tar file or a folder of them")
    found = find_files(data)
    if not found.shards:
        raise UserError(f"no .tar files in {shown(data)}; compressed shards (.tar.gz) must be unpacked to .tar first")
    return [data / name for name in found.shards]


def scan_shard(shard: Path, *, allow_cut: bool = False, image_part: str | None = None) -> ShardIndex:
    """Read the samples of one tar, header by header. UserError if it is cut, empty or not a tar."""
    total = os.path.getsize(shard)
    mend = "copy or write it again, or index its whole members with allow_cut (--allow-cut)"
    index = ShardIndex([], [], image_part)
    last, members = None, TarMembers(shard)
    try:
        with open(shard, "rb", buffering=0) as file:
            for member in members:
                if member.isdir():
                    continue
                if member.isreg() and not member.issparse() and member.offset_data + member.size > total:
                    raise tarfile.ReadError(f"{shown(member.name)} ends beyond byte {total}, the last of the file")
                part = part_of(member, file.fileno())
                if isinstance(part, str):
                    index.left_out.append((member.name, part))
                    continue
                folder, _, base = member.name.rpartition("/")
                key = (folder, base.partition(".")[0])
                if key != last:
                    index.samples.append([])
                last = key
                index.samples[-1].append(part)
        if not allow_cut and not members.whole:
            raise tarfile.ReadError("no end-of-archive mark")
    except (tarfile.TarError, ValueError) as error:  # tarfile lets ValueErrors of damaged sparse headers through
        if not index.samples and kind_by_content(read_head(shard), shard.name) == ARCHIVES:
            raise UserError(
                f"tar shard {shown(shard)} is compressed, or an archive of another kind: unpack it"
            ) from None
        if not allow_cut or not index.samples:
            raise UserError(f"tar shard {shown(shard)} is cut or damaged ({error}); {mend}") from None
    except OSError as error:
        if is_of_a_moment(error):
            raise
        raise UserError(f"tar shard {shown(shard)} cannot be read ({error.strerror}); check it") from None
    if not index.samples:
        raise UserError(f"tar shard {shown(shard)} holds no samples; remove it or write it again")
    return index


def part_of(member: tarfile.TarInfo, handle: int) -> Part | str:
    """Return the part that a member is, or the reason why it is in no sample.

    If a member's suffix tells nothing but its first bytes are an image's, the usual suffix is put behind its own.
    """
    base = member.name.rpartition("/")[2]
    if base.startswith("."):
        return "hidden"
    if member.issparse():
        return "sparse members (write the tar without --sparse)"
    if not member.isreg():
        return "links to other members" if member.islnk() or member.issym() else "pipes, sockets or devices"
    extension = base.partition(".")[2].lower()
    if not is_image(extension) or not extension:
        kind = kind_by_name(base)
        if kind is None:
            head = os.pread(handle, min(HEAD_BYTES, member.size), member.offset_data)
            kind = kind_by_content(head, base)
            suffix = image_format(head)
            if kind == IMAGE and suffix is not None:
                extension = f"{extension}.{suffix}" if extension else suffix
        if not extension:
            return kind
    return Part(extension, member.offset_data, member.size, member.name)


def read_index(index: Path, shard: Path | None = None) -> list[list[Part]]:
    """Load the samples of an index file; see `load_index`."""
    return load_index(index, shard).samples


def load_index(index: Path, shard: Path | None = None) -> ShardIndex:
    """Load an index file. UserError with the mend if it is missing or damaged.

    shard: the tar of this index, for the mend; default: the folder of the index.
    """
    try:
        return parse_index_text(index.read_bytes())
    except FileNotFoundError:
        raise UserError(f"index {shown(index)} is missing; make it with: {index_command(index, shard)}") from None
    except OSError as error:
        if is_of_a_moment(error):
            raise
        raise UserError(f"index {shown(index)} cannot be read ({error.strerror}); check it") from None
    except DamagedIndex as error:
        command = index_command(index, shard, "--force")
        raise UserError(f"index {shown(index)} {error}; make it again with: {command}") from None


def index_command(index: Path, shard: Path | None, *options: str) -> str:
    """Return the command that makes this index."""
    words = ["mirl", "make-index", *options, os.fspath(shard or index.parent)]
    if shard is not None and index.parent != shard.parent:
        words += ["--index-dir", os.fspath(index.parent)]
    return shlex.join(words)


def ambiguity(shard: Path, index_dir: Path | None, error: AmbiguousSample) -> str:
    """Return the message for a shard in which the image of a sample cannot be told."""
    command = index_command(index_path(shard, index_dir), shard, "--image-part", error.extensions[0])
    return f"tar shard {shown(shard)}: {error}; choose the image, or each for all of them: {command}"


def _refuse_shared_index(shards: list[Path], folder: Path | None) -> None:
    first_with: dict[Path, Path] = {}
    for shard in shards:
        other = first_with.setdefault(index_path(shard, folder), shard)
        if other is not shard:
            mend = "leave it out, or rename one" if folder is not None else "rename one"
            place = f"index_dir is {shown(folder)}, but two shards" if folder is not None else "two shards"
            raise UserError(f"{place} have the same name for an index, {shown(other)} and {shown(shard)}; {mend}")


def _has_choice(target: Path, wanted: str) -> bool:
    try:
        return load_index(target).image_part == wanted
    except UserError:
        return False
