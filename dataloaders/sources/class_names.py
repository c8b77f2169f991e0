"""Read and write class names beside tar shards, whose `cls` parts hold numbers alone: line n names class n.

Two sets that were numbered apart may give one class two numbers. If both have names, the difference is seen, and joined
sets are numbered by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from mirl.dataloaders.sources.manifest import atomic_writer, escape, unescape
from mirl.errors import UserError

CLASS_NAMES = "mirl-classes.txt"


def write_class_names(folder: Path, classes: Sequence[str]) -> None:
    """Write the names of classes 0, 1, 2 ... into a folder of shards, atomically."""
    with atomic_writer(folder / CLASS_NAMES) as file:
        file.writelines(f"{escape(name)}\n" for name in classes)


def class_names_beside(shards: Iterable[Path]) -> list[str] | None:
    """Read the class names that lie in the folders of the shards; None if the folders have none.

    UserError if the folders name different classes: one number would then stand for two of them.
    """
    found: dict[Path, list[str] | None] = {}
    for folder in {shard.parent for shard in shards}:
        path = folder / CLASS_NAMES
        found[folder] = _read(path) if path.is_file() else None
    folders = sorted(found)
    for other in folders[1:]:
        if found[other] != found[folders[0]]:
            raise UserError(
                f"the classes of the shards in {folders[0]} and {other} differ by their {CLASS_NAMES}: "
                "give the folders one by one, so that they are joined by name"
            )
    return found[folders[0]] if folders else None


def _read(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8", errors="surrogateescape")
    names = [unescape(line) for line in text.removeprefix("\ufeff").split("\n")]
    while names and not names[-1]:
        names.pop()
    if not names or len(set(names)) < len(names):
        raise UserError(f"{path} names {len(names)} classes, {len(set(names))} of them different: give one name a line")
    return names
