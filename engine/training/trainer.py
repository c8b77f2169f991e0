"""The training loop: loader -> task -> loss -> step, with log, checkpoints and an orderly end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mirl.dataloaders import TrainLoader
from mirl.engine.checkpoints.writer import CheckpointWriter
from mirl.engine.configuration.config import Config
from mirl.engine.distributed.ds_engine import Fragment, TrainEngine
from mirl.engine.distributed.launch import Ranks
from mirl.engine.distributed.stop_request import StopRequest
from mirl.engine.distributed.watchdog import Watchdog
from mirl.engine.errors import EXIT_PREEMPTED, Diverged, NotSaved, Preempted, UserError
from mirl.engine.training.run_log import RunLog, memory_gib, peak_flops
from mirl.engine.training.schedule import Durations
from mirl.engine.training.task import Place, Task
from mirl.engine.training.window import Window, line_of

FILES_NAMED = 4  # of a batch that gave a non-finite loss


@dataclass(kw_only=True)
class Progress:
    """How far a run has come. ``step`` counts batches, ``applied_steps`` those whose update was applied."""

    step: int = 0
    applied_steps: int = 0
    nonfinite_in_a_row: int = 0
    images: int = 0


@dataclass(kw_only=True)
class Seen:
    """One micro-batch of the current step: enough to say which files gave a non-finite loss."""

    terms: Tensor
    sample_ids: np.ndarray


class Trainer:
    """Runs the steps of one rank. All ranks make the same calls in the same order."""

    def __init__(
        self,
        config: Config,
        *,
        ranks: Ranks,
        engine: TrainEngine,
        task: Task,
        loader: TrainLoader,
        durations: Durations,
        writer: CheckpointWriter,
        log: RunLog,
        progress: Progress,
        micro_batch: int,
        accumulation: int,
    ) -> None:
        self.config, self.ranks, self.engine, self.task, self.loader = config, ranks, engine, task, loader
        self.durations, self.writer, self.log, self.progress = durations, writer, log, progress
        self.micro_batch, self.accumulation = micro_batch, accumulation
        self.schedule = durations.schedule(config.optim)
        self.stop = StopRequest(max_minutes=config.run.max_minutes)
        self.watchdog = Watchdog(minutes=config.run.watchdog_minutes, rank=ranks.rank)
        self._started = time.perf_counter()
        self._peak = peak_flops(ranks.device)
        self._checkpointed_step = progress.step
        self._seen: list[Seen] = []
        self._parameter_shapes: dict[str, list[int]] = {}

    def run(self) -> None:
        """Train to the last step.

        Raises:
            Preempted: a signal or the time limit ended the run; its state is saved.
            Diverged: too many steps in a row were not finite; the last checkpoint is intact.
            NotSaved: the run is over and its last checkpoint could not be written.
        """
        try:
            # The signals are held until the last checkpoint is written; the watchdog sees the end of the run too.
            with self.stop, self.watchdog:
                self._run()
        except BaseException:
            self.writer.abandon()
            raise

    def _run(self) -> None:
        window = self._new_window()
        while self.progress.step < self.durations.total_steps:
            applied = self._step(window)
            step = self.progress.step
            self.log.advance(step)
            if not applied:
                self._after_skipped_step()
            last = step == self.durations.total_steps
            if step % self.durations.log_every == 0 or last:
                self._log(window)
                window = self._new_window()
            # Saved first: whatever an evaluation runs into, the step is not lost.
            if step % self.durations.checkpoint_every == 0 or last:
                self.save()
            began = time.perf_counter()
            self.task.report(step, last=last, interrupted=self._interrupted)
            window.started += time.perf_counter() - began  # pictures and evaluations are no part of a step
            self._tell_of_checkpoints()
            stop, too_many_bad = self.ranks.agree_max([float(self.stop.requested), float(self.loader.too_many_bad)])
            if too_many_bad:
                self._refuse_bad_images()
            if stop and not last:
                self._leave_early()
            self.watchdog.beat(f"step {step + 1}")
        self.finish_saving()

    def _interrupted(self) -> bool:
        """Whether a long report should end early, on all ranks alike; a sign of life for the watchdog."""
        self.watchdog.beat("an evaluation")
        return bool(self.ranks.agree_max([float(self.stop.requested)])[0])

    # --- one step

    def _step(self, window: Window) -> bool:
        """One optimiser step over all micro-batches of the effective batch; False when it was skipped."""
        lr = self.schedule.lr(self.progress.applied_steps)
        seen: list[Seen] = []
        applied = None
        for part in range(self.accumulation):
            batch = self._next_batch()
            # The place of this micro-batch in the effective batch, as mirl.dataloaders.order.StepPlan divides it.
            first = (part * self.ranks.world_size + self.ranks.rank) * self.micro_batch
            loss, terms = self.task.forward(batch, Place(step=self.progress.step, first=first))
            self.engine.backward(loss)
            applied = self.engine.step(lr)
            window.add(loss, terms, self.micro_batch)
            seen.append(Seen(terms=terms, sample_ids=batch.sample_ids))
        assert applied is not None, "DeepSpeed did not reach the accumulation boundary"
        self.progress.step += 1
        self.progress.images += self.config.optim.batch_size
        self._seen = seen
        self.task.after_step(applied)
        if applied:
            self.progress.applied_steps += 1
            self.progress.nonfinite_in_a_row = 0
        else:
            self.progress.nonfinite_in_a_row += 1
        return applied

    def _next_batch(self) -> Any:
        """The next micro-batch, or the loader's error on every rank together."""
        batch, problem = None, None
        try:
            batch = self.loader.next_micro_batch()
        except (ValueError, OSError, RuntimeError) as error:
            problem = error
        if self.ranks.world_size > 1:
            (failed,) = self.ranks.agree_max([float(problem is not None)])
            if failed:
                problems = self.ranks.gather(str(problem) if problem else None)
                self.writer.wait()
                rank, text = next((rank, text) for rank, text in enumerate(problems) if text)
                raise UserError(f"rank {rank}: {text}") from problem
        elif problem is not None:
            self.writer.wait()
            raise problem
        return batch

    def _after_skipped_step(self) -> None:
        """Name pair, rank and files of a step that was skipped on every rank; stop all ranks after too many in a
        row.
        """
        bad: set[str] = set()
        files: list[str] = []
        for item in self._seen:
            names = [
                name
                for name, finite in zip(self.task.term_names, item.terms.isfinite().tolist(), strict=True)
                if not finite
            ]
            if names:
                bad.update(names)
                files += self.loader.paths(item.sample_ids[:FILES_NAMED])
        reports = self.ranks.gather((sorted(bad), files[:FILES_NAMED]))
        step, in_a_row = self.progress.step, self.progress.nonfinite_in_a_row
        where = [
            f"rank {rank}: loss of {', '.join(names)}, files {', '.join(named)}, ..."
            for rank, (names, named) in enumerate(reports)
            if names
        ]
        detail = "; ".join(where) or "every loss was finite, a gradient was not"
        self.log.say(f"step {step} was skipped, {in_a_row} in a row: not finite ({detail})")
        self.log.event("skipped_step", step, in_a_row=in_a_row, detail=detail)
        if in_a_row >= self.config.run.max_nonfinite_steps:
            self.writer.wait()
            raise Diverged(
                f"step {step}: loss or gradient was not finite for {in_a_row} steps in a row ({detail}); the "
                "checkpoints in "
                f"{self.writer.folder} are intact. Lower --base-lr, set --clip-grad 1, or resume from an earlier "
                "checkpoint"
            )

    # --- what is told

    def _new_window(self) -> Window:
        return Window(wait_started=self.loader.wait_seconds)

    def _log(self, window: Window) -> None:
        """One line and one record; the only place in the loop where the host waits for the device."""
        step = self.progress.step
        reduced = window.reduce(self.ranks, self.task.term_names, len(self.loader.bad_images))
        values: dict[str, Any] = {"step": step} | reduced
        values |= window.speed(self.ranks, self.accumulation, self.loader.wait_seconds)
        values |= {
            "lr": self.schedule.lr(max(0, self.progress.applied_steps - 1)),
            "gradient_norm": self.engine.gradient_norm(),
            "memory_gib": memory_gib(self.ranks.device),
            "images": self.progress.images,
            "epoch": self.progress.images / self.loader.num_images,
            "skipped_steps": step - self.progress.applied_steps,
        }
        if self._peak:
            flops = values["images_per_s"] / self.ranks.world_size * self.task.gflops_per_image * 1e9
            values["mfu_percent"] = 100 * flops / self._peak
        self.log.metrics(values, line_of(values, self.durations.total_steps))

    # --- state

    def state(self) -> dict[str, Any]:
        """Everything but the tensors, as JSON values."""
        if not self._parameter_shapes:
            self._parameter_shapes = {
                name: list(getattr(parameter, "ds_shape", parameter.shape))
                for name, parameter in self.engine.module.named_parameters()
            }
        return {
            "step": self.progress.step,
            "applied_steps": self.progress.applied_steps,
            "nonfinite_in_a_row": self.progress.nonfinite_in_a_row,
            "images": self.progress.images,
            "steps_per_epoch": self.loader.steps_per_epoch,
            "world_size": self.ranks.world_size,
            "zero_stage": self.engine.stage,
            "loader": self.loader.state_dict(),
            "parameters": self._parameter_shapes,
            "config": self.config.to_dict(),
        }

    def save(self) -> None:
        """Start writing a checkpoint of this step."""
        self.writer.save(self.progress.step, self._fragments(), self.state())
        self._checkpointed_step = self.progress.step

    def _fragments(self) -> Iterator[Fragment]:
        yield from self.engine.fragments()
        yield from self.task.fragments()

    def finish_saving(self) -> None:
        """Until every rank's part of the last checkpoint is on disk; NotSaved if the last one failed."""
        self.writer.wait()
        published, failure = self.writer.poll()
        self._report(published, failure)
        failures = [text for text in self.ranks.gather(failure) if text]
        if failures:
            raise NotSaved(
                f"{failures[0]}; earlier checkpoints in {self.writer.folder} are intact: make room, and the same "
                "command with --resume auto goes on from the last one"
            )

    def _tell_of_checkpoints(self) -> None:
        self._report(*self.writer.poll())

    def _report(self, published: Path | None, failure: str | None) -> None:
        if published is not None:
            self.log.event(
                "checkpoint",
                self.progress.step,
                path=str(published),
                stall_ms=self.writer.stall_ms(published),
                stall_percent=100 * self.writer.stall_seconds / (time.perf_counter() - self._started),
            )
        if failure is not None:
            self.log.say(f"warning: {failure}; training goes on, earlier checkpoints are intact")
            self.log.event("checkpoint_failed", self.progress.step, reason=failure)

    def _refuse_bad_images(self) -> None:
        """End the run on every rank, its state saved: too many images of some rank were broken."""
        if self._checkpointed_step != self.progress.step:
            self.save()
        self.finish_saving()
        messages = self.ranks.gather(str(self.loader.bad_limit_error()) if self.loader.too_many_bad else None)
        raise UserError(next(message for message in messages if message))

    def _leave_early(self) -> None:
        if self._checkpointed_step != self.progress.step:
            self.save()
        self.finish_saving()
        reasons = [reason for reason in self.ranks.gather(self.stop.reason) if reason]
        self.log.event("stopped", self.progress.step, reason=reasons[0], exit_code=EXIT_PREEMPTED)
        raise Preempted(
            f"{reasons[0]} after step {self.progress.step} of {self.durations.total_steps}; saved in "
            f"{self.writer.folder}; "
            "the same command with --resume auto goes on"
        )
