"""How long a report of several parts will take, told before it begins and while it goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Advance = Callable[[int], None]


def ignore(units: int) -> None:
    """Take no note of progress."""


@dataclass(kw_only=True)
class Part:
    """``units`` pieces of work of ``seconds`` each: a guess before the first is done, then what they took.

    unit: the name of one, for a line of progress.
    """

    name: str
    unit: str
    units: int
    seconds: float
    done: int = 0

    @property
    def left(self) -> float:
        """Seconds."""
        return (self.units - self.done) * self.seconds


class Forecast:
    """Parts that are done one after the other. A line is said now and then, never twice within ``every`` seconds."""

    def __init__(
        self,
        parts: Sequence[Part],
        *,
        say: Callable[[str], None],
        every: float = 10.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """clock: seconds from any origin."""
        self.parts, self._say, self._every, self._clock = list(parts), say, every, clock
        self._began = self._said = clock()

    @property
    def seconds(self) -> float:
        """What is left of all parts."""
        return sum(part.left for part in self.parts)

    def __str__(self) -> str:
        """The whole and its parts, as minutes and seconds."""
        parts = ", ".join(f"{part.name} {minutes(part.left)}" for part in self.parts)
        return f"about {minutes(self.seconds)}: {parts}"

    def begin(self, name: str) -> Advance:
        """Begin the part called ``name``; what is returned is told how many of its units were done since."""
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
    """M:SS, or H:MM:SS."""
    whole, seconds = divmod(round(seconds), 60)
    hours, whole = divmod(whole, 60)
    return f"{hours}:{whole:02d}:{seconds:02d}" if hours else f"{whole}:{seconds:02d}"


def timed(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of ``call``, which leaves no work of the device behind: it reads a result."""
    began = clock()
    call()
    return clock() - began
