"""`mirl config [pretrain|finetune|segment|detect] FLAGS` prints the configuration of such a run as JSON."""

from __future__ import annotations

from collections.abc import Sequence

from mirl.engine.configuration.flags import CommandLine, parse
from mirl.errors import UserError

USAGE = """usage: mirl config [pretrain|finetune|segment|detect] [--recipe NAME] [--config FILE] [flags of that run]

Prints the resolved configuration as JSON, and starts nothing: all settings, with recipe, file and flags applied.
    mirl config --recipe small_data --epochs 200 > mine.json
    mirl pretrain --config mine.json --data FOLDER"""


def main(argv: Sequence[str]) -> int:
    """Print the configuration of ``argv``; the kind of run comes first and defaults to pretrain."""
    words = list(argv)
    if words and words[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    kind = words.pop(0) if words and not words[0].startswith("-") else "pretrain"
    if kind not in ("pretrain", "finetune", "segment", "detect"):
        raise UserError(f"{kind!r} is no kind of run: give pretrain, finetune, segment or detect, then flags")
    print(parse(_command(kind), words).to_json(), end="")
    return 0


def _command(kind: str) -> CommandLine:
    if kind == "pretrain":
        from mirl.engine.pretraining.command_line import PRETRAIN

        return PRETRAIN
    if kind == "detect":
        from mirl.engine.transfer.detection.command_line import DETECT

        return DETECT
    if kind == "segment":
        from mirl.engine.transfer.segmentation.command_line import SEGMENT

        return SEGMENT
    from mirl.engine.transfer.classification.command_line import FINETUNE

    return FINETUNE
