"""Signals, a time limit, and the death of the launcher ask a run to stop.

They set a flag; the loop acts on it between steps.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType, TracebackType
from typing import Self

import psutil

from mirl.engine.errors import is_command

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Launchers:
    """These processes started this one: its parent and, above DeepSpeed's launch.py, the `deepspeed` runner.

    The runner forwards no signal: ended by SIGTERM, it leaves launch.py and all workers to themselves. Its end shows
    when launch.py gets another parent. Above any other parent there may be a shell that is free to go.
    """

    def __init__(self) -> None:
        # (process, its parent when this object was made)
        self._parents = {os.getpid(): os.getppid()}
        try:
            launcher = psutil.Process(os.getppid())
            if "deepspeed.launcher.launch" in launcher.cmdline():
                self._parents[launcher.pid] = launcher.ppid()
        except psutil.Error:
            pass  # the parent is gone already: `gone` sees that by itself

    @property
    def gone(self) -> bool:
        for process, parent in self._parents.items():
            try:
                if psutil.Process(process).ppid() != parent:
                    return True
            except psutil.Error:
                return True
        return False


# Made when the program starts, so that a launcher that ends while this process still imports is noticed too.
LAUNCHERS = Launchers()


class StopRequest:
    """While entered, SIGTERM, SIGUSR1 and the first SIGINT set `requested` instead of ending the process.

    A second SIGINT interrupts at once. A worker whose launcher is gone asks to stop too, since nobody else would end
    it. A command that ends by an exception stays so until it is gone.
    """

    def __init__(self, *, max_minutes: float = 0.0) -> None:
        self._deadline = time.monotonic() + 60 * max_minutes if max_minutes else None
        self._signal: signal.Signals | None = None
        self._previous: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        return self.reason is not None

    @property
    def reason(self) -> str | None:
        """Say why this process should stop; None while it should not."""
        if self._signal is not None:
            return f"{self._signal.name} came"
        if self._deadline is not None and time.monotonic() > self._deadline:
            return "the time limit of --max-minutes was reached"
        if LAUNCHERS.gone:
            return "the launcher is gone"
        return None

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A launcher that sees one rank fail sends SIGTERM to the others, which may be about to say why they end.
        if error is not None and is_command():
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = signal.Signals(number)
