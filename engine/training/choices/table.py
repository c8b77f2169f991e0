"""The table of what was chosen: in a run's folder as choices.json, and in the user's cache for the runs to come."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import torch

from mirl.dataloaders.tools.demo import default_cache_dir
from mirl.engine.checkpoints.files import write_whole
from mirl.engine.training.choices.measuring import Finding
from mirl.engine.version import __version__
from mirl.errors import UserError

NAME = "choices.json"
FORMAT = 1
DEFAULT, MEASURED = "default", "measured"


@dataclass(frozen=True, kw_only=True)
class Table:
    """Findings by choice and use, and where they come from.

    source: "measured", "default", or what it was read from. environment: of the measurements, see `environment_of`.
    """

    source: str
    environment: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    findings: Mapping[str, Mapping[str, Finding]] = field(default_factory=dict)

    def find(self, choice: str, use: str) -> Finding | None:
        """What was found for a use; None where the table does not have it."""
        return self.findings.get(choice, {}).get(use)

    def to_json(self) -> str:
        """The text of choices.json."""
        return json.dumps({"format": FORMAT} | asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `to_json`; ValueError for anything else."""
        values = json.loads(text)
        try:
            if values["format"] != FORMAT:
                raise ValueError(f"it has format {values['format']!r}, this version reads {FORMAT}")
            findings = {
                choice: {use: _finding(**found) for use, found in uses.items()}
                for choice, uses in values["findings"].items()
            }
            return cls(
                source=str(values["source"]), environment=dict(values["environment"]),
                seconds=float(values["seconds"]), findings=findings,
            )  # fmt: skip
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error


def _finding(**values: Any) -> Finding:
    found = Finding(**values)
    for name in ("chosen", "default", "reason"):
        if not isinstance(getattr(found, name), str):
            raise TypeError(f"{name} is {getattr(found, name)!r}")
    if not isinstance(found.times_ms, dict) or not isinstance(found.excluded, dict):
        raise TypeError("times_ms and excluded must be objects")
    return found


def read_table(path: Path, *, mend: str) -> Table:
    """The table at ``path``; ``mend`` says what to do where there is none.

    Raises:
        UserError: it is not there, or not a table.
    """
    try:
        return Table.from_json(path.read_text())
    except OSError as error:
        raise UserError(f"choices is {path}, which cannot be read ({error.strerror}): {mend}") from None
    except ValueError as error:
        raise UserError(f"choices is {path}, which is no table of choices ({error}): {mend}") from None


def environment_of(device: torch.device) -> dict[str, str]:
    """What measurements depend on beside shapes and dtype: the device and the libraries."""
    found = {"device": _device_name(device), "engine": __version__, "torch": torch.__version__}
    for name in ("triton", "xformers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    if device.type == "cuda":
        found["cudnn"] = str(torch.backends.cudnn.version())
    else:
        found["threads"] = str(torch.get_num_threads())
    return found


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    named = re.search(r"^model name\s*:\s*(.+)$", text, re.M)
    return named[1].strip() if named else platform.processor() or platform.machine()


def cache_file(environment: Mapping[str, str]) -> Path:
    """The file of the user's cache for measurements in ``environment``, below $MIRL_CACHE or $XDG_CACHE_HOME/mirl."""
    digest = hashlib.sha256(json.dumps(environment, sort_keys=True).encode()).hexdigest()[:12]
    device = re.sub(r"[^A-Za-z0-9]+", "-", environment["device"]).strip("-")
    return default_cache_dir() / "choices" / f"{device}-{digest}.json"


def read_cache(environment: Mapping[str, str]) -> tuple[Table, list[str]]:
    """What was measured in ``environment`` before, and a line if the file is damaged, which is then left out."""
    path = cache_file(environment)
    empty = Table(source=MEASURED, environment=environment)
    try:
        table = Table.from_json(path.read_text())
    except FileNotFoundError:
        return empty, []
    except (OSError, ValueError) as error:
        return empty, [f"WARNING: {path} is damaged and is not used: {(str(error).splitlines() or [''])[0][:200]}"]
    if table.environment != environment:
        return empty, [f"WARNING: {path} is of another environment and is not used"]
    return table, []


def write_cache(table: Table) -> list[str]:
    """Add what ``table`` measured to the user's cache; returns a line where that cannot be written."""
    path = cache_file(table.environment)
    known, _ = read_cache(table.environment)
    merged = {choice: dict(uses) for choice, uses in known.findings.items()}
    for choice, uses in table.findings.items():
        merged.setdefault(choice, {}).update({use: found for use, found in uses.items() if found.measured})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = Table(source=MEASURED, environment=table.environment, findings=merged)
        write_whole(path, kept.to_json())
    except OSError as error:
        return [f"WARNING: the choices are not kept for later runs: {path} cannot be written ({error.strerror})"]
    return []
