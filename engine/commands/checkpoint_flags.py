"""All commands are told their checkpoint by the same flags."""

from __future__ import annotations

import argparse
from pathlib import Path

from mirl.engine.checkpoints.kinds import WHICH


def add_checkpoint(parser: argparse.ArgumentParser, wanted: str) -> None:
    """Add CHECKPOINT and --which. ``wanted``: the kinds that the command takes, for the help."""
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help=f"{wanted}: a checkpoint, or the folder of a run"
    )
    parser.add_argument(
        "--which", choices=WHICH,
        help="of a run: the best checkpoint by validation, or the newest good one [best, where the run has kept one]",
    )  # fmt: skip
