"""Tell how long a report of several parts will take, before it begins and while it goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Advance = Callable[[int], None]


def ignore(units: int) -> None:
    """Take no note of progress."""


@dataclass(kw_only=True)
class Part:
    """A part has ``units`` pieces of work of ``seconds`` each.

    seconds: a guess before the first is done, then the measured mean. unit: the name of one, for a line of progress.
    """

    name: str
    unit: str
    units: int
    seconds: float
    done: int = 0

    @property
    def left(self) -> float:
        """Return the seconds that are left."""
        return (self.units - self.done) * self.seconds


class Forecast:
    """The parts are done one after the other. A line is said now and then, never twice within ``every`` seconds."""

    def __init__(
        self,
        parts: Sequence[Part],
        *,
        say: Callable[[str], None],
        every: float = 10.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Start the clock. clock: seconds from any origin."""
        self.parts, self._say, self._every, self._clock = list(parts), say, every, clock
        self._began = self._said = clock()

    @property
    def seconds(self) -> float:
        """Return the seconds that are left of all parts."""
        return sum(part.left for part in self.parts)

    def __str__(self) -> str:
        """Return the whole and its parts, as minutes and seconds."""
        parts = ", ".join(f"{part.name} {minutes(part.left)}" for part in self.parts)
        return f"about {minutes(self.seconds)}: {parts}"

    def begin(self, name: str) -> Advance:
        """Begin the part called ``name``; return a function to tell how many more of its units are done."""
        part = next(part for part in self.parts if part.name == name)
        self._began = self._clock()

        def advance(units: int) -> None:
            part.done += units
            now = self._clock()
            part.seconds = (now - self._began) / part.done
            if now - self._said >= self._every and self.seconds > 0:
                self._said = now
                self._say(f"  {part.unit} {part.done} of {part.units}, left {minutes(self.seconds)}")

        return advance


def minutes(seconds: float) -> str:
    """Format seconds as M:SS, or H:MM:SS."""
    whole, seconds = divmod(round(seconds), 60)
    hours, whole = divmod(whole, 60)
    return f"{hours}:{whole:02d}:{seconds:02d}" if hours else f"{whole}:{seconds:02d}"


def timed(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Measure the seconds of ``call``, which must read a result, so that no work of the device is left behind."""
    began = clock()
    call()
    return clock() - began
