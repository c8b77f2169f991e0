"""One rank of test_ranks.py: trains a tiny classifier with layer decay and an average of its weights under each ZeRO
stage, and evaluates it; writes what it saw with torch.save.

usage: python -m tests.engine.transfer.ranks_worker < {"out": PREFIX, "data": FOLDER, "cases": {NAME: {...}}}
"""

from __future__ import annotations

import json
import sys

import torch
from torch.nn import functional as F

from mirl.dataloaders import build_eval_loader
from mirl.engine.distributed.ds_config import read_ds_config
from mirl.engine.distributed.ds_engine import TrainEngine
from mirl.engine.distributed.launch import Ranks, join, leave
from mirl.engine.training.ema import ShardedEma
from mirl.engine.transfer.classification.classifier import Classifier
from mirl.engine.transfer.classification.evaluation import evaluate
from mirl.engine.transfer.layer_decay import layer_decay_groups
from tests.engine.models.helpers import tiny_config

# The decay rises: 2/11 and 3/12 in the first two updates, then DECAY, which is below the next, 4/13.
BATCH, STEPS, LR, DECAY, CLASSES = 8, 3, 1e-2, 0.3, 3


def make_classifier() -> Classifier:
    torch.manual_seed(0)
    return Classifier(tiny_config(), num_classes=CLASSES, train_positions=True)


def make_optimizer(model: Classifier) -> torch.optim.AdamW:
    groups = layer_decay_groups(model, weight_decay=0.1, decay=0.5)
    return torch.optim.AdamW(groups, lr=LR)


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (BATCH, 16, 24, 3), generator=generator, dtype=torch.uint8)
    return images, torch.arange(BATCH) % CLASSES


def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float(), labels)


def ds_config(case: dict, world_size: int) -> dict:
    values = read_ds_config(case["stage"])
    values |= {
        "train_batch_size": BATCH,
        "train_micro_batch_size_per_gpu": BATCH // world_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": case.get("bf16", False)},
        "steps_per_print": 10**9,
    }
    values["zero_optimization"] |= case.get("zero", {})
    if "offload_optimizer" in values["zero_optimization"]:
        values["zero_optimization"]["offload_optimizer"]["pin_memory"] = False
    return values


def logits_of(averages: dict[str, list[tuple[int, torch.Tensor]]], case: dict) -> torch.Tensor:
    """Of a plain model with ``averages`` for weights, in the compute dtype of ``case``.

    In this process, because ZeRO-3 replaces torch's F.linear by one that rounds the bias on its own.
    """
    model, read = make_classifier(), read_from(averages)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(read(name, "ema", 0, parameter.numel()).view_as(parameter))
        return (model.bfloat16() if case.get("bf16") else model)(inputs()[0]).float()


def read_from(pieces: dict[str, list[tuple[int, torch.Tensor]]]):
    """A `FragmentReader` of what all ranks had."""

    def read(name: str, kind: str, start: int, numel: int) -> torch.Tensor:
        assert kind == "ema"
        return torch.cat([tensor for _, tensor in sorted(pieces[name], key=lambda piece: piece[0])])[
            start : start + numel
        ]

    return read


def pieces_of(fragments, ranks: Ranks) -> dict[str, list[tuple[int, torch.Tensor]]]:
    """Of all ranks, by name."""
    ours = [(fragment.name, fragment.start, fragment.tensor.detach().clone()) for fragment in fragments]
    found: dict[str, list] = {}
    for name, start, tensor in (piece for theirs in ranks.gather(ours) for piece in theirs):
        found.setdefault(name, []).append((start, tensor))
    return found


def train(case: dict, ranks: Ranks, earlier: dict | None) -> dict:
    """``earlier``: averages saved under another stage, which are loaded at the end."""
    model = make_classifier()
    engine = TrainEngine(model, make_optimizer(model), ds_config(case, ranks.world_size))
    ema = ShardedEma(engine, DECAY)
    images, labels = inputs()
    mine = slice(ranks.rank * BATCH // ranks.world_size, (ranks.rank + 1) * BATCH // ranks.world_size)

    def step() -> float:
        loss = loss_of(engine.forward(images[mine]), labels[mine])
        engine.backward(loss)
        assert engine.step(LR)
        total = loss.detach().clone()
        torch.distributed.all_reduce(total)
        return total.item() / ranks.world_size

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return engine.module(images).float()

    losses = []
    for _ in range(STEPS):
        losses.append(step())
        ema.update()
    result = {"ema": pieces_of(ema.fragments(), ranks), "before": logits()}
    with ema.swapped_in() as module:
        assert module is engine.module
        result["inside"] = logits()
    result["after"], result["wanted"] = logits(), logits_of(result["ema"], case)
    losses.append(step())
    result["losses"] = losses
    result["weights"] = pieces_of((f for f in engine.fragments() if f.kind == "weight"), ranks)
    if earlier is not None:
        ema.load(read_from(earlier))
        result["loaded"] = pieces_of(ema.fragments(), ranks)
    return result


def scores(data: str, ranks: Ranks, batch_size: int) -> dict:
    with build_eval_loader(
        data, image_size=(16, 24), batch_size=batch_size, rank=ranks.rank, world_size=ranks.world_size, threads=1
    ) as loader:
        return vars(evaluate(make_classifier(), loader, ranks.device))


if __name__ == "__main__":
    torch.set_num_threads(1)
    settings = json.load(sys.stdin)
    place = join()
    results, saved = {}, None
    for name, case in settings["cases"].items():
        results[name] = train(case, place, saved)
        saved = results[name]["ema"]
    results["scores"] = {size: scores(settings["data"], place, size) for size in (4, 5)}
    torch.save(results, f"{settings['out']}-{place.rank}.pt")
    leave()
