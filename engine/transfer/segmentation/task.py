"""Segmentation is this task of the loop: cross-entropy of both heads, evaluation, pictures.

Shapes: B batch, H W crop, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mirl.dataloaders import Batch, ImageError
from mirl.dataloaders.pair_loader import PairReader
from mirl.engine.accounting.flops import segmenter_flops
from mirl.engine.checkpoints.best import Standing
from mirl.engine.distributed.ds_engine import Fragment, FragmentReader, TrainEngine
from mirl.engine.distributed.launch import Ranks
from mirl.engine.training.noise import seed_stochastic_depth
from mirl.engine.training.run_log import RunLog
from mirl.engine.training.task import Place
from mirl.engine.training.time_left import count_reports
from mirl.engine.transfer.segmentation.evaluation import EvaluationInterrupted, evaluate_segmenter
from mirl.engine.transfer.segmentation.inference import Lockstep, View, predict
from mirl.engine.transfer.segmentation.pictures import grid, overlay, palette, save
from mirl.engine.transfer.segmentation.scores import SegmentScores
from mirl.engine.transfer.segmentation.segmenter import Segmenter
from mirl.engine.transfer.segmentation.upernet import AUXILIARY_WEIGHT, resized

BUFFER = "buffer"  # the kind of a fragment that holds running statistics


class SegmentTask:
    """The task is one rank's part.

    val: the set to evaluate every ``eval_every`` steps, None for no evaluation. shown: the set to draw pictures of,
    every ``picture_every`` steps.
    """

    term_names = ("cross_entropy", "auxiliary")

    def __init__(
        self,
        *,
        ranks: Ranks,
        engine: TrainEngine,
        log: RunLog,
        seed: int,
        names: tuple[str, ...],
        view: View,
        val: PairReader | None,
        eval_every: int,
        shown: PairReader,
        picture_every: int,
        pictures: int,
        threads: int,
    ) -> None:
        self.ranks, self.engine, self.log, self.seed, self.names = ranks, engine, log, seed, names
        self.view, self.val, self.eval_every, self.threads = view, val, eval_every, threads
        self.shown, self.picture_every, self.pictures = shown, picture_every, pictures
        model: Segmenter = engine.module
        flops = segmenter_flops(model.config, len(names), model.decode_head.conv_seg.in_channels)
        self.gflops_per_image = self.plain_gflops_per_image = flops.training / 1e9
        self.report_images = 0 if val is None else val.source.num_images
        self.scores: SegmentScores | None = None

    def forward(self, batch: Batch, place: Place) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy of the decode head and 0.4 times that of the auxiliary head."""
        assert batch.labels is not None
        seed_stochastic_depth(self.seed, place.step, place.first)  # and the dropout of the heads
        labels_BHW = batch.labels.long()
        losses = [pixel_cross_entropy(logits, labels_BHW) for logits in self.engine.forward(batch.images)]
        return losses[0] + AUXILIARY_WEIGHT * losses[1], torch.stack(losses).detach()

    def after_step(self, applied: bool) -> None:
        """Do nothing: there is no average of the weights."""

    def standing_at_start(self) -> Standing | None:
        """Return None: the heads begin with random weights."""
        return None

    def report(self, step: int, *, last: bool, interrupted: Callable[[], bool]) -> Standing | None:
        """Draw pictures and evaluate, at their intervals and at the end."""
        if self.pictures and (last or step % self.picture_every == 0):
            self._picture(step)
        if self.val is None or not (last or step % self.eval_every == 0):
            return None
        try:
            self.scores = evaluate_segmenter(
                self.engine.module, self.val, self.view, self.ranks.device, rank=self.ranks.rank,
                world_size=self.ranks.world_size, threads=self.threads, interrupted=interrupted,
                lockstep=self._lockstep,
            )  # fmt: skip
        except EvaluationInterrupted:
            self.log.say(f"step {step}  the evaluation was cut short")
            return None
        found = self.scores
        by_class = {f"val_iou_percent/{name}": iou for name, iou in zip(self.names, found.iou_percent(), strict=True)}
        broken = f", {found.broken} could not be read" if found.broken else ""
        line = (
            f"step {step}  {found.images} images evaluated ({self.view}){broken}  mIoU {found.miou_percent:.2f}%  "
            f"mAcc {found.macc_percent:.2f}%  aAcc {found.aacc_percent:.2f}%"
        )
        self.log.metrics({"step": step} | found.metrics() | by_class, line)
        return Standing(weights="last", score_percent=found.miou_percent, images=found.images, metric="mIoU")

    def reports_after(self, step: int, total_steps: int) -> int:
        """Count the evaluations."""
        return 0 if self.val is None else count_reports(self.eval_every, after=step, total=total_steps)

    def fragments(self) -> Iterator[Fragment]:
        """Yield the running statistics of the norms, which are the same on all ranks, from rank 0."""
        if self.ranks.is_main:
            for name, buffer in self.engine.module.kept_buffers().items():
                yield Fragment(name=name, kind=BUFFER, start=0, tensor=buffer)

    @torch.no_grad()
    def load(self, read: FragmentReader) -> None:
        """Set the running statistics."""
        load_buffers(self.engine.module, read)

    @property
    def _lockstep(self) -> Lockstep | None:
        """Return a function that makes passes equally many on all ranks; None except under ZeRO-3.

        There a forward pass gathers weights from all ranks.
        """
        if self.engine.stage < 3 or self.ranks.world_size == 1:
            return None
        return lambda passes: round(self.ranks.agree_max([float(passes)])[0])

    def _picture(self, step: int) -> None:
        """Draw the first images of the set, on all ranks alike; rank 0 writes them."""
        model, colours = self.engine.module, palette(len(self.names))
        rows: list[list[np.ndarray]] = []
        seen: set[int] = set()
        training = model.training
        model.eval()
        for index in range(min(self.pictures, self.shown.source.num_images)):
            try:
                image, labels = self.shown.read(index)
            except ImageError:
                continue
            found = predict(model, image, self.view, self.ranks.device).argmax(dim=0).cpu().numpy()
            seen |= set(np.unique(labels)) | set(np.unique(found))
            rows.append([image, overlay(image, labels, colours), overlay(image, found, colours)])
        model.train(training)
        if not rows or not self.ranks.is_main:
            return
        picture = grid(rows, ("input", "truth", "prediction"), self.names, colours, sorted(seen - {-1}))
        try:
            save(picture, self.log.out / "pictures" / f"step-{step:08d}.png")
        except OSError as error:
            self.log.say(f"warning: no picture of step {step}: {error}")
        self.log.picture(picture, step, name="segmentation")


def pixel_cross_entropy(logits_BKhw: Tensor, labels_BHW: Tensor) -> Tensor:
    """Return the mean over all pixels, ignored ones as zeros, with logits at the size of the labels; float32.

    mmsegmentation does so by default. The sum over a step does not depend on how it is divided among ranks, and a crop
    without a class gives no NaN.
    """
    logits = resized(logits_BKhw.float(), labels_BHW.shape[1:])
    return F.cross_entropy(logits, labels_BHW, ignore_index=-1, reduction="sum") / labels_BHW.numel()


@torch.no_grad()
def load_buffers(model: Any, read: FragmentReader) -> None:
    """Set the running statistics of a segmenter from a checkpoint."""
    for name, buffer in model.kept_buffers().items():
        buffer.copy_(read(name, BUFFER, 0, buffer.numel()))
