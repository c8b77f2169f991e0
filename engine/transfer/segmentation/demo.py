"""`mirl segment --demo` trains a small segmenter on composites, and then makes the same run from a fresh encoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from mirl.engine.checkpoints.best import read_best
from mirl.engine.checkpoints.files import list_checkpoints
from mirl.engine.configuration.flags import parse
from mirl.engine.transfer.segmentation.command_line import SEGMENT
from mirl.engine.transfer.segmentation.config import SegmentConfig
from mirl.errors import UserError

RECIPE = "demo"
PRETRAINED = "runs/demo"  # mirl pretrain writes there by default, or to runs/demo-2 and so on if it was taken


def run_demo(argv: Sequence[str]) -> int:
    """Train from the demo's own pre-trained checkpoint, then from a fresh encoder, and say which is better.

    ``argv``: flags of `mirl segment`, which change both runs alike. UserError if there is no checkpoint.
    """
    config = parse(SEGMENT, ["--recipe", RECIPE, *argv])
    config = with_checkpoint(config, Path(PRETRAINED))
    from mirl.engine.distributed.environment import hide_gpus

    hide_gpus(config.run.device)
    # These import torch, DeepSpeed and DALI, so they come late: a wrong flag should answer at once.
    from mirl.dataloaders.tools.composite_labels import prepare_label_composites
    from mirl.engine.transfer.segmentation.run import segment

    if not config.data.data:
        data = dataclasses.replace(config.data, data=(str(prepare_label_composites()),))
        config = dataclasses.replace(config, data=data)
    pretrained = segment(config)
    fresh = segment(as_fresh(config, pretrained))
    print("\n".join(comparison(pretrained, fresh)), flush=True)
    return 0


def with_checkpoint(config: SegmentConfig, runs: Path) -> SegmentConfig:
    """Return ``config`` with a checkpoint: the given one, or that of the newest run called ``runs``, numbered or not.

    UserError if there is none.
    """
    if config.segment.checkpoint or config.run.resume:
        return config
    found = [run for run in runs.parent.glob(f"{runs.name}*") if list_checkpoints(run / "checkpoints")]
    if not found:
        raise UserError(
            f"checkpoint is not given and there is no run in {runs}: make one by mirl pretrain (some minutes), or give "
            "--checkpoint"
        )
    newest = max(found, key=lambda run: (run / "checkpoints").stat().st_mtime)
    return dataclasses.replace(config, segment=dataclasses.replace(config.segment, checkpoint=str(newest)))


def as_fresh(config: SegmentConfig, out: Path) -> SegmentConfig:
    """Return the same run from a fresh encoder, in a folder beside ``out``."""
    return dataclasses.replace(
        config,
        segment=dataclasses.replace(config.segment, fresh=True),
        run=dataclasses.replace(config.run, out=f"{out}_fresh"),
    )


def comparison(pretrained: Path, fresh: Path) -> list[str]:
    """Return lines that say how both ended, by their best evaluations on held-out composites."""
    scores = [read_best(out / "checkpoints") for out in (pretrained, fresh)]
    if None in scores:
        return ["there is nothing to compare: one of the runs was not evaluated"]
    ours, theirs = (best.score_percent for best in scores if best is not None)
    verdict = (
        f"{ours - theirs:.1f} points more than from a fresh encoder"
        if ours > theirs
        else f"NO BETTER than from a fresh encoder ({ours - theirs:.1f} points)"
    )
    return [
        f"held-out mIoU {ours:.1f}% from the pre-trained encoder, {theirs:.1f}% from a fresh one: {verdict}",
        f"look at {pretrained}/pictures and {fresh}/pictures",
    ]
