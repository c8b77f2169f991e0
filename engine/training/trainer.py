"""The training loop: loader -> task -> loss -> step, with log, checkpoints and an orderly end."""

from __future__ import annotations

import time
from typing import NoReturn

import numpy as np

from mirl.dataloaders import Batch, StorageLost, TrainLoader
from mirl.engine.configuration.config import Config
from mirl.engine.distributed.ds_engine import TrainEngine
from mirl.engine.distributed.launch import Ranks
from mirl.engine.distributed.stop_request import StopRequest
from mirl.engine.distributed.watchdog import Watchdog
from mirl.engine.errors import EXIT_PREEMPTED, Diverged, LostRank, Preempted
from mirl.engine.training.image_sizes import StepSizes
from mirl.engine.training.profiling import StepProfile
from mirl.engine.training.rollback import Rollback
from mirl.engine.training.run_folder import Progress
from mirl.engine.training.run_lock import RunLock
from mirl.engine.training.run_log import RunLog
from mirl.engine.training.saving import Saver
from mirl.engine.training.schedule import Durations
from mirl.engine.training.spikes import SpikeWatch
from mirl.engine.training.step_log import SeenMicroBatch, StepLog
from mirl.engine.training.task import Place, Task
from mirl.errors import UserError


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
        saver: Saver,
        log: RunLog,
        lock: RunLock,
        progress: Progress,
        micro_batch: int,
        accumulation: int,
    ) -> None:
        self.config, self.ranks, self.engine, self.task, self.loader = config, ranks, engine, task, loader
        self.durations, self.saver, self.log, self.progress, self.lock = durations, saver, log, progress, lock
        self.micro_batch, self.accumulation = micro_batch, accumulation
        self.schedule = durations.schedule(config.optim)
        self.sizes = StepSizes.of(config, durations.total_steps)
        self.stop = StopRequest(max_minutes=config.run.max_minutes)
        self.watchdog = Watchdog(minutes=config.run.watchdog_minutes, rank=ranks.rank)
        self.step_log = StepLog(
            ranks=ranks, engine=engine, task=task, loader=loader, durations=durations, schedule=self.schedule, log=log,
            progress=progress, accumulation=accumulation, batch_size=config.optim.batch_size,
            sizes=self.sizes,
        )  # fmt: skip
        self.profile = StepProfile(config.log.profile, out=log.out, log=log, device=ranks.device)
        self.spikes = SpikeWatch(config.run, ranks, engine, task, loader, log, progress)
        self.rollback = Rollback(
            ranks=ranks, engine=engine, task=task, loader=loader, saver=saver, log=log, progress=progress
        )
        self._seen: list[SeenMicroBatch] = []

    def run(self) -> None:
        """Train to the last step.

        Raises:
            Preempted: a signal or the time limit ended the run; its state is saved.
            Diverged: too many steps in a row were not finite; the last checkpoint is intact.
            NotSaved: the run is over and its last checkpoint could not be written.
        """
        try:
            # The signals are held until the last checkpoint is written; the watchdog sees the end of the run too.
            with self.stop, self.watchdog, self.profile.over(self.progress.step, self.durations.total_steps):
                self._run()
        except BaseException:
            self.saver.abandon()
            raise

    def _run(self) -> None:
        first_step, total_steps = self.progress.step, self.durations.total_steps
        standing = None if first_step else self.task.standing_at_start()
        if standing is not None:
            self.saver.keep_if_best(standing)
        while self.progress.step < total_steps:
            if self.progress.step in self.sizes.firsts:
                self.spikes.begin_band()
            # Whatever was asked, a start makes a step: a run that is queued again and again goes on.
            batch = self._begin_step(may_stop=self.progress.step > first_step)
            left_out = self.rollback.leaves_out_next()
            applied = self._leave_out() if left_out else self._step(batch)
            self.step_log.step_ended()
            step = self.progress.step
            self.log.advance(step)
            spike = None if left_out else self.spikes.end_step()
            told = None if spike is None else self.spikes.tell(spike, self._shown_samples(), skipped=not applied)
            if told is not None and self.config.run.on_spike == "rollback" and self.rollback.go_back(told):
                self.step_log.drop_window()
                self.log.advance(self.progress.step)
                self.watchdog.beat(f"step {self.progress.step + 1}")
                continue
            if not applied and not left_out:
                self._after_skipped_step(told)
            last = step == total_steps
            if (step % self.durations.log_every == 0 or last) and self.step_log.window.loss is not None:
                self.step_log.write()
            # Saved first: whatever an evaluation runs into, the step is not lost.
            if step % self.durations.checkpoint_every == 0 or last:
                self.saver.save()
            began = time.perf_counter()
            standing = self.task.report(step, last=last, interrupted=self._interrupted)
            self.step_log.reported(time.perf_counter() - began, step=step)
            if standing is not None:
                self.saver.keep_if_best(standing)
            self.saver.report()
            self.profile.step_ended()
            self.watchdog.beat(f"step {step + 1}")
        self._agree(None, may_stop=False)
        self.saver.finish()

    def _interrupted(self) -> bool:
        """Whether a long report should end early, on all ranks alike; a sign of life for the watchdog."""
        self.watchdog.beat("an evaluation")
        return bool(self.ranks.agree_max([float(self.stop.requested)])[0])

    # --- one step

    def _begin_step(self, *, may_stop: bool) -> Batch:
        """The first micro-batch of the next step, once all ranks agree to make it."""
        batch, problem = self._fetch()
        self._agree(problem, may_stop=may_stop)
        assert batch is not None
        return batch

    def _agree(self, problem: Exception | None, *, may_stop: bool) -> None:
        """Go on, or end the run on all ranks alike. It is the one agreement of a step whose batch is not divided.

        A record that is overdue on some rank is written by all.
        problem: an error of this rank's loader. may_stop: whether a request to stop is heeded now.
        """
        flags = [
            may_stop and self.stop.requested, self.loader.too_many_bad, self.lock.lost, problem is not None,
            self.step_log.overdue,
        ]  # fmt: skip
        stop, too_many_bad, lost, failed, overdue = self.ranks.agree_max([float(flag) for flag in flags])
        if lost:
            self._leave_to_another()
        if too_many_bad:
            self._refuse_bad_images()
        if stop:
            self._leave_early(next(reason for reason in self.ranks.gather(self.stop.reason) if reason))
        if failed:
            self._leave_for_loader(problem)
        if overdue:
            self.step_log.write(line=False)

    def _step(self, batch: Batch) -> bool:
        """One optimiser step over all micro-batches of the effective batch, of which ``batch`` is the first of this
        rank; False when it was skipped.
        """
        lr = self.schedule.lr(self.progress.applied_steps)
        seen: list[SeenMicroBatch] = []
        applied = None
        self.spikes.begin_step()
        for part in range(self.accumulation):
            if part:
                batch = self._next_batch()
            # The place of this micro-batch in the effective batch, as dataloaders.order.StepPlan divides it.
            first = (part * self.ranks.world_size + self.ranks.rank) * self.micro_batch
            place = Place(step=self.progress.step, first=first)
            self.spikes.keep(batch, place)
            loss, terms = self.task.forward(batch, place)
            self.engine.backward(loss)
            applied = self.engine.step(lr)
            self.step_log.add(loss, terms, self.micro_batch)
            seen.append(SeenMicroBatch(terms=terms, sample_ids=batch.sample_ids))
        assert applied is not None, "DeepSpeed did not reach the accumulation boundary"
        self._advance(applied)
        self._seen = seen
        if applied:
            self.progress.applied_steps += 1
            self.progress.nonfinite_in_a_row = 0
        else:
            self.progress.nonfinite_in_a_row += 1
        return applied

    def _leave_out(self) -> bool:
        """Pass over the images of a step, of which the first micro-batch is there; False: no step was applied."""
        for _ in range(self.accumulation - 1):
            self._next_batch()
        self._advance(False)
        return False

    def _advance(self, applied: bool) -> None:
        self.progress.step += 1
        self.progress.images += self.config.optim.batch_size
        self.task.after_step(applied)

    def _fetch(self) -> tuple[Batch | None, Exception | None]:
        """The next micro-batch, or why this rank has none."""
        try:
            return self.loader.next_micro_batch(), None
        except (ValueError, OSError, RuntimeError) as error:
            return None, error

    def _next_batch(self) -> Batch:
        """A further micro-batch of the step."""
        batch, problem = self._fetch()
        if self.ranks.agree_max([float(problem is not None)])[0]:
            self._leave_for_loader(problem)
        assert batch is not None
        return batch

    def _leave_for_loader(self, problem: Exception | None) -> NoReturn:
        """End every rank, for an error of the loader of one or more: ``problem`` is this rank's.

        What a user can mend is raised everywhere; a fault of ours keeps its traceback on the rank that met it. Where
        the data cannot be read at all, which may be over later, the state of the last whole step is saved.
        """
        to_mend, of_storage = isinstance(problem, UserError | OSError), isinstance(problem, StorageLost)
        reports = self.ranks.gather(None if problem is None else (to_mend, of_storage, str(problem)))
        told = [(rank, *report) for rank, report in enumerate(reports) if report]
        if all(of_storage for _, _, of_storage, _ in told):
            self._leave_early(told[0][-1] if len(reports) == 1 else f"rank {told[0][0]}: {told[0][-1]}")
        rank, to_mend, _, text = next(report for report in told if not report[2])
        self.saver.wait()
        if problem is not None and not isinstance(problem, UserError | OSError):
            raise problem
        if to_mend:
            raise UserError(text if len(reports) == 1 else f"rank {rank}: {text}") from problem
        raise LostRank(f"rank {rank} met a fault in its loader: {text}")

    def _shown_samples(self) -> list[np.ndarray]:
        return [item.sample_ids for item in self._seen]

    def _after_skipped_step(self, spike: str | None) -> None:
        """Tell what was not finite, or with ``spike`` outside its band; stop all ranks after too many in a row."""
        detail = self.step_log.skipped_step(self._seen, spike)
        what = "was not finite" if spike is None else "left its band"
        in_a_row = self.progress.nonfinite_in_a_row
        if in_a_row >= self.config.run.max_nonfinite_steps:
            self.saver.wait()
            raise Diverged(
                f"step {self.progress.step}: loss or gradient {what} for {in_a_row} steps in a row ({detail}); "
                f"the checkpoints in {self.saver.folder} are intact. Lower --base-lr, set --clip-grad 1, or resume "
                "from an earlier checkpoint"
            )

    # --- an early end

    def _leave_to_another(self) -> None:
        """End the run on every rank and write nothing more: its folder is another run's by now."""
        self.saver.wait()
        raise UserError(
            f"{self.lock.path} is no longer of this run, which gave no sign of life for too long: another run took the "
            "folder over; let that one go on, or stop it and give --resume auto"
        )

    def _refuse_bad_images(self) -> None:
        """End the run on every rank, its state saved: too many images of some rank were broken."""
        self.saver.save()
        self.saver.finish()
        messages = self.ranks.gather(str(self.loader.bad_limit_error()) if self.loader.too_many_bad else None)
        raise UserError(next(message for message in messages if message))

    def _leave_early(self, reason: str) -> NoReturn:
        """End the run on every rank, its state saved, for ``reason``: it is to be started again, and goes on."""
        self.saver.save()
        self.saver.finish()
        self.log.event("stopped", self.progress.step, reason=reason, exit_code=EXIT_PREEMPTED)
        raise Preempted(
            f"{reason} after step {self.progress.step} of {self.durations.total_steps}; saved in "
            f"{self.saver.folder}; the same command with --resume auto goes on"
        )
