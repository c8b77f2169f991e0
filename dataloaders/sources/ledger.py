"""Keep the account of a data set: how many of its files are images, and why each of the others is not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

_KINDS_SHOWN = 8


class Ledger:
    """A ledger counts images, and left-out files by reason; images + left_out is all that was found.

    unit: the things counted, "files" or "members of 2 tar shards". A reason follows its count: "3 .json", "2 hidden".
    names: (path, reason) of everything left out, kept only with every_name: sidecar files may be millions.
    notes: further clauses for the reader.
    """

    def __init__(self, unit: str = "files", *, every_name: bool = False) -> None:
        self.unit, self.images = unit, 0
        self.reasons: Counter[str] = Counter()
        self.names: list[tuple[str, str]] | None = [] if every_name else None
        self.notes: list[str] = []

    @property
    def left_out(self) -> int:
        return sum(self.reasons.values())

    @property
    def total(self) -> int:
        return self.images + self.left_out

    def leave_out(self, reason: str, path: str, member: str | None = None) -> None:
        """Record one entry that is no image of this data set: a file, or the member of a shard."""
        self.reasons[reason] += 1
        if self.names is not None:
            self.names.append((path if member is None else f"{path}::{member}", reason))

    def forget(self, reason: str, count: int, paths: set[str]) -> None:
        """Take back `count` entries, those of `paths`, that are part of the data set after all."""
        self.reasons[reason] -= min(count, self.reasons[reason])
        self.reasons = +self.reasons
        if self.names is not None:
            self.names = [(path, why) for path, why in self.names if path not in paths]

    def __str__(self) -> str:
        """Say ``N images from M files (K left out: ...)``."""
        unit = self.unit.removesuffix("s") if self.total == 1 and self.unit == "files" else self.unit
        text = f"{self.images} image{'s' if self.images != 1 else ''} from {self.total} {unit}"
        if self.reasons:
            common = self.reasons.most_common()
            shown = [f"{count} {reason}" for reason, count in common[:_KINDS_SHOWN]]
            if rest := common[_KINDS_SHOWN:]:
                shown.append(f"{sum(count for _, count in rest)} of {len(rest)} other kinds")
            text += f" ({self.left_out} left out: {', '.join(shown)})"
        return "; ".join([text, *self.notes])


def join_ledgers(ledgers: Iterable[Ledger]) -> Ledger:
    """Make one account of several parts."""
    parts = list(ledgers)
    units = list(dict.fromkeys(part.unit for part in parts))
    joined = Ledger(" and ".join(units), every_name=all(part.names is not None for part in parts))
    for part in parts:
        joined.images += part.images
        joined.reasons.update(part.reasons)
        joined.notes += [note for note in part.notes if note not in joined.notes]
        if joined.names is not None:
            joined.names += part.names or []
    return joined
