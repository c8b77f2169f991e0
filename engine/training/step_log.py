"""What a run tells of its steps: the figures of a log line, and the names behind a step that was skipped."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from mirl.dataloaders import TrainLoader
from mirl.dataloaders.sources.paths import shown
from mirl.engine.distributed.ds_engine import TrainEngine
from mirl.engine.distributed.launch import Ranks
from mirl.engine.training.image_sizes import StepSizes
from mirl.engine.training.measured import Measured
from mirl.engine.training.run_folder import Progress
from mirl.engine.training.run_log import RunLog, memory_gib, peak_flops
from mirl.engine.training.schedule import Durations, Schedule
from mirl.engine.training.task import Task
from mirl.engine.training.time_left import TimeLeft
from mirl.engine.training.window import Window, line_of

FILES_NAMED = 4  # of a batch that gave a non-finite loss
RECORD_SECONDS = 60.0  # between records of a run whose lines are further apart


@dataclass(kw_only=True)
class SeenMicroBatch:
    """One micro-batch of the current step: enough to say which files gave a non-finite loss."""

    terms: Tensor
    sample_ids: np.ndarray


class StepLog:
    """The log lines of one run. All ranks make the same calls in the same order; rank 0 writes."""

    def __init__(
        self,
        *,
        ranks: Ranks,
        engine: TrainEngine,
        task: Task,
        loader: TrainLoader,
        durations: Durations,
        schedule: Schedule,
        log: RunLog,
        progress: Progress,
        accumulation: int,
        batch_size: int,
        sizes: StepSizes,
    ) -> None:
        """batch_size: images of a step, on all ranks. sizes: of the images of each step."""
        self._ranks, self._engine, self._task, self._loader = ranks, engine, task, loader
        self._durations, self._schedule, self._log, self._progress = durations, schedule, log, progress
        self._accumulation, self._batch_size, self._sizes = accumulation, batch_size, sizes
        self._time_left = TimeLeft()
        self._peak_flops = peak_flops(ranks.device)
        self.measured = Measured()
        self.window, self._written = self._new_window(), time.perf_counter()

    def _new_window(self) -> Window:
        return Window(wait_started=self._loader.wait_seconds)

    def drop_window(self) -> None:
        """Forget the steps since the last record, which are done again."""
        self.window = self._new_window()

    @property
    def overdue(self) -> bool:
        """Whether this rank has steps that have waited long for a record. Ranks agree before they write one."""
        return self.window.loss is not None and time.perf_counter() - self._written > RECORD_SECONDS

    def add(self, loss: Tensor, terms: Tensor, images: int) -> None:
        """Count a micro-batch of so many images of the step in progress."""
        step = self._progress.step
        cost, plain_cost = self._sizes.cost(step), self._sizes.cost(step, plain=True)
        self.window.add(loss, terms, images, cost=cost, plain_cost=plain_cost)

    def step_ended(self) -> None:
        """Note the end of an optimiser step."""
        self._time_left.step_ended(self._sizes.cost(self._progress.step - 1))

    def reported(self, seconds: float, *, step: int) -> None:
        """Note that the task's report after ``step`` took ``seconds``, which are no part of a step."""
        self.window.leave_out(seconds)
        self._time_left.reported(seconds, shown=self._reports(step - 1) > self._reports(step))

    def _reports(self, step: int) -> int:
        return self._task.reports_after(step, self._durations.total_steps)

    def write(self, *, line: bool = True) -> None:
        """Write a record, with ``line`` a line too, and begin a new window. Only here the host waits for the device."""
        step, window = self._progress.step, self.window
        reduced = window.reduce(self._ranks, self._task.term_names, len(self._loader.bad_images))
        values: dict[str, Any] = {"step": step} | reduced
        values |= window.speed(self._ranks, self._accumulation, self._loader.wait_seconds)
        values |= {
            "lr": self._schedule.lr(max(0, self._progress.applied_steps - 1)),
            "gradient_norm": self._engine.gradient_norm(),
            "memory_gib": memory_gib(self._ranks.device),
            "images": self._progress.images,
            "epoch": self._progress.images / self._loader.num_images,
            "skipped_steps": step - self._progress.applied_steps,
        }
        if self._peak_flops:
            images_per_s = values["images_per_s"] / self._ranks.world_size
            for key, gflops, cost in (
                ("mfu_percent", self._task.gflops_per_image, window.cost),
                ("plain_mfu_percent", self._task.plain_gflops_per_image, window.plain_cost),
            ):
                gflops *= cost / window.micro_batches
                values[key] = 100 * images_per_s * gflops * 1e9 / self._peak_flops
        total = self._durations.total_steps
        # The report after this step is still to come where a line is written, and done where a late record is.
        values["seconds_left"] = self._time_left.seconds(
            steps=self._sizes.cost_between(step, total),
            reports=self._reports(step - 1 if line else step),
            passes_a_report=self._task.report_images / self._batch_size,
        )
        if self._sizes.cost(step - 1) == 1:  # what is predicted is a step of the whole size
            self.measured.add(values)
        self._log.metrics(values, line_of(values, total) if line else None)
        self.window, self._written = self._new_window(), time.perf_counter()

    def skipped_step(self, seen: list[SeenMicroBatch], spike: str | None = None) -> str:
        """Tell which term, rank and files made a step non-finite on every rank; returns these details.

        ``spike``: the details of a step that was finite, and skipped for its band; they are told already.
        """
        if spike is not None:
            self._log.event(
                "skipped_step", self._progress.step, in_a_row=self._progress.nonfinite_in_a_row, detail=spike
            )
            return spike
        bad: set[str] = set()
        files: list[str] = []
        for item in seen:
            names = [
                name
                for name, finite in zip(self._task.term_names, item.terms.isfinite().tolist(), strict=True)
                if not finite
            ]
            if names:
                bad.update(names)
                files += map(shown, self._loader.suspects(item.sample_ids)[:FILES_NAMED])
        reports = self._ranks.gather((sorted(bad), files[:FILES_NAMED]))
        where = [
            f"rank {rank}: loss of {', '.join(names)}, files {', '.join(named)}, ..."
            for rank, (names, named) in enumerate(reports)
            if names
        ]
        detail = "; ".join(where) or "every loss was finite, a gradient was not"
        step, in_a_row = self._progress.step, self._progress.nonfinite_in_a_row
        self._log.say(f"step {step} was skipped, {in_a_row} in a row: not finite ({detail})")
        self._log.event("skipped_step", step, in_a_row=in_a_row, detail=detail)
        return detail
