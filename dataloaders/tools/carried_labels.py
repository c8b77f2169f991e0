"""Number the classes of a copy of a data set: one numbering for all splits, with names if they are known."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mirl.dataloaders.sources.base import Source
from mirl.errors import UserError


@dataclass(frozen=True)
class Split:
    """A split is one part of a data set. name: its folder below the root, "" for the root. unlabelled: why, or ""."""

    name: str
    source: Source
    unlabelled: str = ""


@dataclass(frozen=True)
class Numbering:
    """A numbering has the classes of a copy. names: by number; None if the source has numbers alone or no labels.

    unlabelled: the reason by the name of each split without labels. labelled: whether any split has labels.
    """

    names: list[str] | None
    labelled: bool
    unlabelled: dict[str, str] = field(default_factory=dict)

    def of(self, split: Split) -> Callable[[int], int] | None:
        """Return the function from an image of a split to its class number in the copy; None without labels."""
        if split.unlabelled:
            return None
        if self.names is None or split.source.classes is None:
            return split.source.label
        number = {name: label for label, name in enumerate(self.names)}
        renumbered = [number[name] for name in split.source.classes]
        return lambda index: renumbered[split.source.label(index)]

    def digest(self) -> str:
        """Return a text that differs if the numbering does."""
        if not self.labelled:
            return "none"
        if self.names is None:
            return "numbers of the source"
        names = "\0".join(self.names).encode(errors="surrogateescape")
        return f"{len(self.names)} classes {hashlib.blake2b(names, digest_size=4).hexdigest()}"

    def __str__(self) -> str:
        kept = [] if not self.labelled else [f"{len(self.names)} classes by name" if self.names else "class numbers"]
        lost = [f"{name + ': ' if name else ''}no labels ({reason})" for name, reason in self.unlabelled.items()]
        return "; ".join(kept + lost)


def open_labelled(name: str, open_split: Callable[[bool], Source]) -> Split:
    """Open a split with labels, or without if it has none. ``open_split`` is called with whether to ask for labels.

    UserError if the split cannot be opened without labels either.
    """
    plain = open_split(False)
    try:
        labelled = open_split(True)
    except UserError as error:
        return Split(name, plain, str(error))
    plain.close()
    return Split(name, labelled)


def one_numbering(splits: Sequence[Split]) -> Numbering:
    """Return the numbering of all splits: classes of one name get one number, also if a split lacks the class.

    UserError if some splits name their classes and others have numbers alone, because the two cannot be compared.
    """
    unlabelled = {split.name: split.unlabelled for split in splits if split.unlabelled}
    labelled = [split for split in splits if not split.unlabelled]
    named = [split.source.classes for split in labelled if split.source.classes is not None]
    if named and len(named) < len(labelled):
        with_names = next(split.name for split in labelled if split.source.classes is not None)
        without = next(split.name for split in labelled if split.source.classes is None)
        raise UserError(
            f"split {with_names} has class names and split {without} numbers alone, which cannot be compared: "
            "give both as class folders or both as shards with numbers, or prepare them one by one"
        )
    if not named:
        return Numbering(None, bool(labelled), unlabelled)
    if all(classes == named[0] for classes in named):
        return Numbering(list(named[0]), True, unlabelled)
    return Numbering(sorted({name for classes in named for name in classes}), True, unlabelled)
