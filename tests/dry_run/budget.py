"""The budget of a step: operators, launches and bytes an image of each case, with the reason of every change.

    python -m tests.dry_run.budget --why "the norm's backward kernel sums the bias gradients too"

writes what the code needs now behind the entries of budget.json. A change that needs more fails until that is done.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mirl.engine.accounting.fake_step import FakeStep
from mirl.errors import UserError
from tests.dry_run.cases import BATCH, MODELS, step_of

FILE = Path(__file__).with_name("budget.json")
FIGURES = ("operators", "launches", "kilobytes_per_image", "megaflops_per_image")


def figures(step: FakeStep) -> dict[str, int]:
    return {
        "operators": sum(step.operators.values()),
        "launches": step.launches,
        "kilobytes_per_image": round(step.bytes / step.batch / 1e3),
        "megaflops_per_image": round(step.flops / step.batch / 1e6),
    }


def read() -> dict[str, list[dict]]:
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--why", required=True, help="what the new figures come from")
    why = parser.parse_args().why.strip()
    if len(why.split()) < 3:
        raise UserError(f"why is {why!r}: give the reason in words")
    entries = read()
    for name in MODELS:
        now = figures(step_of(name))
        history = entries.setdefault(name, [])
        if not history or {key: history[-1][key] for key in FIGURES} != now:
            history.append(now | {"why": why})
    FILE.write_text(json.dumps(entries, indent=2) + "\n")
    print(f"wrote {FILE} for batch {BATCH}")


if __name__ == "__main__":
    main()
