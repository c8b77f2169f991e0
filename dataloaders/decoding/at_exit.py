"""Close loaders that are still open when the interpreter ends.

If a thread is inside DALI while the process is taken down, the process aborts about once in ten times.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import weakref
from typing import Protocol


class Closing(Protocol):
    """An object of this type has threads. It may be closed more than once."""

    def close(self) -> None:
        """End all threads."""


_open: weakref.WeakValueDictionary[int, Closing] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def close_at_exit(opened: Closing) -> None:
    """Close ``opened`` at the end of the process, if it lives until then. The object opened last is closed first."""
    _open[next(_numbers)] = opened


@atexit.register
def _close_all() -> None:
    for _, opened in sorted(_open.items(), reverse=True):
        with contextlib.suppress(Exception):  # the process ends whether this works or not
            opened.close()
