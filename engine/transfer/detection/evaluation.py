"""Measure COCO's average precision of boxes and masks; pycocotools itself judges detections as rows of results.json.

Each rank turns its detections into rows, masks run-length encoded one by one. All rows are gathered; each image is on
one rank alone. Rank 0 judges them against the annotation file. So the figures are those that pycocotools gives for the
written results.json, on any number of ranks.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mirl.engine.checkpoints.files import write_whole
from mirl.engine.distributed.launch import Ranks
from mirl.engine.transfer.detection.annotations import CocoSet, coco_tools
from mirl.engine.transfer.detection.loader import DetectionBatch
from mirl.errors import UserError

KINDS = {"box": "bbox", "mask": "segm"}
FIGURES = (
    "AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR_1", "AR_10", "AR_100", "AR_small", "AR_medium",
    "AR_large",
)  # fmt: skip
MOST = 100  # COCO counts so many detections of an image
RESULTS, MASK_RESULTS, REPORT = "results.json", "results-masks.json", "evaluation.json"


class EvaluationInterrupted(Exception):
    """The run is to end; there are no figures."""


@dataclass(frozen=True, kw_only=True)
class CocoScores:
    """The scores are COCO's figures of boxes and masks.

    box, mask: the twelve figures in per cent by name; None if nothing could count (a size without objects).
    of_classes: AP of "box" and "mask" of each class, in per cent.
    """

    images: int
    detections: int
    box: dict[str, float | None]
    mask: dict[str, float | None]
    of_classes: dict[str, dict[str, float | None]] = field(default_factory=dict)

    def metrics(self, prefix: str = "val_") -> dict[str, float]:
        """Return the twelve figures of boxes and of masks, for a log."""
        values = {
            f"{prefix}{kind}_{name}": value
            for kind, figures in (("box", self.box), ("mask", self.mask))
            for name, value in figures.items()
            if value is not None
        }
        return values | {f"{prefix}images": self.images, f"{prefix}detections": self.detections}

    def __str__(self) -> str:
        def shown(figures: dict[str, float | None]) -> str:
            return " ".join(f"{name} {0.0 if figures[name] is None else figures[name]:.1f}" for name in FIGURES[:3])

        return f"box {shown(self.box)}  mask {shown(self.mask)}  {self.detections} detections"


@torch.no_grad()
def find_rows(
    model: nn.Module, batches: Iterable[DetectionBatch], data: CocoSet, labels: Sequence[int],
    interrupted: Callable[[], bool] | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Return rows of results.json for the images of ``batches``, in eval mode. labels: category ids of labels 1, 2 ...

    Raises:
        EvaluationInterrupted: ``interrupted``, asked before every batch, said so.
    """
    training = model.training
    model.eval()
    rows: list[dict[str, Any]] = []
    try:
        for batch in batches:
            if interrupted is not None and interrupted():
                raise EvaluationInterrupted
            found = model(batch.images, batch.sizes)
            for index, size, original, result in zip(
                batch.sample_ids, batch.sizes, batch.originals, found, strict=True
            ):
                if index >= 0:
                    rows += as_rows(result, data.image_ids[index], size, original, labels)
    finally:
        model.train(training)
    return rows


def as_rows(
    result: dict[str, Tensor], image_id: int, size: tuple[int, int], original: tuple[int, int], labels: Sequence[int]
) -> list[dict[str, Any]]:
    """Return detections in one image of ``size`` as rows of results.json, in the pixels of the ``original``."""
    scale_4 = torch.tensor([original[1] / size[1], original[0] / size[0]] * 2)
    boxes = (result["boxes"].float().cpu() * scale_4).tolist()
    masks = result["masks"].float().cpu()
    rows = []
    for box, score, label, mask in zip(boxes, result["scores"].tolist(), result["labels"].tolist(), masks, strict=True):
        x0, y0, x1, y1 = box
        rows.append(
            {
                "image_id": image_id, "category_id": int(labels[label - 1]), "score": round(score, 6),
                "bbox": [round(value, 3) for value in (x0, y0, x1 - x0, y1 - y0)],
                "segmentation": encode_mask(mask[0], box, original),
            }
        )  # fmt: skip
    return rows


def paste_mask(mask_SS: Tensor, box: Sequence[float], size: tuple[int, int]) -> tuple[np.ndarray, tuple[int, int]]:
    """Return the part of an image that ``box`` covers, True inside the mask, and its place (top, left).

    A pixel is inside if the bilinear value of the mask at its centre is one half or more, as in detectron2.
    """
    (height, width), (x0, y0, x1, y1) = size, box
    left, top = max(0, int(np.floor(x0))), max(0, int(np.floor(y0)))
    right, bottom = min(width, int(np.ceil(x1))), min(height, int(np.ceil(y1)))
    if right <= left or bottom <= top:
        return np.zeros((0, 0), bool), (0, 0)
    xs = (torch.arange(left, right) + 0.5 - x0) / max(x1 - x0, 1e-6) * 2 - 1
    ys = (torch.arange(top, bottom) + 0.5 - y0) / max(y1 - y0, 1e-6) * 2 - 1
    places = torch.stack([xs.expand(len(ys), -1), ys[:, None].expand(-1, len(xs))], dim=-1)
    values = F.grid_sample(mask_SS[None, None].float(), places[None].float(), align_corners=False)[0, 0]
    return (values >= 0.5).numpy(), (top, left)


def encode_mask(mask_SS: Tensor, box: Sequence[float], size: tuple[int, int]) -> dict[str, Any]:
    """Return the run lengths, as text, of a mask [S, S] of probabilities in ``box``, in an image of ``size``."""
    whole = np.zeros(size, np.uint8, order="F")
    part, (top, left) = paste_mask(mask_SS, box, size)
    whole[top : top + part.shape[0], left : left + part.shape[1]] = part
    encoded = coco_tools()[1].encode(whole)
    return {"size": [int(side) for side in encoded["size"]], "counts": encoded["counts"].decode()}


def gather_rows(rows: list[dict[str, Any]], ranks: Ranks) -> list[dict[str, Any]]:
    """Gather the rows of all ranks, sorted by image: each image is on one rank alone."""
    found = [row for theirs in ranks.gather(rows) for row in theirs]
    return sorted(found, key=lambda row: (row["image_id"], -row["score"]))


def judge(rows: list[dict[str, Any]], data: CocoSet) -> CocoScores:
    """Return COCO's figures for ``rows``; without rows they are 0 if there is something to be found."""
    of_kinds, of_classes = {}, {name: {} for name in data.names}
    for kind, coco_kind in KINDS.items():
        evaluated = _evaluate(rows, data, coco_kind)
        of_kinds[kind] = {name: _percent(value) for name, value in zip(FIGURES, evaluated.stats.tolist(), strict=True)}
        # [threshold, recall, class, area, most]: all thresholds and recalls, all areas, the largest number.
        precision_TRK = evaluated.eval["precision"][:, :, :, 0, -1]
        for number, name in enumerate(data.names):
            values = precision_TRK[:, :, number]
            counted = values[values > -1]
            of_classes[name][kind] = _percent(counted.mean()) if counted.size else None
    return CocoScores(
        images=data.num_images, detections=len(rows), box=of_kinds["box"], mask=of_kinds["mask"], of_classes=of_classes
    )


def _evaluate(rows: list[dict[str, Any]], data: CocoSet, kind: str) -> Any:
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        # loadRes cannot take an empty list; an empty set of results is the ground truth without annotations.
        results = data.coco.loadRes(rows_for(kind, rows)) if rows else _nothing(data)
        evaluated = COCOeval(data.coco, results, kind)
        evaluated.evaluate()
        evaluated.accumulate()
        evaluated.summarize()
    return evaluated


def rows_for(kind: str, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows by which "bbox" or "segm" is judged.

    Rows of masks have no box: COCO would take the box's area for that of the mask, by which objects are small or large.
    detectron2 and mmdetection leave it out too.
    """
    return [{key: value for key, value in row.items() if kind == "bbox" or key != "bbox"} for row in rows]


def _nothing(data: CocoSet) -> Any:
    empty = coco_tools()[0]()
    empty.dataset = dict(data.coco.dataset, annotations=[])
    empty.createIndex()
    return empty


def _percent(value: float) -> float | None:
    """Convert to per cent; COCO says -1 if nothing counts."""
    return None if value < 0 else 100 * float(value)


def write_results(folder: Path, rows: list[dict[str, Any]], scores: CocoScores, step: int) -> None:
    """Write results.json, results-masks.json without boxes, and evaluation.json with the figures.

    pycocotools' loadRes reads the first two, to be judged as "bbox" and as "segm".
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / RESULTS, json.dumps(rows))
    write_whole(folder / MASK_RESULTS, json.dumps(rows_for("segm", rows)))
    report = {
        "step": step, "images": scores.images, "detections": scores.detections, "box": scores.box, "mask": scores.mask,
        "of_classes": scores.of_classes,
    }  # fmt: skip
    write_whole(folder / REPORT, json.dumps(report, indent=1) + "\n")


def require_known(labels: Sequence[str], data: CocoSet) -> tuple[int, ...]:
    """Return the category ids, in ``data``, of a detector's classes, in its order. UserError for a missing class."""
    ids = dict(zip(data.names, data.category_ids, strict=True))
    missing = [name for name in labels if name not in ids]
    if missing:
        raise UserError(
            f"val_annotations is {data.path}, which lacks the class {missing[0]!r}: give the same categories"
        )
    return tuple(ids[name] for name in labels)
