"""How many lines a run writes, and whether the time left that they tell is right, under a clock that is not real."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mirl.engine.configuration.config import LogConfig, OptimConfig, RunConfig
from mirl.engine.training.schedule import LINES, Durations
from mirl.engine.training.time_left import SETTLING_STEPS, TimeLeft, count_reports
from mirl.engine.training.window import line_of

ALLOWED = 0.2


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def simulate(total, *, step, start=0.0, report=0.0, every=None, passes=0.0, save=0.0, save_every=0,
             cost=lambda _: 1.0, left=None):  # fmt: skip
    """``[(step, told, true)]`` of a run: seconds left as told after each step, and as they were.

    step: seconds of a step, by its number. start: of the first one, on top. report, every: seconds of a report, steps
    between two. passes: images of a report, in batches. save, save_every: the same of checkpoints, told to nobody.
    cost, left: of a step by its number, and of all that come after one.
    """
    clock = Clock()
    costs = left or (lambda number: total - number)
    left = TimeLeft(clock)
    told, ended = [], []
    for number in range(1, total + 1):
        clock.now += step(number) + (start if number == 1 else 0)
        left.step_ended(cost(number))
        reports = count_reports(every, after=number - 1, total=total) if report else 0
        told.append(left.seconds(steps=costs(number), reports=reports, passes_a_report=passes))
        ended.append(clock.now)
        if save_every and number % save_every == 0:
            clock.now += save
        due = bool(report) and reports > count_reports(every, after=number, total=total)
        clock.now += report if due else 0
        left.reported(report if due else 0.0, shown=due)
    return [(number, seconds, clock.now - at) for number, (seconds, at) in enumerate(zip(told, ended, strict=True), 1)]


def check(run, total):
    """After the first tenth, and as long as there is something left to wait for: a twentieth of the run."""
    looked_at = [row for row in run if row[0] >= max(total / 10, SETTLING_STEPS + 1) and row[0] <= 0.95 * total]
    assert len(looked_at) > total / 2
    for number, told, true in looked_at:
        assert told == pytest.approx(true, rel=ALLOWED), f"step {number} of {total}"


@pytest.mark.parametrize("total", [20, 126, 600, 5000])
@pytest.mark.parametrize("start", [0.0, 90.0])
def test_start_and_compilation_are_no_part_of_what_is_left(total, start):
    check(simulate(total, step=lambda _: 0.5, start=start), total)


@pytest.mark.parametrize("passes_are_right", [1.0, 0.7, 1.5])
def test_evaluations_count_before_the_first_one_too(passes_are_right):
    """Six epochs of 42 steps, each with an evaluation that takes as long as eight steps; the guess of it may be off."""
    guess = passes_are_right * 8 * 3
    check(simulate(252, step=lambda _: 0.5, start=20, report=4.0, every=42, passes=guess), 252)


def test_checkpoints_count():
    check(simulate(1000, step=lambda _: 0.1, save=1.0, save_every=50), 1000)


def test_steps_of_uneven_length():
    noise = np.random.default_rng(0).gamma(4, 0.25, 2000)
    check(simulate(2000, step=lambda number: float(noise[number - 1])), 2000)


def test_a_machine_that_slows_down_is_noticed():
    run = simulate(1000, step=lambda number: 0.1 if number <= 300 else 0.3)
    late = [(told, true) for number, told, true in run if 700 <= number <= 950]
    assert all(told == pytest.approx(true, rel=ALLOWED) for told, true in late)


def test_before_a_step_was_timed_nothing_is_told():
    run = simulate(20, step=lambda _: 0.5)
    assert [told is None for _, told, _ in run] == [number <= SETTLING_STEPS for number in range(1, 21)]
    values = dict.fromkeys(
        ("loss", "lr", "gradient_norm", "images_per_s", "data_wait_percent", "memory_gib"), 1.0
    )  # fmt: skip
    assert line_of({"step": 1, "seconds_left": None, **values}, 20).endswith("left ?")
    assert line_of({"step": 5, "seconds_left": 83.2, **values}, 20).endswith("left 1:23")


@pytest.mark.parametrize(("every", "total"), list(itertools.product([None, 1, 7, 20, 30], [1, 20, 21])))
def test_reports_are_those_that_the_loop_makes(every, total):
    due = [step for step in range(1, total + 1) if step == total or (every is not None and step % every == 0)]
    for after in range(total + 1):
        assert count_reports(every, after=after, total=total) == sum(step > after for step in due)


@pytest.mark.parametrize("total", [*range(1, 400), 93_600, 1_000_003])
def test_a_run_of_any_length_has_sixty_lines_at_most(total):
    optim = OptimConfig(steps=total)
    every = Durations.resolve(optim, RunConfig(), LogConfig(), steps_per_epoch=10).log_every
    lines = count_reports(every, after=0, total=total)
    assert min(total, LINES) / 2 <= lines <= LINES
    asked = Durations.resolve(optim, RunConfig(), LogConfig(log_every=3), steps_per_epoch=10).log_every
    assert asked == 3
