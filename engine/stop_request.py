"""Requests to stop: signals, a time limit, and the death of the launcher. They set a flag; the loop acts on it between
steps.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType, TracebackType
from typing import Self

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """While entered, SIGTERM, SIGUSR1 and the first SIGINT set `requested` instead of ending the process.

    A second SIGINT interrupts at once. A worker whose parent process is gone asks to stop too: nobody would ever end
    it.
    """

    def __init__(self, *, max_minutes: float = 0.0) -> None:
        self._deadline = time.monotonic() + 60 * max_minutes if max_minutes else None
        self._parent = os.getppid()
        self._signal: signal.Signals | None = None
        self._previous: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        return self.reason is not None

    @property
    def reason(self) -> str | None:
        """Why this process should stop, None while it should not."""
        if self._signal is not None:
            return f"{self._signal.name} came"
        if self._deadline is not None and time.monotonic() > self._deadline:
            return "the time limit of --max-minutes was reached"
        if os.getppid() != self._parent:
            return "the launcher is gone"
        return None

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = signal.Signals(number)
