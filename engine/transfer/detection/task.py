"""Detection is this task of the loop: the five losses, pictures, evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from mirl.dataloaders import Batch, ImageError
from mirl.engine.accounting.detection import DetectorFlops
from mirl.engine.checkpoints.best import Standing
from mirl.engine.distributed.ds_engine import Fragment, FragmentReader, TrainEngine
from mirl.engine.distributed.launch import Ranks
from mirl.engine.training.noise import seed_stochastic_depth
from mirl.engine.training.run_log import RunLog
from mirl.engine.training.task import Place
from mirl.engine.training.time_left import count_reports
from mirl.engine.transfer.detection import pictures
from mirl.engine.transfer.detection.annotations import CocoSet
from mirl.engine.transfer.detection.evaluation import (
    CocoScores,
    EvaluationInterrupted,
    find_rows,
    gather_rows,
    judge,
    require_known,
    write_results,
)
from mirl.engine.transfer.detection.heads import TERMS
from mirl.engine.transfer.detection.loader import DetectionBatch

METRIC = "mask AP"


class DetectTask:
    """The task is one rank's part. val: the set to evaluate every ``eval_every`` steps, None for no evaluation."""

    term_names = TERMS

    def __init__(
        self,
        *,
        ranks: Ranks,
        engine: TrainEngine,
        log: RunLog,
        out: Path,
        seed: int,
        classes: Sequence[str],
        flops: DetectorFlops,
        val: CocoSet | None,
        val_batches: Callable[[], Iterator[DetectionBatch]],
        shown: tuple[CocoSet, list[int]],
        shown_batch: Callable[[int], DetectionBatch],
        eval_every: int | None,
        picture_every: int | None,
    ) -> None:
        """Set up the task.

        val_batches: makes the evaluation batches of this rank anew. shown, shown_batch: the pictures to draw, and one
        of them as a batch. eval_every, picture_every: in steps; None: an evaluation at the end alone, no pictures.
        """
        self.ranks, self.engine, self.log, self.out, self.seed, self.classes = ranks, engine, log, out, seed, classes
        self.val, self.val_batches, self.eval_every = val, val_batches, eval_every
        self.shown, self.shown_batch, self.picture_every = shown, shown_batch, picture_every
        self.category_ids = require_known(classes, val) if val is not None else ()
        self.gflops_per_image = self.plain_gflops_per_image = flops.training / 1e9
        self.report_images = 0 if val is None else val.num_images
        self.scores: CocoScores | None = None

    def forward(self, batch: Batch, place: Place) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sum of the five losses of a micro-batch."""
        assert isinstance(batch, DetectionBatch)
        # So a resumed run drops the same paths, and samples the same anchors and regions.
        seed_stochastic_depth(self.seed, place.step, place.first)
        losses = self.engine.forward(batch.images, batch.sizes, batch.targets)
        terms = torch.stack([losses[name] for name in TERMS])
        return terms.sum(), terms.detach()

    def after_step(self, applied: bool) -> None:
        """Do nothing: there is no average of the weights."""

    def standing_at_start(self) -> Standing | None:
        """Return None: the heads begin with random weights."""
        return None

    def report(self, step: int, *, last: bool, interrupted: Callable[[], bool]) -> Standing | None:
        """Draw pictures at their interval, measure AP of boxes and masks at theirs, and do both at the end."""
        if self.picture_every is not None and (last or step % self.picture_every == 0):
            self._draw(step)
        due = last or (self.eval_every is not None and step % self.eval_every == 0)
        if self.val is None or not due:
            return None
        try:
            rows = find_rows(self.engine.module, self.val_batches(), self.val, self.category_ids, interrupted)
        except EvaluationInterrupted:
            self.log.say(f"step {step}  the evaluation was cut short")
            return None
        rows = gather_rows(rows, self.ranks)
        scores = judge(rows, self.val) if self.ranks.is_main else None
        scores = self.scores = self.ranks.broadcast(scores)
        assert scores is not None
        if self.ranks.is_main:
            try:
                write_results(self.out / "evaluation", rows, scores, step)
            except OSError as error:
                self.log.say(f"warning: the results of step {step} were not written: {error}; training goes on")
        self.log.metrics({"step": step} | scores.metrics(), f"step {step}  {scores.images} images evaluated  {scores}")
        return Standing(weights="last", score_percent=scores.mask["AP"] or 0.0, images=scores.images, metric=METRIC)

    def _draw(self, step: int) -> None:
        """Run the detector on all ranks, which it may need; rank 0 draws."""
        data, indices = self.shown
        model, rows = self.engine.module, []
        training = model.training
        model.eval()
        with torch.no_grad():
            for index in indices:
                try:
                    batch = self.shown_batch(index)
                except ImageError:  # named, counted and reported by the loader when its turn comes
                    continue
                (result,) = model(batch.images, batch.sizes)
                if self.ranks.is_main:
                    pixels, original = data.picture(index, model.config.channels), data.size(index)
                    found = pictures.found_in(result, batch.sizes[0], original)
                    parts = ([], pictures.truth_of(data, index), found)
                    rows.append([pictures.draw(pixels, part, self.classes) for part in parts])
        model.train(training)
        if rows:
            picture = pictures.grid(rows)
            try:
                pictures.save(picture, self.out / "pictures" / f"step-{step:08d}.png")
            except OSError as error:
                self.log.say(f"warning: no picture of step {step}: {error}; training goes on")
            self.log.picture(picture, step, name="detections")

    def reports_after(self, step: int, total_steps: int) -> int:
        """Count the evaluations."""
        return 0 if self.val is None else count_reports(self.eval_every, after=step, total=total_steps)

    def fragments(self) -> Iterator[Fragment]:
        """Yield nothing: all state is in the weights."""
        return iter(())

    def load(self, read: FragmentReader) -> None:
        """Do nothing: all state is in the weights."""
