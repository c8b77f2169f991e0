"""Open tar shards behind s3:// and http(s)://: copy them into the cache, index them there, read them as local shards.

The order of images and the identity of the data set come from the names of the members, so a run may go on with a
local copy of the same shards, and the other way round. An image is called URL::MEMBER.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from mirl.dataloaders.sources import listing
from mirl.dataloaders.sources.class_names import CLASS_NAMES
from mirl.dataloaders.sources.kinds import IMAGE, SHARD, kind_by_name
from mirl.dataloaders.sources.ledger import Ledger, join_ledgers
from mirl.dataloaders.sources.paths import shown
from mirl.dataloaders.sources.patience import find_patiently
from mirl.dataloaders.sources.remote_cache import copies_of, described, folder_of, gib
from mirl.dataloaders.sources.remote_files import RemoteFile, list_folder
from mirl.dataloaders.sources.tar_index import index_path, make_index
from mirl.dataloaders.sources.tar_source import TarSource
from mirl.errors import UserError

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,9})\.\.(\d{1,9})")
_MOST_SHARDS = 100_000


def expand_braces(url: str) -> list[str]:
    """Expand shard-{000..127}.tar and {a,b}.tar as a shell does. UserError for braces of another kind."""
    match = _BRACES.search(url)
    if match is None:
        return [url]
    inside = match[1]
    if span := _RANGE.fullmatch(inside):
        first, last = int(span[1]), int(span[2])
        if not first <= last < first + _MOST_SHARDS:
            raise UserError(f"{shown(url)} has {{{inside}}}: give a range that rises, of {_MOST_SHARDS} shards at most")
        width = len(span[1]) if span[1].startswith("0") or len(span[1]) == len(span[2]) else 0
        words = [f"{number:0{width}d}" for number in range(first, last + 1)]
    elif "," in inside:
        words = inside.split(",")
    else:
        raise UserError(f"{shown(url)} has {{{inside}}}: give {{000..127}} or {{a,b}}")
    return [one for word in words for one in expand_braces(url[: match.start()] + word + url[match.end() :])]


def open_remote(
    url: str,
    *,
    labels: bool = False,
    split: str = "train",
    every_name: bool = False,
    only: frozenset[str] | None = None,
) -> TarSource:
    """Open the shards that an address names: one .tar, several with braces, or, on S3, all below a prefix.

    only: paths (URL::member) to keep. UserError and StorageLost: see `copies_of`.
    """
    ledger = Ledger("objects", every_name=every_name)
    if urlsplit(url).path.lower().endswith(".tar"):
        files = described(expand_braces(url))
    else:
        files = find_patiently(partial(_shards_below, url, split, ledger), shown(url))
    return _open_files(url, files, ledger, labels, every_name, only)


def open_remote_members(paths: Sequence[str], *, labels: bool = False, every_name: bool = False) -> TarSource:
    """Open the members URL::member of remote shards, in the order in which their shards are first named."""
    urls = list(dict.fromkeys(shard_url(path) for path in paths))
    return _open_files(urls[0], described(urls), Ledger(), labels, every_name, frozenset(paths))


def shard_url(path: str) -> str:
    """Return the URL of URL::member."""
    end = path.find(".tar::")
    return path[: end + 4] if end >= 0 else path.partition("::")[0]


def fetch_all(urls: Sequence[str]) -> None:
    """Copy the shards of several addresses at once, so that none waits for the one before."""
    named = [one for url in urls if urlsplit(url).path.lower().endswith(".tar") for one in expand_braces(url)]
    copies_of(described(named))


def _open_files(
    url: str,
    files: Sequence[RemoteFile],
    ledger: Ledger,
    labels: bool,
    every_name: bool,
    only: frozenset[str] | None,
) -> TarSource:
    shards = copies_of(files)
    for file, shard in zip(files, shards, strict=True):
        if not index_path(shard).exists():
            try:
                make_index(shard, progress=False)
            except UserError as error:
                raise UserError(f"{shown(file.url)}: {error}") from None
    if labels:
        for folder in {file.url.partition("?")[0].rpartition("/")[0]: file.url for file in files}.values():
            _fetch_class_names(folder)
    source = TarSource(shards, labels=labels, only=only, every_name=every_name, called=[file.url for file in files])
    size = sum(file.size for file in files)
    where = Path(os.path.commonpath([shard.parent for shard in shards]))
    source.ledger.notes.append(f"copies of {shown(url)} take {gib(size)} in {shown(where)}")
    if ledger.left_out or ledger.notes:
        source.ledger = join_ledgers([source.ledger, ledger])
    return source


def _shards_below(url: str, split: str, ledger: Ledger) -> list[RemoteFile]:
    """List the shards below an S3 prefix; those of ``split`` if it holds train/ beside val/ or test/."""
    prefix = url.rstrip("/") + "/"
    files = [(file.url.removeprefix(prefix), file) for file in list_folder(url)]
    if not files:
        raise UserError(f"{shown(url)} holds nothing: check the address")
    names = listing.ordered_splits({name.partition("/")[0] for name, _ in files if "/" in name})
    if names:
        taken = names[0] if split == "train" else names[1]
        others = sorted({name.partition("/")[0] for name, _ in files} - {taken})
        ledger.notes.append(f"{taken}/ of {shown(url)} is read, not {', '.join(map(shown, others[:5]))}")
        files = [(name, file) for name, file in files if name.startswith(f"{taken}/")]
    shards = []
    for name, file in files:
        kind = "hidden" if any(part.startswith(".") for part in name.split("/")) else kind_by_name(name)
        if kind == SHARD:
            shards.append(file)
        elif name.rpartition("/")[2] != CLASS_NAMES and not name.lower().endswith(".idx"):
            ledger.leave_out("images (put them into shards)" if kind == IMAGE else kind or "unknown", file.url)
    if not shards:
        raise UserError(f"no .tar below {shown(url)}: images are read from shards there ({ledger})")
    return shards


def _fetch_class_names(url: str) -> None:
    """Copy the class names that lie beside a shard to the place beside its copy; remove old ones if it has none."""
    beside = url.partition("?")[0].rpartition("/")[0] + f"/{CLASS_NAMES}"
    place = folder_of(url) / CLASS_NAMES
    try:
        (file,) = described([beside])
    except UserError:
        place.unlink(missing_ok=True)
        return
    (copy,) = copies_of([file])
    content = copy.read_bytes()
    if not place.exists() or place.read_bytes() != content:
        part = place.with_name(f".{place.name}.{os.getpid()}.part")
        part.write_bytes(content)
        os.replace(part, place)


def find_member(source: TarSource, path: str) -> int | None:
    """Return the number of the image URL::member; None if the source has no such image."""
    return next((index for index in range(source.num_images) if source.path(index) == path), None)
