"""Fine-tuning is this task of the loop: augmentation, cross-entropy, the average of the weights, evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from mirl.dataloaders import Batch, EvalLoader
from mirl.engine.accounting.flops import classifier_flops
from mirl.engine.checkpoints.best import Standing
from mirl.engine.distributed.ds_engine import Fragment, FragmentReader, TrainEngine
from mirl.engine.distributed.launch import Ranks
from mirl.engine.models.config import ModelConfig
from mirl.engine.training.ema import ShardedEma
from mirl.engine.training.noise import seed_stochastic_depth
from mirl.engine.training.run_log import RunLog
from mirl.engine.training.task import Place
from mirl.engine.training.time_left import count_reports
from mirl.engine.transfer.classification.augmentation import BatchAugmentation, soft_cross_entropy
from mirl.engine.transfer.classification.evaluation import EvaluationInterrupted, Scores, evaluate
from mirl.engine.transfer.classification.head_probe import RECORDED


class FinetuneTask:
    """The task is one rank's part. val: the set to evaluate every ``eval_every`` steps, None for no evaluation."""

    term_names = ("cross_entropy",)

    def __init__(
        self,
        model: ModelConfig,
        *,
        ranks: Ranks,
        engine: TrainEngine,
        log: RunLog,
        augmentation: BatchAugmentation,
        ema: ShardedEma | None,
        val: EvalLoader | None,
        eval_every: int | None,
        start_top1_percent: float | None = None,
        begins_with_probe: bool = False,
    ) -> None:
        """Set up the task.

        start_top1_percent: of a linear probe of the encoder at the start; the metrics record it. begins_with_probe:
        whether the run's first head is this probe.
        """
        self.ranks, self.engine, self.log, self.augmentation = ranks, engine, log, augmentation
        self.ema, self.val, self.eval_every = ema, val, eval_every
        self.start_top1_percent, self.begins_with_probe = start_top1_percent, begins_with_probe
        self.report_images = 0 if val is None else val.num_images * (1 if ema is None else 2)
        # A classifier sees all patches: nothing is skipped.
        self.gflops_per_image = classifier_flops(model, augmentation.num_classes).training / 1e9
        self.plain_gflops_per_image = self.gflops_per_image
        self.drop_path = model.drop_path
        self.scores: dict[str, Scores] = {}

    def forward(self, batch: Batch, place: Place) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy of the augmented micro-batch with its soft targets."""
        images_BCHW, targets_BC = self.augmentation(batch)
        if self.drop_path:
            seed_stochastic_depth(self.augmentation.seed, place.step, place.first)
        loss = soft_cross_entropy(self.engine.forward(images_BCHW), targets_BC)
        return loss, loss.detach().reshape(1)

    def after_step(self, applied: bool) -> None:
        """Take the new weights into their average."""
        if self.ema is not None and applied:
            self.ema.update()

    def standing_at_start(self) -> Standing | None:
        """Return the probe's standing if it is the head, so that it stays the best if training makes it worse."""
        if self.start_top1_percent is None or not self.begins_with_probe or self.val is None:
            return None
        # A run that is resumed before its first report reads this record.
        self.log.metrics({"step": 0, RECORDED: self.start_top1_percent}, None)
        return Standing(weights="last", score_percent=self.start_top1_percent, images=self.val.num_images)

    def report(self, step: int, *, last: bool, interrupted: Callable[[], bool]) -> Standing | None:
        """Evaluate the weights, and their average, at the interval and at the end: top-1, top-5 and loss."""
        due = last or (self.eval_every is not None and step % self.eval_every == 0)
        if self.val is None or not due:
            return None
        try:
            self.scores = {"": evaluate(self.engine.module, self.val, self.ranks.device, interrupted)}
            if self.ema is not None:
                with self.ema.swapped_in() as module:
                    self.scores["ema_"] = evaluate(module, self.val, self.ranks.device, interrupted)
        except EvaluationInterrupted:
            self.log.say(f"step {step}  the evaluation was cut short")
            return None
        values: dict[str, float] = {"step": step}
        parts = [f"step {step}  {self.scores[''].images} images evaluated"]
        for prefix, scores in self.scores.items():
            values |= scores.metrics(f"val_{prefix}")
            parts.append(
                f"{prefix}top-1 {scores.top1_percent:.2f}%  {prefix}top-5 {scores.top5_percent:.2f}%  "
                f"{prefix}loss {scores.loss:.4f}"
            )
        if self.start_top1_percent is not None:
            values[RECORDED] = self.start_top1_percent
        self.log.metrics(values, "  ".join(parts))
        better = max(self.scores, key=lambda prefix: self.scores[prefix].correct)
        found = self.scores[better]
        return Standing(weights="ema" if better else "last", score_percent=found.top1_percent, images=found.images)

    def reports_after(self, step: int, total_steps: int) -> int:
        """Count the evaluations."""
        return 0 if self.val is None else count_reports(self.eval_every, after=step, total=total_steps)

    def fragments(self) -> Iterator[Fragment]:
        """Yield this rank's part of the average."""
        if self.ema is not None:
            yield from self.ema.fragments()

    def load(self, read: FragmentReader) -> None:
        """Set the average, if there is one, from a checkpoint of a run that had one."""
        if self.ema is not None:
            self.ema.load(read)
