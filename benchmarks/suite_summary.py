"""One JSON and one page of what `gpu_suite.sh` measured: python -m benchmarks.suite_summary FOLDER.

suite.json has the keys of a results file (benchmarks/README.md), filled from all parts, and ``parts[]``: name, status
("passed", "failed", "stopped", "left out"), detail, seconds, limit_s.
"""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.measure import commit, device, device_name, versions

LISTS = ("cases", "attention", "memory")
LAST_LINES = 3


def read_parts(folder: Path) -> list[dict[str, Any]]:
    """From parts.tsv: name, exit status or why it was left out, seconds, limit."""
    parts = []
    for line in (folder / "parts.tsv").read_text().splitlines():
        name, status, seconds, limit = line.split("\t")
        words = {"0": "passed", "5": "left out", "124": "stopped", "137": "stopped"}
        state = words.get(status, "failed" if status.isdigit() else status.split()[0].replace("left", "left out"))
        detail = status.removeprefix("left out: ") if not status.isdigit() else f"exit status {status}"
        log = folder / f"{name}.log"
        last = [text for text in log.read_text(errors="replace").splitlines() if text.strip()] if log.exists() else []
        parts.append(
            {
                "name": name,
                "status": state,
                "detail": detail,
                "seconds": int(seconds),
                "limit_s": int(limit),
                "last_lines": last[-LAST_LINES:],
            }
        )
    return parts


def collect(folder: Path) -> dict[str, Any]:
    """The content of suite.json."""
    suite: dict[str, Any] = {
        "device": device_name(),
        "device_type": device().type,
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "versions": versions(),
        "commit": commit(),
        "parts": read_parts(folder),
    }
    suite |= {key: [] for key in LISTS}
    for path in sorted(folder.glob("*/*.json")):
        content = json.loads(path.read_text())
        for key, value in content.items():
            if isinstance(value, list):
                suite.setdefault(key, []).extend(value)
    return suite


def summary(suite: dict[str, Any], tables: list[str]) -> str:
    lines = [f"{suite['device']}, torch {suite['versions']['torch']}, {suite['date']}, commit {suite['commit']}", ""]
    for case in suite["cases"]:
        if case.get("measured_as", "").startswith("engine"):
            shares = [
                f"{name} {case[key]:.1f} %"
                for name, key in (("MFU", "mfu_percent"), ("plain MFU", "plain_mfu_percent"))
                if case[key] is not None
            ]
            speed = f"{case['images_per_s']:.1f} images/s"
            lines += [f"**{case['name']}, batch {case['batch']}, whole engine: {', '.join([speed, *shares])}**", ""]
    lines += ["| part | outcome | seconds | limit | |", "|---" * 5 + "|"]
    for part in suite["parts"]:
        note = part["detail"] if part["status"] == "left out" else " ".join(part["last_lines"][-1:])[:100]
        lines.append(f"| {part['name']} | {part['status']} | {part['seconds']} | {part['limit_s']} | {note} |")
    return "\n".join(lines) + "\n\n" + "\n\n".join(tables) + "\n"


def main(argv: list[str]) -> int:
    if len(argv) != 1 or not (Path(argv[0]) / "parts.tsv").exists():
        print("usage: python -m benchmarks.suite_summary FOLDER, a folder that gpu_suite.sh wrote", file=sys.stderr)
        return 2
    folder = Path(argv[0])
    suite = collect(folder)
    (folder / "suite.json").write_text(json.dumps(suite, indent=1) + "\n")
    # Each part's own table, without its title line.
    tables = [path.read_text().partition("\n")[2].strip() for path in sorted(folder.glob("*/*.md"))]
    (folder / "summary.md").write_text(summary(suite, tables))
    print(f"wrote {folder / 'suite.json'} and {folder / 'summary.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
