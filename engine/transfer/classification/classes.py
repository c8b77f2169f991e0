"""Say whether two labelled sets mean the same by their class numbers. This needs no torch."""

from __future__ import annotations

from collections.abc import Sequence

from mirl.dataloaders.errors import ImageError
from mirl.dataloaders.sources.base import Source
from mirl.dataloaders.sources.class_names import CLASS_NAMES
from mirl.errors import UserError


def require_same_classes(ours: Sequence[str] | None, theirs: Sequence[str] | None, *, train: str, val: str) -> None:
    """Raise UserError if two sets number their classes differently: their labels would mean different things.

    Class names come from folders, or from a file beside shards. A list of paths has numbers alone (None), which must
    agree by themselves. Names on one side alone are refused: folders called 0 ... 11 are numbered as text, 0, 1, 10,
    11, 2 ... ``train``, ``val``: the sets, for the message.
    """
    if ours is not None and theirs is None or ours is None and theirs is not None:
        named, bare = (train, val) if theirs is None else (val, train)
        raise UserError(
            f"the classes of {named} have names and those of {bare} are numbers alone, which cannot be compared: give "
            "both as class folders, or both as lists with class numbers (of shards, write the names into "
            f"{CLASS_NAMES} beside them, line n for class n)"
        )
    if ours is None or theirs is None or list(ours) == list(theirs):
        return
    extra, missing = sorted(set(theirs) - set(ours)), sorted(set(ours) - set(theirs))
    parts = [f"{val} has {_some(extra)}, which {train} lacks"] if extra else []
    parts += [f"{val} lacks {_some(missing)}"] if missing else []
    raise UserError(f"the classes of {train} and {val} differ: {'; '.join(parts)}; give sets of the same classes")


def require_labels(source: Source, num_classes: int) -> None:
    """Raise UserError that names the first sample of an evaluation set whose label is none of ``num_classes``."""
    for index in range(source.num_images):
        try:
            label = source.label(index)
        except ImageError as error:
            raise UserError(f"val: {source.path(index)}: {error}; mend this sample or leave it out") from error
        if not 0 <= label < num_classes:
            raise UserError(f"val has label {label} and there are {num_classes} classes: give sets of the same classes")


def _some(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:3]))
    return f"class {shown}" if len(names) == 1 else f"{len(names)} classes ({shown}{', ...' if len(names) > 3 else ''})"
