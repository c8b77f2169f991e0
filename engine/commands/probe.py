"""`mirl probe CHECKPOINT --data TRAIN --val VAL` measures how well frozen features separate labelled classes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mirl.engine.checkpoints.kinds import CLASSIFIER, given
from mirl.engine.commands.checkpoint_flags import add_checkpoint
from mirl.engine.commands.device_flag import add_device, device_of_process
from mirl.engine.configuration.flags import Parser, seed
from mirl.errors import UserError


def main(argv: Sequence[str]) -> int:
    """Print top-1 and top-5 of a linear probe and of weighted nearest neighbours; write them to --json."""
    arguments = _parser().parse_args(argv)
    if arguments.json and arguments.json.exists() and not arguments.overwrite:
        raise UserError(f"json is {arguments.json}, which exists: give another name or --overwrite")
    for name in ("batch_size", "threads", "epochs", "knn_k"):
        if getattr(arguments, name) < 1:
            raise UserError(f"{name} is {getattr(arguments, name)}: give 1 or more")
    if arguments.knn_temperature <= 0:
        raise UserError(f"knn_temperature is {arguments.knn_temperature}: give a number above 0, e.g. 0.07")

    found = given(arguments.checkpoint, arguments.which)
    print(f"checkpoint {found}", flush=True)
    if found.kind == CLASSIFIER and arguments.pool:
        raise UserError(
            f"pool is {arguments.pool!r} and {arguments.checkpoint} is a fine-tuned classifier: leave it out"
        )

    device = device_of_process(arguments.device)
    # These import torch and DALI, so they come late: a wrong flag should be told at once.
    from mirl.dataloaders.sources.paths import shown
    from mirl.engine.analysis.features import HEAD, count_classes, extract_features, load_frozen_encoder
    from mirl.engine.analysis.nearest_neighbours import knn_votes
    from mirl.engine.transfer.classification.linear_probe import train_linear_probe
    from mirl.engine.transfer.classification.load import load_classifier

    if found.kind == CLASSIFIER:
        model, pool = load_classifier(found.checkpoint, weights=found.weights, device=device)[0], HEAD
        print(f"features are those that its head sees (pool {model.pool}), not those of the pre-trained encoder")
    else:
        model, pool = load_frozen_encoder(found.checkpoint, device), arguments.pool or "avg"
    options = {
        "pool": pool, "device": device, "batch_size": arguments.batch_size, "threads": arguments.threads,
        "index_dir": arguments.index_dir,
    }  # fmt: skip
    train = extract_features(model, arguments.data, **options)
    val = extract_features(model, arguments.val, split="val", **options)
    classes = count_classes(train, val, names=(str(arguments.data), str(arguments.val)))
    print(f"data {train.account}: {shown(arguments.data)}\nval  {val.account}: {shown(arguments.val)}")
    print(f"features of {len(train)} training and {len(val)} validation images, {classes} classes")
    if train.skipped or val.skipped:
        print(f"left out: {train.skipped} training and {val.skipped} validation images, which are broken")

    k, temperature = arguments.knn_k, arguments.knn_temperature
    votes = knn_votes(train, val.features, num_classes=classes, k=k, temperature=temperature)
    probe = train_linear_probe(train, num_classes=classes, epochs=arguments.epochs, seed=arguments.seed)
    results = {
        "checkpoint": str(found.checkpoint),
        "kind": found.kind,
        "pool": pool,
        "train_images": len(train),
        "val_images": len(val),
        "classes": classes,
        "linear": _scores(probe(val.features), val.labels)
        | {"epochs": arguments.epochs, "rate": probe.rate, "seed": arguments.seed},
        "knn": _scores(votes, val.labels) | {"k": k, "temperature": temperature},
    }
    for name, note in (("linear", f"learning rate {probe.rate:g}"), ("knn", f"k {k}, temperature {temperature:g}")):
        scores = results[name]
        print(f"{name:<6}  top-1 {scores['top1_percent']:6.2f} %  top-5 {scores['top5_percent']:6.2f} %  ({note})")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")
        print(f"wrote {arguments.json}")
    return 0


def _scores(logits: Any, labels: Any) -> dict[str, float]:
    from mirl.engine.transfer.classification.evaluation import hits

    found = hits(logits, labels)
    return {
        "top1_percent": 100 * found[:, 0].float().mean().item(),
        "top5_percent": 100 * found.any(dim=1).float().mean().item(),
    }


def _parser() -> Parser:
    parser = Parser(prog="mirl probe", description="Linear probe and weighted nearest neighbours on frozen features.")
    add_checkpoint(parser, "a pre-trained model or a fine-tuned classifier")
    parser.add_argument("--data", type=Path, required=True, metavar="TRAIN", help="labelled images: TRAIN/CLASS/x.jpg")
    parser.add_argument("--val", type=Path, required=True, metavar="VAL", help="labelled images of the same classes")
    parser.add_argument("--index-dir", type=Path, metavar="DIR", help="the .idx files of tar shards [beside them]")
    parser.add_argument(
        "--pool", choices=("avg", "token"),
        help="features of a pre-trained encoder: the mean of the patches, or the class token [avg]",
    )  # fmt: skip
    parser.add_argument("--knn-k", type=int, default=20, metavar="K", help="neighbours [20]")
    parser.add_argument("--knn-temperature", type=float, default=0.07, metavar="T", help="of their weights [0.07]")
    parser.add_argument("--epochs", type=int, default=100, help="of the linear probe [100]")
    parser.add_argument("--seed", type=seed, default=0, help="of the linear probe's order and held-out images [0]")
    add_device(parser)
    parser.add_argument("--batch-size", type=int, default=64, help="images of a forward pass [64]")
    parser.add_argument("--threads", type=int, default=4, help="threads that decode images [4]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here too")
    parser.add_argument("--overwrite", action="store_true", help="replace --json if it exists")
    return parser
