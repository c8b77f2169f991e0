"""End a run that hangs: if no step ends for too long, say where every thread stands and leave."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from types import TracebackType
from typing import Self

from mirl.engine.errors import EXIT_HUNG

GRACE_S = 20.0  # time for the orderly report, before the report that needs no interpreter


class Watchdog:
    """While entered, a thread ends this process with exit code 70 once `beat` was not called for ``minutes``.

    Stacks of all threads go to stderr, each line marked with the rank. A rank that waits for a hung one is ended too,
    so the launcher of every host sees its workers leave. If even the watchdog's thread cannot run, because a call that
    never returns holds the interpreter, faulthandler's own thread dumps the stacks and ends the process with code 1.

    ``minutes`` 0 turns it off.
    """

    def __init__(self, *, minutes: float, rank: int) -> None:
        self.limit_s, self.rank = 60 * minutes, rank
        self._doing = "the first step"
        self._last = time.monotonic()
        self._leave = threading.Event()
        self._thread: threading.Thread | None = None

    def beat(self, doing: str) -> None:
        """Note that something was finished; ``doing`` is what comes next, for the report."""
        self._doing, self._last = doing, time.monotonic()

    def __enter__(self) -> Self:
        if self.limit_s:
            self._last = time.monotonic()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._leave.set()
            self._thread.join()
            self._thread = None

    def _watch(self) -> None:
        poll_s = min(10.0, self.limit_s / 10)
        try:
            while not self._leave.wait(poll_s):
                left = self.limit_s - (time.monotonic() - self._last)
                if left <= 0:
                    self._end()
                faulthandler.dump_traceback_later(left + poll_s + GRACE_S, exit=True)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _end(self) -> None:
        faulthandler.dump_traceback_later(GRACE_S, exit=True)  # stderr itself may block
        silent_s = time.monotonic() - self._last
        report = (
            f"hung: nothing was finished for {silent_s:.0f} s, in {self._doing} (--watchdog-minutes "
            f"{self.limit_s / 60:g}); stacks of all threads:\n{stacks()}"
            "checkpoints are intact: the same command with --resume auto goes on"
        )
        marked = "".join(f"[rank {self.rank}] {line}\n" for line in report.splitlines())
        with contextlib.suppress(OSError, ValueError):  # if nobody reads stderr any more, end the rank all the same
            os.write(sys.stderr.fileno(), marked.encode())
        os._exit(EXIT_HUNG)


def stacks() -> str:
    """Return where every thread of this process stands, most recent call first."""
    descriptor = os.memfd_create("stacks")  # faulthandler needs a descriptor; it is memory, because a disk may hang
    try:
        faulthandler.dump_traceback(descriptor, all_threads=True)
        size = os.lseek(descriptor, 0, os.SEEK_CUR)
        return os.pread(descriptor, size, 0).decode(errors="replace")
    finally:
        os.close(descriptor)
