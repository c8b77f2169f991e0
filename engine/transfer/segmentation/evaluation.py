"""Evaluate a segmenter on images with label images: one table of counts, each image once on all ranks together."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

import torch

from mirl.dataloaders.pair_loader import PairReader, eval_pairs
from mirl.engine.transfer.segmentation.inference import Lockstep, View, idle, predict
from mirl.engine.transfer.segmentation.scores import SegmentScores
from mirl.engine.transfer.segmentation.segmenter import Segmenter


class EvaluationInterrupted(Exception):
    """The run is to end; there are no scores."""


@torch.no_grad()
def evaluate_segmenter(
    model: Segmenter,
    reader: PairReader,
    view: View,
    device: torch.device,
    *,
    rank: int = 0,
    world_size: int = 1,
    threads: int = 2,
    interrupted: Callable[[], bool] | None = None,
    lockstep: Lockstep | None = None,
) -> SegmentScores:
    """Score ``model`` in eval mode; the result is the same on every rank of the process group, if any.

    Each image is computed by itself, so the counts are the same on any number of ranks. An image that is broken, or
    has no pixel with a class, is in no count of pixels. lockstep: see `mirl.engine.transfer.segmentation.inference`.

    Raises:
        EvaluationInterrupted: ``interrupted``, asked before every image on all ranks alike, said so.
    """
    classes = model.num_classes
    confusion_KK = torch.zeros(classes, classes, dtype=torch.int64, device=device)
    seen = torch.zeros(2, dtype=torch.int64, device=device)  # images, broken ones
    training = model.training
    model.eval()
    try:
        with closing(eval_pairs(reader, rank=rank, world_size=world_size, threads=threads)) as pairs:
            for pair in pairs:
                if interrupted is not None and interrupted():
                    raise EvaluationInterrupted
                if pair is None or pair[1] is None:
                    seen[1] += pair is not None
                    for _ in range(lockstep(0) if lockstep is not None else 0):
                        idle(model, device)
                    continue
                _, image, labels = pair
                predicted_hw = predict(model, image, view, device, lockstep).argmax(dim=0)
                labels_hw = torch.from_numpy(labels).to(device=device, dtype=torch.int64)
                known_hw = labels_hw >= 0
                pairs_n = labels_hw[known_hw] * classes + predicted_hw[known_hw]
                confusion_KK += torch.bincount(pairs_n, minlength=classes**2).view_as(confusion_KK)
                seen[0] += 1
    finally:
        model.train(training)
    if torch.distributed.is_initialized():
        for counts in (confusion_KK, seen):
            torch.distributed.all_reduce(counts)
    images, broken = seen.tolist()
    return SegmentScores(confusion=confusion_KK.tolist(), images=images, broken=broken)
