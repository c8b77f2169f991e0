"""`mirl predict CHECKPOINT IMAGE ...` prints the classes that a fine-tuned classifier sees in images.

For a segmenter it writes the classes of every pixel (`mirl.engine.commands.predict_segments`), for a detector the
objects in the images (`predict_objects`).
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mirl.dataloaders.decoding.crops import evaluation_crop
from mirl.engine.checkpoints.best import NAMES as WEIGHTS
from mirl.engine.checkpoints.files import write_whole
from mirl.engine.checkpoints.kinds import CLASSIFIER, DETECTOR, SEGMENTER, given
from mirl.engine.commands import predict_objects
from mirl.engine.commands.checkpoint_flags import add_checkpoint
from mirl.engine.commands.device_flag import add_device, device_of_process
from mirl.engine.commands.image_inputs import open_images
from mirl.engine.commands.predict_segments import check_out, predict_segments
from mirl.engine.configuration.flags import Parser
from mirl.errors import UserError


def main(argv: Sequence[str]) -> int:
    """Print the classes of each image with their probabilities, or write them to --out."""
    arguments = _parser().parse_args(argv)
    for name in ("top", "batch_size", "threads"):
        if getattr(arguments, name) < 1:
            raise UserError(f"{name} is {getattr(arguments, name)}: give 1 or more")
    out = arguments.out
    found = given(arguments.checkpoint, arguments.which).require("mirl predict", CLASSIFIER, SEGMENTER, DETECTOR)
    if found.kind == DETECTOR:
        return predict_objects.run(found, arguments)
    if found.kind == SEGMENTER:
        check_out(out)
        source = open_images(arguments.images, index_dir=arguments.index_dir)
        print(f"checkpoint {found}", flush=True)
        return predict_segments(found, source, out, device=arguments.device)
    if out is not None:
        if out.suffix.lower() not in FORMATS:
            raise UserError(f"out is {out}: give a name that ends in {' or '.join(FORMATS)}")
        if out.exists() and not arguments.overwrite:
            raise UserError(f"out is {out}, which exists: give another name or --overwrite")
        if not out.parent.is_dir():
            raise UserError(f"out is {out} and {out.parent} is no folder: make it, or give another name")
    source = open_images(arguments.images, index_dir=arguments.index_dir)
    print(f"checkpoint {found}", flush=True)

    device = device_of_process(arguments.device)
    # These import torch and DALI, so they come late: a wrong path should be told at once.
    from mirl.engine.transfer.classification.load import load_classifier

    weights = arguments.weights or found.weights
    model, config = load_classifier(found.checkpoint, weights=weights, device=device)
    size = (model.config.image_height, model.config.image_width)
    names = class_names(config.classes, model.head.out_features)
    print(f"weights {weights}: {WEIGHTS[weights]}; images {source.ledger}; crop: {evaluation_crop(size)}", flush=True)
    options = {"top": arguments.top, "batch_size": arguments.batch_size, "threads": arguments.threads}
    rows = []
    for row in predictions(model, source, names, device=device, **options):
        rows.append(row)
        if out is None:
            print(_line(row), flush=True)
    broken = [row for row in rows if "error" in row]
    counts = Counter(row["predictions"][0]["class"] for row in rows if "error" not in row)
    print(f"{len(rows)} images: " + ", ".join(f"{name} {count}" for name, count in counts.most_common()))
    if out is not None:
        write_whole(out, FORMATS[out.suffix.lower()](rows))
        print(f"wrote {out}")
    for row in broken[:5]:
        print(f"not read: {row['image']}: {row['error']}")
    if len(broken) > 5:
        print(f"not read: {len(broken) - 5} more" + (f", see {out}" if out is not None else ""))
    return 0


def class_names(classes: Sequence[str], count: int) -> list[str]:
    """Return a name for each label: the run's, or the number if the run has none."""
    return [*classes[:count], *map(str, range(len(classes), count))]


def predictions(
    model: Any, source: Any, names: Sequence[str], *, device: Any, top: int, batch_size: int, threads: int
) -> Iterator[dict[str, Any]]:
    """Yield {"image", "predictions"} for each image of ``source`` in order, {"image", "error"} for an unreadable one.

    The predictions are the ``top`` classes, the likeliest first, each {"class", "label", "probability"}.
    """
    import torch

    from mirl.dataloaders.eval_loader import build_eval_loader

    config = model.config
    with build_eval_loader(
        source, image_size=(config.image_height, config.image_width), batch_size=min(batch_size, source.num_images),
        device_id=device.index or 0 if device.type == "cuda" else None, threads=threads, channels=config.channels,
        mean=config.mean, std=config.std, labels=False,
    ) as loader, torch.no_grad():  # fmt: skip
        for batch in loader:
            best = model(batch.images).float().softmax(dim=1).topk(min(top, len(names)), dim=1)
            reasons = {bad.position: bad.reason for bad in loader.bad_images}
            chosen = zip(batch.positions.tolist(), best.values.tolist(), best.indices.tolist(), strict=True)
            for position, values, labels in chosen:
                if position >= source.num_images:
                    continue
                row: dict[str, Any] = {"image": source.path(position)}
                if position in reasons:
                    yield row | {"error": reasons[position]}
                    continue
                pairs = zip(labels, values, strict=True)
                yield row | {
                    "predictions": [
                        {"class": names[label], "label": label, "probability": value} for label, value in pairs
                    ]
                }


def _line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{row['image']}  not read: {row['error']}"
    return f"{row['image']}  " + "  ".join(f"{item['class']} {item['probability']:.4f}" for item in row["predictions"])


def _as_csv(rows: list[dict[str, Any]]) -> str:
    """Write a line for each image: its path, classes and probabilities from the likeliest on, and any reading error."""
    ranks = max((len(row.get("predictions", ())) for row in rows), default=0)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    heads = [f"{column}_{rank}" for rank in range(1, ranks + 1) for column in ("class", "probability")]
    writer.writerow(["image", *heads, "error"])
    for row in rows:
        cells = [cell for item in row.get("predictions", ()) for cell in (item["class"], f"{item['probability']:.6f}")]
        writer.writerow([row["image"], *cells, *[""] * (2 * ranks - len(cells)), row.get("error", "")])
    return text.getvalue()


def _as_json(rows: list[dict[str, Any]]) -> str:
    return json.dumps(rows, indent=1) + "\n"


FORMATS = {".csv": _as_csv, ".json": _as_json}


def _parser() -> Parser:
    parser = Parser(
        prog="mirl predict",
        description="Classes of images by a fine-tuned classifier, of pixels by a segmenter, objects by a detector.",
    )
    add_checkpoint(parser, "a fine-tuned classifier, a segmenter or a detector")
    parser.add_argument(
        "images", type=Path, nargs="+", metavar="IMAGE", help="image files, folders, lists of paths or tar shards"
    )
    parser.add_argument("--top", type=int, default=3, metavar="K", help="classes shown for each image [3]")
    parser.add_argument(
        "--weights", choices=sorted(WEIGHTS),
        help="as training left them, or their average [those that made the checkpoint the best, else last]",
    )  # fmt: skip
    parser.add_argument(
        "--out",
        type=Path,
        metavar="PATH",
        help="write a .csv or .json file instead of printing; of a segmenter: the folder of its pictures, needed; of "
        "a detector: the folder of its pictures and JSON [detections]",
    )
    parser.add_argument(
        "--min-score", type=float, default=0.5, metavar="X", help="of a detector: least score of what is told [0.5]"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    add_device(parser)
    parser.add_argument("--batch-size", type=int, default=64, help="images of a forward pass [64]")
    parser.add_argument("--threads", type=int, default=4, help="threads that decode images [4]")
    parser.add_argument("--index-dir", type=Path, metavar="DIR", help="where the indexes of shards are [beside them]")
    return parser
