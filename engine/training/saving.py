"""The state of a run on disk: when a checkpoint is begun, what it holds, and what is told of it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mirl.dataloaders import TrainLoader
from mirl.engine.checkpoints.best import Best, Standing, read_best, remove_best, write_best
from mirl.engine.checkpoints.finding import verify
from mirl.engine.checkpoints.writer import CheckpointWriter
from mirl.engine.configuration.config import Config
from mirl.engine.distributed.ds_engine import Fragment, TrainEngine
from mirl.engine.distributed.launch import Ranks
from mirl.engine.errors import NotSaved
from mirl.engine.training.run_folder import Progress
from mirl.engine.training.run_log import RunLog
from mirl.engine.training.task import Task


def _is_better(found: Best, before: Best) -> bool:
    """Of equal ones the earlier stays; but the start of a run, which nothing has trained, gives way."""
    return (found.score_percent, not before.step) > (before.score_percent, False)


class Saver:
    """Checkpoints of one run. All ranks make the same calls in the same order."""

    def __init__(
        self,
        config: Config,
        *,
        ranks: Ranks,
        engine: TrainEngine,
        task: Task,
        loader: TrainLoader,
        log: RunLog,
        progress: Progress,
        folder: Path,
        resumed_from: Path | None = None,
    ) -> None:
        self._config, self._ranks, self._engine, self._task = config, ranks, engine, task
        self._loader, self._log, self._progress = loader, log, progress
        self._writer = CheckpointWriter(folder, ranks, keep=config.run.keep_checkpoints)
        self._resumed_from = resumed_from
        self._started = time.perf_counter()
        self._saved_step: int | None = progress.step or None  # a fresh run has none
        self._parameter_shapes: dict[str, list[int]] = {}
        self._failure: str | None = None  # of the newest checkpoint, if it was not written
        # On rank 0: what is recorded, and what will be once its checkpoint is on disk.
        self._best: Best | None = self._restored_best() if ranks.is_main else None
        self._candidate: Best | None = None
        self._spare()

    @property
    def folder(self) -> Path:
        """The folder of the checkpoints."""
        return self._writer.folder

    def save(self) -> None:
        """Begin to write a checkpoint of this step, unless the step has one already."""
        if self._saved_step != self._progress.step:
            self._writer.save(self._progress.step, self._fragments(), self.state())
            self._saved_step = self._progress.step

    def newest_good(self) -> Path | None:
        """On rank 0 the newest whole checkpoint of this run; waited for is what is being written.

        Others may lie in the folder, of a run that was resumed before their steps: they are not of this one.
        """
        written = [self.folder / name for name in sorted(self._writer.published, reverse=True)]
        for path in [*written, *filter(None, [self._resumed_from])]:
            problem = verify(path)
            if problem is None:
                return path
            if path.is_dir():
                self._log.say(f"{path.name} is passed over: {problem}")
        return None

    def went_back_to(self, path: Path) -> None:
        """Take note that the state is that of checkpoint ``path`` again, of this run. Checkpoints of later steps stay
        on disk until those steps are done again and written over them, but are no longer of this run.
        """
        self._writer.published = {name for name in self._writer.published if name <= path.name}
        self._saved_step = self._progress.step
        self._candidate = None
        self._best = self._restored_best() if self._ranks.is_main else None
        self._spare()

    def keep_if_best(self, standing: Standing) -> None:
        """Keep the weights of this step as the best of the run, if they are: save them and spare their checkpoint.

        It is recorded once it is on disk, so that the record never names what is not there.
        """
        found = Best(
            **dataclasses.asdict(standing), step=self._progress.step,
            epoch=round(self._progress.step / self._loader.steps_per_epoch, 3),
        )  # fmt: skip
        before = self._candidate or self._best
        if self._ranks.broadcast(before is None or _is_better(found, before)):
            # The one before may have reached the disk, and be all that is left if this one does not.
            began = time.perf_counter()
            self._writer.wait()
            self._writer.stall_seconds += time.perf_counter() - began
            self.report()
            failed = self._saved_step == found.step and found.checkpoint not in self._writer.published
            self._candidate = found if self._ranks.is_main and not failed else None
            self._spare()
            self.save()
            self._settle_best()

    def _restored_best(self) -> Best | None:
        """What an earlier part of this run recorded. A record of a later step than the resumed one is taken away: that
        step will be done again, and its checkpoint written over.
        """
        best = read_best(self.folder)
        if best is None:
            return None
        if best.step <= self._progress.step and (self.folder / best.checkpoint).is_dir():
            self._log.say(f"best so far: {best}")
            return best
        self._log.say(
            f"the best so far, of step {best.step}, is later than the resumed step or gone; it is sought afresh"
        )
        remove_best(self.folder)
        return None

    def _spare(self) -> None:
        self._writer.spared = frozenset(best.checkpoint for best in (self._best, self._candidate) if best)

    def _settle_best(self, failure: str | None = None) -> None:
        """Record the candidate once its checkpoint is on disk; forget it where that failed."""
        candidate = self._candidate
        if candidate is None:
            return
        recorded = False
        if candidate.checkpoint in self._writer.published:
            try:
                write_best(self.folder, candidate)
                self._best = candidate
                recorded = True
                details = {name: value for name, value in dataclasses.asdict(candidate).items() if name != "step"}
                self._log.event("best", candidate.step, **details)
            except OSError as error:
                self._log.say(f"warning: step {candidate.step} could not be recorded as the best: {error}")
        elif failure is None:
            return
        self._candidate = None
        self._spare()
        if recorded:
            self._writer.prune()  # the best before it

    def state(self) -> dict[str, Any]:
        """Everything but the tensors, as JSON values."""
        if not self._parameter_shapes:
            self._parameter_shapes = {
                name: list(getattr(parameter, "ds_shape", parameter.shape))
                for name, parameter in self._engine.module.named_parameters()
            }
        return self._progress.to_dict() | {
            "steps_per_epoch": self._loader.steps_per_epoch,
            "world_size": self._ranks.world_size,
            "zero_stage": self._engine.stage,
            "micro_batch": self._loader.plan.micro_batch,
            # An error of the loader may end a run in the middle of a step; the next one begins it again.
            "loader": self._loader.state_dict() | {"step": self._progress.step},
            "parameters": self._parameter_shapes,
            "config": self._config.to_dict(),
        }

    def _fragments(self) -> Iterator[Fragment]:
        yield from self._engine.fragments()
        yield from self._task.fragments()

    def report(self) -> None:
        """Tell of checkpoints that were published or failed since the last call."""
        self._report(*self._writer.poll())

    def wait(self) -> None:
        """Wait until this rank's part of the last checkpoint is on disk, or has failed."""
        self._writer.wait()

    def finish(self) -> None:
        """Wait until every rank's part of the last checkpoint is on disk.

        Raises:
            NotSaved: the last checkpoint could not be written.
        """
        self._writer.wait()
        self.report()
        # It may have been told of before: a full disk can answer before the last step is over.
        failures = [text for text in self._ranks.gather(self._failure) if text]
        if failures:
            raise NotSaved(
                f"{failures[0]}; earlier checkpoints in {self.folder} are intact: make room, and the same "
                "command with --resume auto goes on from the last one"
            )

    def abandon(self) -> None:
        """Give up what is being written, because the run ends with an error."""
        self._writer.abandon()

    def _report(self, published: Path | None, failure: str | None) -> None:
        if published is not None:
            self._failure = None
            self._log.event(
                "checkpoint",
                self._progress.step,
                path=str(published),
                stall_ms=self._writer.stall_ms(published),
                stall_percent=100 * self._writer.stall_seconds / (time.perf_counter() - self._started),
            )
        if failure is not None:
            self._failure = failure
            self._log.say(f"warning: {failure}; training goes on, earlier checkpoints are intact")
            self._log.event("checkpoint_failed", self._progress.step, reason=failure)
        self._settle_best(failure)
