"""Read back what a run left in its folder: measurements, events, settings, pictures and the log's opening lines."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirl.errors import UserError


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A record has what a run left in its folder.

    ``records``: measurements by step, each a mapping with "step"; after a resumption the later one counts.
    ``settings``: SECTION.FIELD to value. ``pictures``: by step. ``opening``: the log's lines before the first step of
    the latest start. ``history``: (step, settings until then).
    """

    name: str
    folder: Path
    records: list[dict[str, Any]]
    events: list[dict[str, Any]]
    settings: dict[str, Any]
    pictures: dict[int, Path]
    opening: list[str]
    history: list[tuple[int, dict[str, Any]]]
    depth_report: Path | None

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Return steps and values of measurement ``key``, without those that are null."""
        points = [(record["step"], record[key]) for record in self.records if _is_number(record.get(key))]
        return [step for step, _ in points], [value for _, value in points]

    @property
    def keys(self) -> list[str]:
        """List the measurements of the run, in the order in which they first came."""
        return list(dict.fromkeys(key for record in self.records for key, value in record.items() if _is_number(value)))


def read_run(folder: Path) -> RunRecord:
    """Read the record of the run in ``folder``.

    A last line that was cut off by a kill is left out.

    Raises:
        UserError: the folder has no run.
    """
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file() or not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no run (metrics.jsonl and config.json): give the folder of a run")
    by_step: dict[int, dict[str, Any]] = {}
    events = []
    for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            continue
        if "event" in record:
            events.append(record)
        else:
            by_step[record["step"]] = by_step.get(record["step"], {}) | record
    pictures = {}
    for path in sorted((folder / "pictures").glob("step-*.png")):
        if path.stem.removeprefix("step-").isdigit():
            pictures[int(path.stem.removeprefix("step-"))] = path
    report = folder / "depth_report" / "depth.png"
    return RunRecord(
        name=folder.name or str(folder), folder=folder, records=[by_step[step] for step in sorted(by_step)],
        events=events, settings=_settings(folder / "config.json"), pictures=pictures,
        opening=_opening(folder / "log.txt"), history=_history(folder / "config-history.jsonl"),
        depth_report=report if report.is_file() else None,
    )  # fmt: skip


def differences(runs: list[RunRecord]) -> dict[str, list[Any]]:
    """Return the settings in which ``runs`` differ: the value of each run, None if it has no such setting."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    rows = {name: [run.settings.get(name) for run in runs] for name in names}
    return {name: values for name, values in rows.items() if any(value != values[0] for value in values)}


def flat(values: dict[str, Any]) -> dict[str, Any]:
    """Flatten nested settings to SECTION.FIELD."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= {f"{name}.{key}": item for key, item in value.items()}
        else:
            found[name] = value
    return found


def _settings(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is no JSON: {error}") from error
    return flat(values) if isinstance(values, dict) else {}


def _history(path: Path) -> list[tuple[int, dict[str, Any]]]:
    if not path.is_file():
        return []
    found = []
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        if isinstance(entry.get("config"), dict):
            found.append((int(entry["step"]), flat(entry["config"])))
    return found


def _opening(path: Path) -> list[str]:
    if not path.is_file():
        return []
    opening: list[str] = []
    began = False
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("MIRL engine "):
            opening, began = [], True
        if line.startswith("first step begins"):
            began = False
        if began:
            opening.append(line)
    return opening


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
