"""Try reads again that fail because the file system does not answer for a moment, not because a file is broken.

A share that goes over to another server answers EIO, ESTALE or a time-out for some seconds, to every read at once. So a
read is tried again with growing waits, afresh from the name, for as long as `PATIENCE_S`. A failure that lasts longer
is either the file's (a bad sector), if other images can be read, or the share's, if none can: `read_image` tells them
apart.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from mirl.dataloaders.errors import ImageError, StorageError, StorageLost

if TYPE_CHECKING:
    from mirl.dataloaders.sources.base import Source

PATIENCE_S = 45.0
OF_A_MOMENT = frozenset(
    getattr(errno, name)
    for name in (
        "EIO", "ESTALE", "ETIMEDOUT", "EREMOTEIO", "ENOTCONN", "ECONNRESET", "ECONNABORTED", "ECONNREFUSED",
        "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "ESHUTDOWN",
    )
    if hasattr(errno, name)
)  # fmt: skip
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.1, 8.0
_OTHERS = 3  # images that are asked before the share counts as gone
T = TypeVar("T")
_log = logging.getLogger(__name__)


def is_of_a_moment(error: OSError) -> bool:
    """Say whether `error` is about the file system rather than about the file."""
    return error.errno in OF_A_MOMENT


class _Outage:
    """An outage knows, over all threads, since when nothing could be read. Its files share one patience."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._since: float | None = None
        # These files failed for the whole patience while others could be read: a bad sector costs the wait once.
        self._given_up: set[str] = set()

    def failed(self, name: str, since: float, error: OSError) -> float:
        """Return the seconds for which `name` may still be tried again; at 0 or less it is given up."""
        with self._lock:
            now = time.monotonic()
            if self._since is None:
                self._since = now
                if name not in self._given_up:
                    _log.warning("%s cannot be read (%s): trying again for %.0f s", name, error.strerror, PATIENCE_S)
            left = 0.0 if name in self._given_up else min(since, self._since) + PATIENCE_S - now
            if left <= 0:
                self._given_up.add(name)
            return left

    def answered(self, name: str) -> None:
        if self._since is None and not self._given_up:  # as almost always: then an image takes no lock
            return
        with self._lock:
            self._since = None
            self._given_up.discard(name)


_outage = _Outage()


def patiently(read: Callable[[], T], name: str, *, afresh: Callable[[], None] | None = None) -> T:
    """Return the result of `read`, tried again while the file system fails for a moment.

    name: of the file, for messages. afresh: called before each new try, to drop open handles.
    StorageError if the failure lasts; any other OSError as it comes.
    """
    since, wait = None, _FIRST_WAIT_S
    while True:
        try:
            result = read()
        except OSError as error:
            if not is_of_a_moment(error):
                raise
            since = time.monotonic() if since is None else since  # a read that works asks no clock
            left = _outage.failed(name, since, error)
            if left <= 0:
                raise StorageError(f"cannot be read: {error.strerror}") from error
            time.sleep(min(wait, left))
            wait = min(2 * wait, _LONGEST_WAIT_S)
            if afresh is not None:
                afresh()
        else:
            _outage.answered(name)
            return result


def find_patiently(find: Callable[[], T], place: str) -> T:
    """Return the result of `find`, which lists files or reads an index; StorageLost if nothing answers."""
    try:
        return patiently(find, place)
    except StorageError as error:
        raise StorageLost(
            f"the file system of the data does not answer ({place} {error}, after {PATIENCE_S:.0f} s of trying)"
        ) from error


def read_image(source: Source, index: int) -> bytes:
    """Read the encoded image `index`. ImageError if this file cannot be read, StorageLost if no file can."""
    try:
        return source.read(index)
    except StorageError as error:
        step = max(1, source.num_images // (_OTHERS + 1))
        others = [(index + step * number) % source.num_images for number in range(1, _OTHERS + 1)]
        if not any(_answers(source, other) for other in others if other != index):
            raise StorageLost(
                f"the file system of the data does not answer ({source.path(index)} {error}, nor can {_OTHERS} other "
                f"images, after {PATIENCE_S:.0f} s of trying)"
            ) from error
    return source.read(index)  # the outage may just be over; if not, this file is at fault


def _answers(source: Source, index: int) -> bool:
    try:
        source.read(index)
    except StorageError:
        return False
    except ImageError:  # the file system has answered
        return True
    return True
