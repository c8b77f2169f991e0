"""Check the numbers of a section of settings: each is finite and not too large. Sections of every room use this.

A comparison with nan is false, so no check of the form ``value < 0`` would find a nan.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from mirl.errors import UserError

LARGEST = 3.4e38  # float32, in which everything is computed, can hold no more
LARGEST_INTEGER = 2**63 - 1


def require_finite(name: str, value: Any) -> None:
    """Refuse a float, or a tuple or list with one, that is nan, infinite or too large for float32.

    Raises:
        UserError: a number is one of these. The message names the setting, its value and the flag.
    """
    for part in value if isinstance(value, tuple | list) else (value,):
        if isinstance(part, float) and not abs(part) <= LARGEST:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{name} is {_shown(value)}: give {flag} finite numbers, at most {LARGEST:g} in size")


def _shown(value: Any) -> str:
    return " ".join(f"{part:g}" for part in (value if isinstance(value, tuple | list) else (value,)))


class Section:
    """A section is a frozen dataclass of settings. It checks its numbers when it is made, then calls `check`.

    A subclass has a `check` in place of ``__post_init__``, so that no subclass can leave the numbers unchecked. The
    metadata ``any_size`` of a field allows integers that do not fit into 64 bits.

    Raises:
        TypeError: a subclass defines ``__post_init__``.
        UserError: a number is not finite or too large. `check` may raise it too.
    """

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "__post_init__" in cls.__dict__:
            raise TypeError(f"{cls.__name__} has a __post_init__: a section of settings has check() in its place")

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):  # type: ignore[arg-type]  # a subclass is a dataclass
            value = getattr(self, item.name)
            require_finite(item.name, value)
            whole = isinstance(value, int) and not item.metadata.get("any_size")
            if whole and abs(value) > LARGEST_INTEGER:
                flag = "--" + item.name.replace("_", "-")
                raise UserError(f"{item.name} has {len(str(abs(value)))} digits: give {flag} at most {LARGEST_INTEGER}")
        self.check()

    def check(self) -> None:
        """Raise UserError if the settings do not fit together."""
