"""`mirl depth-report CHECKPOINT` tells whether a pre-trained model's depth serves it: a table, a picture, JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mirl.engine.checkpoints.files import write_whole
from mirl.engine.checkpoints.kinds import ENCODER, PRETRAINED, given
from mirl.engine.commands.checkpoint_flags import add_checkpoint
from mirl.engine.commands.depth_picture import draw, noise_of_accuracies
from mirl.engine.commands.device_flag import add_device, device_of_process
from mirl.engine.configuration.flags import Parser, seed
from mirl.errors import UserError


def main(argv: Sequence[str]) -> int:
    """Measure, print, and write OUT/depth.json and OUT/depth.png."""
    arguments = _parser().parse_args(argv)
    if arguments.out.exists():
        raise UserError(f"out is {arguments.out}, which exists: give another folder")
    for name in ("images", "train_images", "val_images", "probe_epochs", "steps", "batch_size"):
        if getattr(arguments, name) < 1:
            raise UserError(f"{name} is {getattr(arguments, name)}: give 1 or more")
    if arguments.cuts < 0:
        raise UserError(f"cuts is {arguments.cuts}: give 0 (no fine-tuning) or more")

    found = given(arguments.checkpoint, arguments.which).require("mirl depth-report", PRETRAINED, ENCODER)
    print(f"checkpoint {found}", flush=True)

    device = device_of_process(arguments.device)
    # These import torch and DALI, so they come late: a wrong flag should be told at once.
    from mirl.engine.analysis import depth
    from mirl.engine.analysis.depth_forecast import FEATURES, FINETUNINGS, GRADIENTS, PROBES, forecast
    from mirl.engine.analysis.features import load_frozen_encoder
    from mirl.engine.analysis.in_memory import ShortFinetune
    from mirl.engine.checkpoints.pretrained import load_encoder, load_pretrained

    checkpoint = found.checkpoint
    config, weights = load_encoder(checkpoint)
    report: dict[str, Any] = {
        "checkpoint": str(checkpoint), "model": config.label, "objective": config.objective,
        "depth": config.built_depth, "segments": config.segments, "seed": arguments.seed,
    }  # fmt: skip

    place = {"device": device, "index_dir": arguments.index_dir}

    model, encoder, train, val, images = None, None, None, None, None
    recipe = ShortFinetune(steps=arguments.steps, batch_size=arguments.batch_size, lr=arguments.lr)
    try:
        model = load_pretrained(checkpoint, device=device)
    except UserError as error:
        print(f"no gradient norms: {error}")
    else:
        if config.vgg_loss:
            print("gradient norms are those of the loss without its VGG term")
        data = depth.load_labelled(arguments.data, config, limit=arguments.images, labels=False, **place)
        images = data.images
        print(f"data {data.account}")
    if arguments.val is not None:
        train = depth.load_labelled(arguments.data, config, limit=arguments.train_images, **place)
        val = depth.load_labelled(arguments.val, config, limit=arguments.val_images, split="val", **place)
        encoder = load_frozen_encoder(checkpoint, device)
        print(f"data {train.account}\nval  {val.account}")
        report |= {"train_images": len(train.images), "val_images": len(val.images)}
    else:
        print("no probes and no fine-tuning: give --val, and labels in --data (a folder for each class)")

    print("timing a few steps ...", flush=True)
    plan = forecast(
        say=lambda line: print(line, flush=True), model=model, gradient_images=images, encoder=encoder, train=train,
        val=val, probe_epochs=arguments.probe_epochs, source=config, weights=weights, cuts=arguments.cuts,
        recipe=recipe, seed=arguments.seed,
    )  # fmt: skip
    print(f"this takes {plan}", flush=True)

    arguments.out.mkdir(parents=True)
    if model is not None and images is not None:
        print(f"gradient norms over {len(images)} images ...", flush=True)
        gradients = depth.gradient_norms(model, images, seed=arguments.seed, advance=plan.begin(GRADIENTS))
        report |= {"gradient_norm": gradients.norm, "gradient_noise": gradients.noise}
        report["gradient_images"] = len(images)
        _write(report, arguments.out)
    if encoder is not None and train is not None and val is not None:
        print(f"linear probes of {config.built_depth} blocks on {len(train.images)} images ...", flush=True)
        advance = plan.begin(FEATURES)
        seen, unseen = (depth.features_by_block(encoder, data, advance=advance) for data in (train, val))
        report["probe_top1_percent"] = depth.probe_accuracies(
            seen, unseen, epochs=arguments.probe_epochs, seed=arguments.seed, advance=plan.begin(PROBES)
        )
        _write(report, arguments.out)
        if arguments.cuts:
            count = len(depth.cut_depths(config.built_depth, arguments.cuts))
            print(f"{count} fine-tunings of {arguments.steps} steps ...", flush=True)
            fresh_from = depth.reinit_accuracies(
                config, weights, train, val, cuts=arguments.cuts, recipe=recipe, seed=arguments.seed,
                advance=plan.begin(FINETUNINGS),
            )  # fmt: skip
            report["reinit_top1_percent"] = {str(first): value for first, value in fresh_from.items()}
            report["finetune_steps"] = arguments.steps

    _write(report, arguments.out)
    written = ["depth.json"] + (["depth.png"] if draw(report, arguments.out / "depth.png") else [])
    print(table(report))
    print(f"wrote {' and '.join(str(arguments.out / name) for name in written)}")
    return 0


def _write(report: dict[str, Any], out: Path) -> None:
    """Write after each measurement, so that a later one cannot lose it."""
    write_whole(out / "depth.json", json.dumps(report, indent=2) + "\n")


def table(report: dict[str, Any]) -> str:
    """Return a line for each block, and a reading of each measurement."""
    fresh_from = {int(first): value for first, value in report.get("reinit_top1_percent", {}).items()}
    lines = ["block  gradient norm  probe top-1 %  top-1 % with this block and all after it fresh"]
    for block in range(report["depth"]):
        gradient = f"{report['gradient_norm'][block]:13.3e}" if "gradient_norm" in report else f"{'-':>13}"
        probe = f"{report['probe_top1_percent'][block]:13.2f}" if "probe_top1_percent" in report else f"{'-':>13}"
        fresh = f"{fresh_from[block]:.2f}" if block in fresh_from else "-"
        lines.append(f"{block:>5}  {gradient}  {probe}  {fresh}")
    return "\n".join([*lines, *reading(report)])


def reading(report: dict[str, Any]) -> list[str]:
    """Say what the figures mean, in sentences that hold for any figures."""
    lines = []
    if probes := report.get("probe_top1_percent"):
        best = max(range(len(probes)), key=probes.__getitem__)
        lines.append(
            f"probe: best after block {best} ({probes[best]:.2f} %), after the last one {probes[-1]:.2f} %, "
            f"{probes[best] - probes[-1]:.2f} less"
        )
    if fresh_from := {int(first): value for first, value in report.get("reinit_top1_percent", {}).items()}:
        whole = fresh_from.pop(report["depth"])
        error = noise_of_accuracies(whole, report["val_images"])
        lines.append(f"fine-tuned with every block as pre-trained: {whole:.2f} %; less than {error:.2f} apart is noise")
        harmless = []
        for first, value in sorted(fresh_from.items(), reverse=True):
            if value < whole - error:
                break
            harmless.append(first)
        lines.append(
            f"with the blocks from {harmless[-1]} on initialised afresh it is no worse, as far as "
            f"{report['val_images']} images and one seed can tell"
            if harmless
            else "initialising even the last blocks afresh costs accuracy: the whole depth is of use"
        )
    return lines


def _parser() -> Parser:
    parser = Parser(
        prog="mirl depth-report",
        description="For each block: gradient norm, probe accuracy, and the effect of initialising it and all after it "
        "afresh before a short fine-tuning.",
    )
    add_checkpoint(parser, "a pre-trained model")
    parser.add_argument("--data", type=Path, required=True, metavar="TRAIN", help="images; labelled: TRAIN/CLASS/x.jpg")
    parser.add_argument(
        "--val", type=Path, metavar="VAL", help="labelled images of the same classes; none: gradients only"
    )
    parser.add_argument("--index-dir", type=Path, metavar="DIR", help="the .idx files of tar shards [beside them]")
    parser.add_argument("--out", type=Path, default=Path("depth_report"), help="folder to make [depth_report]")
    parser.add_argument("--images", type=int, default=256, help="images of the gradient [256]")
    parser.add_argument(
        "--train-images", type=int, default=4000, help="labelled images of probe and fine-tuning [4000]"
    )
    parser.add_argument("--val-images", type=int, default=2000, help="images that accuracies are measured on [2000]")
    parser.add_argument("--probe-epochs", type=int, default=50, help="epochs of a linear probe [50]")
    parser.add_argument("--cuts", type=int, default=4, help="depths from which blocks are made fresh; 0: none [4]")
    parser.add_argument("--steps", type=int, default=300, help="steps of a fine-tuning [300]")
    parser.add_argument("--batch-size", type=int, default=64, help="images of a step [64]")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate of a fine-tuning [0.001]")
    add_device(parser)
    parser.add_argument("--seed", type=seed, default=0, help="seed of masks, probes and fine-tunings [0]")
    return parser
