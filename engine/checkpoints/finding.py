"""Find the newest good checkpoint of a run, or the one that a user names, and check it whole. This needs no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mirl.engine.checkpoints.files import FORMAT, POINTER, list_checkpoints, sha256_of
from mirl.errors import UserError


def verify(path: Path) -> str | None:
    """Return None if every file of ``path`` is as its manifest says, else say what is wrong."""
    manifest_path = path / "manifest.json"
    if not manifest_path.is_file():
        return "manifest.json is missing"
    try:
        manifest = json.loads(manifest_path.read_text())
        files = manifest["files"].items()
    except (json.JSONDecodeError, KeyError, AttributeError, UnicodeDecodeError):
        return "manifest.json is damaged"
    if manifest.get("format") != FORMAT:
        return f"its format is {manifest.get('format')} and this engine reads {FORMAT}"
    for name, expected in files:
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size} bytes instead of {expected['bytes']}"
        if sha256_of(file) != expected["sha256"]:
            return f"{name} was changed after it was written (sha256 differs)"
    return None


def find_newest_good(folder: Path) -> tuple[Path | None, list[str]]:
    """Return ``(path, remarks)``: the newest checkpoint in ``folder`` that verifies, and why newer ones did not."""
    remarks: list[str] = []
    candidates = list_checkpoints(folder)[::-1] if folder.is_dir() else []
    pointer = folder / POINTER
    pointed = pointer.read_text(errors="replace").strip() if pointer.is_file() else None
    if candidates and pointed != candidates[0].name:
        remarks.append(
            f"{pointer} {f'names {pointed!r}' if pointed else 'is missing or empty'}, the newest checkpoint is "
            f"{candidates[0].name}"
        )
    for candidate in candidates:
        problem = verify(candidate)
        if problem is None:
            return candidate, remarks
        remarks.append(f"{candidate.name} is passed over: {problem}")
    return None, remarks


def locate(path: Path) -> Path:
    """Return the checkpoint that a user means by ``path``: a checkpoint's folder, or the newest good one of a run.

    Raises:
        UserError: there is no checkpoint, or the named one is damaged. A named checkpoint is never replaced by another.
    """
    if (path / "manifest.json").is_file() or (path / "state.json").is_file():
        problem = verify(path)
        if problem:
            raise UserError(
                f"checkpoint {path} is damaged: {problem}; give another one, or --resume auto for the newest good one"
            )
        return path
    for folder in (path, path / "checkpoints"):
        found, remarks = find_newest_good(folder)
        if found:
            return found
        if remarks:
            raise UserError(f"no checkpoint in {folder} is whole: {'; '.join(remarks)}")
    state = "has no checkpoint" if path.is_dir() else "does not exist"
    raise UserError(f"{path} {state}: give a folder like RUN/checkpoints/step-00000100, or the run's own folder")


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return everything that a checkpoint holds but the tensors. UserError if it cannot be read."""
    path = checkpoint / "state.json"
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
