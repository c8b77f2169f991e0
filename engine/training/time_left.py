"""How long a run still takes, from the times of its own steps and reports."""

from __future__ import annotations

import time
from collections.abc import Callable

# The first steps wait for compilation, the first batches and the first allocations, which come once.
SETTLING_STEPS = 2
# A pass without gradients, in passes with them: the backward pass costs twice the forward pass.
FORWARD_SHARE = 1 / 3


class TimeLeft:
    """An average over the steps so far in which recent ones weigh more, and the last report that was timed.

    The weight of a step grows linearly with its number, so that a change of speed is half forgotten after 1.4 times as
    many steps, however long the run is. Checkpoints count as a part of the steps, reports do not.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """clock: seconds from any origin."""
        self._clock = clock
        self._ended: float | None = None
        self._steps = 0
        self._step_seconds = 0.0
        self._report_seconds: float | None = None

    def step_ended(self, cost: float = 1.0) -> None:
        """Note the end of an optimiser step. cost: what it costs beside others, in any unit; see `seconds`."""
        now = self._clock()
        self._steps += 1
        timed = self._steps - SETTLING_STEPS
        if timed > 0 and self._ended is not None:
            self._step_seconds += 2 / (timed + 1) * ((now - self._ended) / cost - self._step_seconds)
        self._ended = now

    def reported(self, seconds: float, *, shown: bool) -> None:
        """Note that ``seconds`` went into the task's report. shown: it was due, rather than asked for in vain."""
        if self._ended is not None:
            self._ended += seconds
        if shown:
            self._report_seconds = seconds

    def seconds(self, *, steps: float, reports: int, passes_a_report: float) -> float | None:
        """The time of ``steps`` steps and ``reports`` reports, in seconds; None until a step has been timed.

        steps: where they differ in cost, the sum of their costs in the unit of `step_ended`; reports are of cost 1.
        passes_a_report: images of a report, as a multiple of those of a step; by it a report is estimated until one has
        been timed.
        """
        if self._steps <= SETTLING_STEPS:
            return None
        report = self._report_seconds
        if report is None:
            report = passes_a_report * FORWARD_SHARE * self._step_seconds
        return steps * self._step_seconds + reports * report


def count_reports(every: int | None, *, after: int, total: int) -> int:
    """How many of the steps ``after`` + 1 ... ``total`` end with a report: multiples of ``every``, and the last."""
    regular = 0 if every is None else total // every - after // every
    last = after < total and (every is None or total % every != 0)
    return regular + last
