"""Loaders that are still open when the interpreter ends are closed then.

A thread that is inside DALI while the process is taken down ends it by an abort, about once in ten times.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import weakref
from typing import Protocol


class Closing(Protocol):
    """What has threads, and can end them more than once."""

    def close(self) -> None:
        """Ends all threads."""


_open: weakref.WeakValueDictionary[int, Closing] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def close_at_exit(opened: Closing) -> None:
    """Has ``opened`` closed at the end of the process, if it lives until then; what was opened last is closed first."""
    _open[next(_numbers)] = opened


@atexit.register
def _close_all() -> None:
    for _, opened in sorted(_open.items(), reverse=True):
        with contextlib.suppress(Exception):  # the process ends whatever it finds
            opened.close()
