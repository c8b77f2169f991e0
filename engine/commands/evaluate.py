"""`mirl evaluate CHECKPOINT --val VAL` measures how good a fine-tuned classifier is, in all and by class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mirl.dataloaders.decoding.crops import evaluation_crop
from mirl.dataloaders.sources.opening import open_source
from mirl.engine.checkpoints.best import NAMES as WEIGHTS
from mirl.engine.checkpoints.kinds import CLASSIFIER, Given, given
from mirl.engine.commands.checkpoint_flags import add_checkpoint
from mirl.engine.commands.device_flag import add_device
from mirl.engine.configuration.flags import Parser
from mirl.engine.distributed.environment import hide_gpus
from mirl.engine.transfer.classification.classes import require_labels, require_same_classes
from mirl.errors import UserError


def main(argv: Sequence[str]) -> int:
    """Print accuracy, loss, and recall and precision of each class; write them with the confusions to --out."""
    arguments = _parser().parse_args(argv)
    for name in ("batch_size", "threads"):
        if getattr(arguments, name) < 1:
            raise UserError(f"{name} is {getattr(arguments, name)}: give 1 or more")
    if arguments.out is not None and arguments.out.exists():
        raise UserError(f"out is {arguments.out}, which exists: give another folder")
    found = given(arguments.checkpoint, arguments.which).require("mirl evaluate", CLASSIFIER)
    config = found.state["config"]
    averaged = bool(config["finetune"].get("ema"))
    if arguments.weights == "ema" and not averaged:
        raise UserError(f"weights is 'ema' and {found.checkpoint} was trained with --ema 0: give last")
    both = ["ema", "last"] if found.best and found.weights == "last" else ["last", "ema"]  # the second is told by class
    kept = [arguments.weights] if arguments.weights else both if averaged else ["last"]
    source = open_source(arguments.val, labels=True, index_dir=arguments.index_dir, split="val")
    classes = tuple(config.get("classes", ()))
    shown = ", ".join(map(str, arguments.val))
    require_same_classes(classes or None, source.classes, train="the checkpoint", val=f"val ({shown})")
    require_labels(source, found.state["parameters"]["head.weight"][0])

    hide_gpus(arguments.device)
    # These import torch and DALI, so they come late: a wrong path should be told at once.
    from mirl.engine.distributed.launch import join, leave

    ranks = join(arguments.device)
    try:
        report = _evaluate(found, source, kept, ranks, arguments)
        if ranks.is_main:
            from mirl.engine.commands.evaluation_report import tell, write_report

            print("\n".join(tell(report)))
            if arguments.out is not None:
                print(f"wrote {', '.join(map(str, write_report(report, arguments.out)))}")
        ranks.barrier()  # the others wait for the files, so that their launcher ends nothing too early
    finally:
        leave()
    return 0


def _evaluate(found: Given, source: Any, kept: Sequence[str], ranks: Any, arguments: Any) -> dict[str, Any]:
    """Return the report, as JSON values; it is the same on all ranks."""
    from mirl.dataloaders.eval_loader import build_eval_loader
    from mirl.engine.commands.predict import class_names
    from mirl.engine.transfer.classification.evaluation import evaluate_by_class
    from mirl.engine.transfer.classification.load import load_classifier

    report: dict[str, Any] = {"checkpoint": str(found.checkpoint), "chosen": str(found)}
    for weights in kept:
        model, config = load_classifier(found.checkpoint, weights=weights, device=ranks.device)
        encoder, count = model.config, model.head.out_features
        size = (encoder.image_height, encoder.image_width)
        with build_eval_loader(
            source, image_size=size, batch_size=arguments.batch_size, rank=ranks.rank, world_size=ranks.world_size,
            device_id=ranks.device.index or 0 if ranks.device.type == "cuda" else None, threads=arguments.threads,
            channels=encoder.channels, mean=encoder.mean, std=encoder.std,
        ) as loader:  # fmt: skip
            scores = evaluate_by_class(model, loader, ranks.device, count)
            broken = [f"{bad.path}: {bad.reason}" for part in ranks.gather(loader.bad_images) for bad in part]
        if not scores.total.images:
            raise UserError(f"every image of {', '.join(map(str, arguments.val))} is broken: run mirl validate-data")
        names = class_names(config.classes, count)
        report |= {
            "data": str(source.ledger), "classes": names, "image_size": list(size), "crop": str(evaluation_crop(size)),
            "precision": "fp32", "ranks": ranks.world_size, "images": scores.total.images, "broken": broken,
        }  # fmt: skip
        report.setdefault("weights", {})[weights] = {
            "top1_percent": scores.total.top1_percent,
            "top5_percent": scores.total.top5_percent,
            "loss": scores.total.loss,
            "correct": scores.total.correct,
            "correct_in_5": scores.total.correct_in_5,
            "by_class": dict(zip(names, scores.of_classes(), strict=True)),
            "confusion": scores.confusion,
        }
    return report


def _parser() -> Parser:
    parser = Parser(
        prog="mirl evaluate",
        description="Top-1, top-5 and loss of a fine-tuned classifier, recall and precision of each class, and which "
        "class is taken for which. Several ranks: torchrun --nproc-per-node N -m mirl.engine.cli evaluate ...",
    )
    add_checkpoint(parser, "a fine-tuned classifier")
    parser.add_argument(
        "--val", type=Path, nargs="+", required=True, metavar="VAL",
        help="labelled images of the classifier's classes: VAL/CLASS/x.jpg, a list with class numbers, or shards",
    )  # fmt: skip
    parser.add_argument(
        "--weights", choices=sorted(WEIGHTS),
        help="as training left them, or their average [each of them that there is]",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER",
        help="folder to make: evaluation.json, and tables and a picture of the confusions [nothing is written]",
    )  # fmt: skip
    add_device(parser)
    parser.add_argument("--batch-size", type=int, default=64, help="images of a forward pass [64]")
    parser.add_argument("--threads", type=int, default=4, help="threads that decode images [4]")
    parser.add_argument("--index-dir", type=Path, metavar="DIR", help="where the indexes of shards are [beside them]")
    return parser
