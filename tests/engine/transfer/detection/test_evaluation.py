"""The figures are pycocotools' own for the written results; masks are pasted where they belong."""

from __future__ import annotations

import contextlib
import io
import json

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mirl.engine.distributed.launch import Ranks
from mirl.engine.transfer.detection import evaluation
from mirl.engine.transfer.detection.annotations import CocoSet
from mirl.engine.transfer.detection.evaluation import (
    FIGURES,
    as_rows,
    encode_mask,
    gather_rows,
    judge,
    paste_mask,
    write_results,
)


@pytest.fixture(scope="module")
def data(composites) -> CocoSet:
    return CocoSet(composites / "val.json", composites / "val")


def guesses(data: CocoSet, shift: float = 1.5) -> list[dict]:
    """A row for most objects, boxes and masks a little off, and some that are wrong."""
    rows, rng = [], np.random.default_rng(0)
    for index, image_id in enumerate(data.image_ids):
        objects = data.objects(index)
        for box, label, mask in zip(objects.boxes, objects.labels, objects.masks, strict=True):
            moved = np.roll(mask, 1, axis=1)
            encoded = coco_mask.encode(np.asfortranarray(moved))
            x0, y0, x1, y1 = box.tolist()
            wrong = rng.random() < 0.2
            rows.append(
                {
                    "image_id": image_id, "category_id": data.category_ids[(label - 1 + wrong) % 10],
                    "score": round(float(rng.random()), 6), "bbox": [x0 + shift, y0, x1 - x0, y1 - y0],
                    "segmentation": {"size": list(mask.shape), "counts": encoded["counts"].decode()},
                }
            )  # fmt: skip
    return rows


def by_hand(annotations, results, kind: str) -> list[float]:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        evaluated = COCOeval(truth, truth.loadRes(str(results)), kind)
        evaluated.evaluate()
        evaluated.accumulate()
        evaluated.summarize()
    return evaluated.stats.tolist()


def test_the_figures_are_those_of_pycocotools_for_the_written_results(data, composites, tmp_path):
    rows = guesses(data)
    scores = judge(rows, data)
    write_results(tmp_path, rows, scores, step=7)
    for kind, coco_kind, name in (("box", "bbox", "results.json"), ("mask", "segm", "results-masks.json")):
        wanted = by_hand(composites / "val.json", tmp_path / name, coco_kind)
        found = getattr(scores, kind)
        assert tuple(found) == FIGURES and len(wanted) == 12
        assert [-1 if value is None else value / 100 for value in found.values()] == pytest.approx(wanted, abs=1e-12)
        assert 0.2 < wanted[0] < 0.95, "a figure that is 0 or 1 proves little"
    report = json.loads((tmp_path / "evaluation.json").read_text())
    assert report["step"] == 7 and report["box"]["AP"] == scores.box["AP"]
    # The mean over classes that have objects is the figure itself.
    present = [found["mask"] for found in report["of_classes"].values() if found["mask"] is not None]
    assert np.mean(present) == pytest.approx(scores.mask["AP"])
    assert set(report["of_classes"]) == set(data.names) and len(present) < len(data.names)


def test_exact_detections_score_100_and_none_scores_0(data):
    nothing = judge([], data)
    assert nothing.box["AP"] == nothing.mask["AP50"] == 0 and nothing.detections == 0
    rows = []
    for index, image_id in enumerate(data.image_ids):
        objects = data.objects(index)
        for box, label, mask in zip(objects.boxes.tolist(), objects.labels, objects.masks, strict=True):
            encoded = coco_mask.encode(np.asfortranarray(mask))
            bbox = [*box[:2], box[2] - box[0], box[3] - box[1]]
            shape = {"size": list(mask.shape), "counts": encoded["counts"].decode()}
            key = data.category_ids[label - 1]
            rows.append({"image_id": image_id, "category_id": key, "score": 1.0, "bbox": bbox, "segmentation": shape})
    perfect = judge(rows, data)
    assert perfect.box["AP"] == perfect.mask["AP"] == pytest.approx(100)
    # A detection inside a crowd counts neither for nor against.
    (crowd,) = [item for item in data.coco.anns.values() if item["iscrowd"]]
    x, y, width, height = crowd["bbox"]
    whole = np.asfortranarray(data.coco.annToMask(crowd))
    inside = coco_mask.encode(whole)
    inside["counts"] = inside["counts"].decode()
    extra = {"image_id": crowd["image_id"], "category_id": crowd["category_id"], "score": 1.0,
             "bbox": [x + 1, y + 1, width - 2, height - 2], "segmentation": inside}  # fmt: skip
    assert judge([*rows, extra], data).box["AP"] == pytest.approx(100)


def test_a_mask_is_pasted_into_the_pixels_of_its_box():
    # A quarter of the box is inside the mask: 14 of 28 rows, 14 of 28 columns.
    mask = torch.zeros(28, 28)
    mask[:14, :14] = 1
    part, place = paste_mask(mask, (10.0, 20.0, 30.0, 60.0), (100, 100))
    assert place == (20, 10) and part.shape == (40, 20)
    assert part[:20, :10].all() and part.sum() == 200
    # At the border what is outside is cut off, and a box outside has no pixel.
    part, place = paste_mask(torch.ones(28, 28), (-10.0, -10.0, 10.0, 10.0), (100, 100))
    assert place == (0, 0) and part.shape == (10, 10) and part.all()
    assert not paste_mask(torch.ones(28, 28), (120.0, 0.0, 130.0, 5.0), (100, 100))[0].size
    encoded = encode_mask(mask, (10.0, 20.0, 30.0, 60.0), (100, 100))
    whole = coco_mask.decode({"size": encoded["size"], "counts": encoded["counts"].encode()})
    assert whole.sum() == 200 and whole[20:40, 10:20].all()


def test_rows_are_in_the_pixels_and_ids_of_the_original():
    result = {"boxes": torch.tensor([[10.0, 20.0, 30.0, 40.0]]), "labels": torch.tensor([2]),
              "scores": torch.tensor([0.75]), "masks": torch.ones(1, 1, 28, 28)}  # fmt: skip
    (row,) = as_rows(result, 42, (80, 100), (160, 300), (1, 7))
    assert row["bbox"] == [30.0, 40.0, 60.0, 40.0] and row["category_id"] == 7 and row["image_id"] == 42
    area = int(coco_mask.area({"size": row["segmentation"]["size"], "counts": row["segmentation"]["counts"].encode()}))
    assert row["segmentation"]["size"] == [160, 300] and area == 60 * 40


def test_only_one_whole_mask_exists_at_a_time(monkeypatch):
    alive, most = [0], [0]
    original = np.zeros

    class Counted(np.ndarray):
        def __del__(self):
            alive[0] -= self.shape == (200, 300)

    def counting(shape, *arguments, **keywords):
        made = original(shape, *arguments, **keywords).view(Counted)
        if made.shape == (200, 300):
            alive[0] += 1
            most[0] = max(most[0], alive[0])
        return made

    monkeypatch.setattr(evaluation.np, "zeros", counting)
    result = {"boxes": torch.tensor([[1.0, 2.0, 200.0, 150.0]]).repeat(20, 1), "labels": torch.ones(20, dtype=int),
              "scores": torch.rand(20), "masks": torch.rand(20, 1, 28, 28)}  # fmt: skip
    assert len(as_rows(result, 1, (200, 300), (200, 300), (1,))) == 20
    assert most[0] == 1


def test_rows_of_ranks_come_together_in_one_order(data):
    rows = guesses(data)
    one = Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1, device=torch.device("cpu"))
    assert gather_rows(rows, one) == gather_rows(rows[::-1], one)
    assert judge(gather_rows(rows[::-1], one), data) == judge(gather_rows(rows, one), data)
