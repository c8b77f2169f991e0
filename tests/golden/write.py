"""Write the golden record: `python -m tests.golden.write`. Say in the commit why a figure changed."""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from tests.golden.runs import machine, record_runs
from tests.golden.streams import record_streams
from tests.support.launch import CHECKOUT

HERE = Path(__file__).resolve().parent


def main() -> None:
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=CHECKOUT, capture_output=True, text=True, check=True
    ).stdout.strip()
    with tempfile.TemporaryDirectory() as folder:
        runs = record_runs(Path(folder))
    _write("streams.json", {"commit": commit, "streams": record_streams()})
    _write("runs.json", {"commit": commit, "machine": machine(), "runs": runs})


def _write(name: str, values: dict[str, Any]) -> None:
    text = json.dumps(values, indent=1) + "\n"
    (HERE / name).write_text(text)
    print(f"wrote {HERE / name}")


if __name__ == "__main__":
    main()
