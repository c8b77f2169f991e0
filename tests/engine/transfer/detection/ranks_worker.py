"""One rank of test_ranks.py: two steps of a tiny detector under each ZeRO stage, and an evaluation; writes what it saw
with torch.save.

usage: python -m tests.engine.transfer.detection.ranks_worker < {"out": PREFIX, "data": FOLDER, "cases": {NAME: {...}}}
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from mirl.dataloaders.order import StepPlan
from mirl.engine.distributed.ds_engine import TrainEngine
from mirl.engine.distributed.launch import Ranks, join, leave
from mirl.engine.training.noise import seed_stochastic_depth
from mirl.engine.transfer.detection.annotations import CocoSet
from mirl.engine.transfer.detection.config import DetectSection
from mirl.engine.transfer.detection.detector import Detector
from mirl.engine.transfer.detection.evaluation import find_rows, gather_rows, judge
from mirl.engine.transfer.detection.loader import DetectionLoader, evaluation_batches
from mirl.engine.transfer.layer_decay import layer_decay_groups
from tests.engine.models.helpers import tiny_config
from tests.engine.transfer.ranks_worker import ds_config, pieces_of

BATCH, STEPS, LR, SIZE = 8, 2, 1e-3, (48, 64)


def make_detector() -> Detector:
    torch.manual_seed(0)
    config = tiny_config(depth=6, segments=2, patch_size=8, image_height=48, image_width=64)
    model = Detector(config, classes=10, regions=8, channels=8, proposals=20)
    model.roi_heads.score_thresh = 0.02  # an untrained one is sure of nothing
    return model


def train(case: dict, ranks: Ranks, folder: Path) -> dict:
    model = make_detector()
    optimizer = torch.optim.AdamW(layer_decay_groups(model, weight_decay=0.1, decay=0.5), lr=LR)
    engine = TrainEngine(model, optimizer, ds_config(case, ranks.world_size))
    data = CocoSet(folder / "train.json", folder / "train")
    share = BATCH // ranks.world_size
    plan = StepPlan(
        num_images=data.num_images, micro_batch=share, accumulation=1, rank=ranks.rank, world_size=ranks.world_size
    )
    loader = DetectionLoader(
        data, plan, DetectSection(), size=SIZE, multiple=16, seed=0, device=ranks.device, threads=1
    )
    losses = []
    for step in range(STEPS):
        batch = loader.next_micro_batch()
        if case.get("empty") and ranks.rank:  # a rank without any object
            batch.targets = [{name: value[:0] for name, value in target.items()} for target in batch.targets]
        seed_stochastic_depth(0, step, ranks.rank * share)
        found = engine.forward(batch.images, batch.sizes, batch.targets)
        loss = torch.stack(list(found.values())).sum()
        engine.backward(loss)
        assert engine.step(LR)
        losses.append(float(loss))
    loader.close()
    result = {"losses": losses, "weights": pieces_of((f for f in engine.fragments() if f.kind == "weight"), ranks)}
    result["rows"] = rows_of(engine.module, ranks, folder) if case.get("evaluate") else []
    return result


def rows_of(model: Detector, ranks: Ranks, folder: Path) -> list[dict]:
    """Of all ranks, as training evaluates."""
    data = CocoSet(folder / "val.json", folder / "val")
    batches = evaluation_batches(
        data, rank=ranks.rank, world_size=ranks.world_size, batch_size=1, variant="paper", size=SIZE, multiple=16,
        device=ranks.device, channels=3, threads=1,
    )  # fmt: skip
    return gather_rows(find_rows(model, batches, data, data.category_ids), ranks)


def main() -> None:
    settings = json.load(sys.stdin)
    torch.set_num_threads(1)
    ranks, folder = join(), Path(settings["data"])
    result = {name: train(case, ranks, folder) for name, case in settings["cases"].items()}
    rows = rows_of(make_detector(), ranks, folder)
    result["evaluated"] = {"rows": rows, "box": judge(rows, CocoSet(folder / "val.json", folder / "val")).box}
    torch.save(result, f"{settings['out']}-{ranks.rank}.pt")
    leave()


if __name__ == "__main__":
    main()
