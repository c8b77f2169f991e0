"""`mirl summary` describes the models of the paper, or a run with its own flags."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence

from mirl.engine.commands.device_flag import add_device, device_of_process
from mirl.engine.configuration.flags import HelpFormatter, Parser, image_size
from mirl.errors import UserError

DESCRIPTION = """\
Parameters, FLOPs and memory of the models of the paper; or of a run, with its time on this machine.

Every flag of `mirl pretrain` is taken (--recipe, --depth, --image-size, --batch-size, --data ...); with --checkpoint
every flag of `mirl finetune` is."""


def main(argv: Sequence[str]) -> int:
    """Print what ``argv`` asks for. UserError for an unknown flag, or a run that cannot be."""
    parser = Parser(
        prog="mirl summary",
        description=DESCRIPTION,
        usage="mirl summary [--model NAME] [--recipe NAME] [flags of a run]",
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--model", metavar="NAME", help="one model in detail; without any flag: the table of all")
    parser.add_argument(
        "--task",
        choices=("segment", "detect"),
        help="of a model of transfer: segment, with --image-size and --num-classes; detect, in windows of "
        "attention and without",
    )
    parser.add_argument("--json", action="store_true", help="machine-readable [off]")
    parser.add_argument(
        "--time",
        action=argparse.BooleanOptionalAction,
        help="measure the time of a step of the run; by default where the model is small enough for some seconds",
    )
    add_device(parser)
    known, flags = parser.parse_known_args(argv)
    if known.task == "segment":
        return _segment(known, flags)
    if known.task == "detect":
        if flags or known.time is not None:
            raise UserError(
                f"task is detect and {flags[0] if flags else '--time'} is given: give --model and --json alone"
            )
        from mirl.engine.commands.detection_summary import detection_summary

        print(detection_summary(known.model, known.json))
        return 0
    if not flags and known.time is None:
        # This import comes late, so that --help waits for no torch.
        from mirl.engine.commands.summary import run_summary

        print(run_summary(known.model, known.json))
        return 0
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded, as in a run; see engine/pretrain.py
    device_of_process(known.device)  # before anything else looks for a GPU
    from mirl.engine.commands.run_summary import summarise_run

    flags += ["--device", known.device, *(["--model", known.model] if known.model else [])]
    summary = summarise_run(flags, measure=known.time)
    print(json.dumps(summary.to_dict(), indent=2) if known.json else summary)
    return 0


def _segment(known: argparse.Namespace, flags: Sequence[str]) -> int:
    parser = Parser(prog="mirl summary --task segment", allow_abbrev=False, formatter_class=HelpFormatter)
    parser.add_argument("--image-size", type=image_size, default=(512, 512))
    parser.add_argument("--num-classes", type=int, default=150)
    asked = parser.parse_args(list(flags))
    if asked.num_classes < 2:
        raise UserError(f"num_classes is {asked.num_classes}: segmentation needs two classes or more")
    from mirl.engine.commands.segment_summary import segment_summary

    print(segment_summary(known.model, image_size=asked.image_size, classes=asked.num_classes, as_json=known.json))
    return 0
