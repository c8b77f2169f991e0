"""Read text lists of images: one path a line, byte for byte as on the disk, optionally a tab and a class number."""

from __future__ import annotations

import codecs
import os
import shlex
from collections.abc import Iterable
from functools import partial
from itertools import islice
from pathlib import Path

from mirl.dataloaders.sources.kinds import SHARD, is_text, kind_by_content, read_head
from mirl.dataloaders.sources.ledger import Ledger
from mirl.dataloaders.sources.paths import shown
from mirl.dataloaders.sources.patience import is_of_a_moment, patiently
from mirl.errors import UserError

_DIGITS = 9  # the most that a class number has
_ASKED = 100  # this many of the missing entries are examined for a misspelling
_FEW = 32  # up to this many entries of one folder are looked up one by one
_BLANK = " \t\r\v\f"
_UTF_16_OR_32 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)


def read_path_list(list_file: Path) -> tuple[list[str], list[int] | None]:
    """Return (paths, labels or None) of a list. Relative paths start at the folder of the list.

    Lines end with a newline, or carriage return and newline, and with nothing else. Empty lines are skipped. A line
    that starts with # is skipped unless a file has that name. White space around a path is dropped unless a file has it
    in its name. UserError names the line and what is wrong with it.
    """
    name = shown(list_file)
    try:
        data = list_file.read_bytes()
    except OSError as error:
        if is_of_a_moment(error):
            raise
        raise UserError(f"list {name} cannot be read ({error.strerror}); check its permissions") from None
    if data.startswith(_UTF_16_OR_32):
        raise UserError(f"list of paths {name} is UTF-16 or UTF-32 text: save it as UTF-8")
    if not is_text(data[:4096].replace(b"\x1b", b"")):
        raise UserError(f"list of paths {name} is no text: give one path a line, or a folder of images")
    data = data.removeprefix(codecs.BOM_UTF8)
    folder = list_file.parent
    numbered = enumerate((os.fsdecode(raw.removesuffix(b"\r")) for raw in data.split(b"\n")), start=1)
    lines = [(number, line) for number, line in numbered if line.strip(_BLANK) and not _is_comment(line, folder)]
    if not lines:
        raise UserError(f"list of paths {name} names no image; write one path a line")
    first = _path(lines[0][1], folder)
    if "\t" not in first or _exists(folder, first):
        paths, labels = [_path(line, folder) for _, line in lines], None
    else:
        paths, labels = [], []
        for number, line in lines:
            path, _, label = line.rstrip(_BLANK).rpartition("\t")
            if not path or not (label.strip().isascii() and label.strip().isdigit() and len(label.strip()) <= _DIGITS):
                raise UserError(
                    f"list of paths {name}: {shown(line)!r} is not 'path<TAB>label' as the first entry is; "
                    f"mend line {number}"
                )
            paths.append(_path(path, folder))
            labels.append(int(label))
    if not (folder / paths[0]).is_file():
        raise UserError(f"list of paths {name}: its first entry {_first_problem(list_file, paths[0])}")
    if kind_by_content(read_head(folder / paths[0]), paths[0]) == SHARD:
        raise UserError(
            f"list of paths {name}: its first entry {shown(paths[0])!r} is a tar shard; give the shards, or a folder"
        )
    return paths, labels


def refuse_misspelt(list_file: Path, missing: Iterable[str]) -> None:
    """Raise UserError if one of the first missing entries is the path of a file with quotes, a label or the like."""
    for path in islice(missing, _ASKED):
        problem = _misspelling(list_file, path)
        if problem is not None:
            raise UserError(f"list of paths {shown(list_file)}: its entry {problem}")


def existing_entries(folder: Path, paths: list[str], ledger: Ledger) -> list[int]:
    """Return the positions of those of the `paths` that exist; the others go into the ledger.

    If many entries of one folder are listed, the folder is read once: a question for each would cost a network disk
    more.
    """
    by_parent: dict[str, list[int]] = {}
    for position, path in enumerate(paths):
        by_parent.setdefault(os.path.dirname(path), []).append(position)
    there: list[int] = []
    for parent, positions in by_parent.items():
        names = None
        if len(positions) > _FEW:
            names = patiently(partial(_names, folder / parent), os.fspath(folder / parent))
        for position in positions:
            path = paths[position]
            if os.path.basename(path) in names if names is not None else _exists(folder, path):
                there.append(position)
            else:
                ledger.leave_out("listed but not there", os.path.join(folder, path))
    return sorted(there)


def _names(folder: Path) -> set[str]:
    """Return the names of the files in `folder`; none if it does not exist."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except (FileNotFoundError, NotADirectoryError):
        return set()


def _is_comment(line: str, folder: Path) -> bool:
    return line.startswith("#") and not any(_exists(folder, text) for text in (line, line.rpartition("\t")[0]) if text)


def _path(text: str, folder: Path) -> str:
    """Return the text without white space around it, unless a file has that space in its name."""
    bare = text.strip(_BLANK)
    return text if bare == text or _exists(folder, text) else bare


def _exists(folder: Path, path: str) -> bool:
    return patiently(lambda: _is_file(folder / path), os.path.join(folder, path))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError as error:
        if is_of_a_moment(error):
            raise
        return False  # the name is too long
    except ValueError:  # the name has a zero byte
        return False


def _first_problem(list_file: Path, path: str) -> str:
    """Say what is wrong with an entry that names no file, and the mend."""
    folder = list_file.parent
    if (folder / path).is_dir():
        return f"{shown(folder / path)} is a folder; give the files in it, or the folder itself in place of the list"
    return _misspelling(list_file, path) or (
        f"{shown(folder / path)} does not exist; use absolute paths or paths relative to the folder of the list, "
        "one a line, without a heading"
    )


def _misspelling(list_file: Path, path: str) -> str | None:
    """Say what is wrong with an entry that has more in it than its file's name, and the mend; None if it has not."""
    folder = list_file.parent
    head, _, tail = path.rpartition("\t")
    if head and _exists(folder, head):
        return f"{shown(path)!r} has a label, {shown(tail.strip())!r}, and the first entry has none; give all or none"
    for mark, kind in ((" ", "a space"), (",", "a comma"), (";", "a semicolon")):
        head, _, tail = path.rpartition(mark)
        if head and _exists(folder, head.strip().strip('"')):
            script = rf"s/{mark}+ *([0-9]+)[[:space:]]*$/\t\1/"
            # The new list lies beside the old one, where its relative paths begin.
            new = list_file.with_name(f"{list_file.stem}-tabs{list_file.suffix}")
            mend = (
                f"sed -E '{script}' {shown(shlex.quote(os.fspath(list_file)))} > {shown(shlex.quote(os.fspath(new)))}"
            )
            return f"{shown(path)!r} is a path, {kind} and {shown(tail.strip())!r}; put a tab before the label: {mend}"
    if _exists(folder, path.strip("\"'")):
        return f"{shown(path)!r} is a path in quotes; write it without them"
    if "\\" in path and _exists(folder, path.replace("\\", "/")):
        return f"{shown(path)!r} has backslashes between folders; write /"
    return None
