"""`mirl report RUN [RUN ...]` writes one HTML file with everything that the runs tell."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from mirl.engine.configuration.flags import Parser
from mirl.errors import UserError


def main(argv: Sequence[str]) -> int:
    """Write the page and say where it is."""
    arguments = _parser().parse_args(argv)
    runs, out = arguments.runs, arguments.out
    if out.exists() and not arguments.overwrite:
        raise UserError(f"out is {out}, which exists: give another name or --overwrite")
    if out.suffix not in (".html", ".htm"):
        raise UserError(f"out is {out}: give a file name that ends in .html")

    # These import matplotlib, so they come late: a wrong flag should be told at once.
    from mirl.engine.analysis.run_page import page
    from mirl.engine.analysis.run_record import read_run
    from mirl.engine.checkpoints.files import write_whole

    records = [read_run(run) for run in runs]
    text = page(records, made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, text)
    print(f"wrote {out}: {len(records)} run{'s' if len(records) > 1 else ''}, {len(text.encode()) / 2**20:.1f} MiB")
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="mirl report",
        description="Runs as one self-contained HTML file: curves over each other, reconstructions by step, settings "
        "and what differs, data, events. It needs no network and can be printed.",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of runs")
    parser.add_argument("--out", type=Path, default=Path("report.html"), metavar="FILE", help="[report.html]")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    return parser
