"""`mirl average RUN --last N --out DIR` writes an average of a run's weights as a checkpoint of its own.

It is the mean of the run's last checkpoints, or the average that the run kept (--ema).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mirl.engine.checkpoints.kinds import given
from mirl.engine.configuration.flags import Parser
from mirl.errors import UserError


def main(argv: Sequence[str]) -> int:
    """Write the checkpoint and say what is in it. UserError if there is nothing to average."""
    arguments = _parser().parse_args(argv)
    if arguments.out.exists():
        raise UserError(f"out is {arguments.out}, which exists: give another name")
    ways = [bool(arguments.last), arguments.ema, len(arguments.checkpoints) > 1]
    if sum(ways) != 1:
        raise UserError("give one of --last N (of a run), --ema (of a run or a checkpoint), or several checkpoints")

    from mirl.engine.checkpoints.averaging import newest_of, write_average

    if arguments.last:
        chosen = newest_of(arguments.checkpoints[0], arguments.last)
    else:
        chosen = [given(path, "last" if arguments.ema else None).checkpoint for path in arguments.checkpoints]
    write_average(arguments.out, chosen, ema=arguments.ema)
    names = ", ".join(path.name for path in chosen)
    print(f"wrote {arguments.out}: " + (f"the average kept by {names}" if arguments.ema else f"the mean of {names}"))
    print("every command takes it as a CHECKPOINT; it has no moments, so a run starts from it by --init-from")
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="mirl average", description="Average the weights of a pre-training run over time, as a checkpoint."
    )
    parser.add_argument(
        "checkpoints", type=Path, nargs="+", metavar="CHECKPOINT", help="a run, or checkpoints of one architecture"
    )
    parser.add_argument("--last", type=int, metavar="N", help="of a run: the mean of its newest N checkpoints")
    parser.add_argument("--ema", action="store_true", help="the average that a run with --ema kept")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the checkpoint's folder, a new one")
    return parser
