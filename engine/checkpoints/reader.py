"""Reading checkpoints: finding the newest good one, checking it whole, and assembling any part of any parameter."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mirl.engine.checkpoints.files import FORMAT, POINTER, list_checkpoints, sha256_of
from mirl.errors import UserError


class CheckpointReader:
    """One checkpoint folder. Tensors are read from disk as they are asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state: dict[str, Any] = _read_json(path / "state.json")
        self._files: dict[Path, Any] = {}
        # (kind, name) -> [(start, numel, key, file)]
        self._index: dict[tuple[str, str], list[tuple[int, int, str, Path]]] = defaultdict(list)
        for file in sorted(path.glob("rank-*.safetensors")):
            try:
                stream = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file} cannot be read: {error}") from error
            self._files[file] = stream
            for key in stream.keys():  # noqa: SIM118 - not a dict
                kind, rest = key.split("/", 1)
                name, start = rest.rsplit("@", 1)
                self._index[kind, name].append((int(start), stream.get_slice(key).get_shape()[0], key, file))
        for pieces in self._index.values():
            pieces.sort()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter, by name."""
        return {name: tuple(shape) for name, shape in self.state["parameters"].items()}

    def read(self, name: str, kind: str, start: int, numel: int) -> torch.Tensor:
        """Elements ``start`` to ``start + numel`` of a flattened parameter's ``kind``, fp32 on the CPU.

        Raises:
            UserError: the checkpoint does not hold all of them.
        """
        result = torch.empty(numel, dtype=torch.float32)
        filled, end = 0, start
        for piece_start, piece_numel, key, file in self._index.get((kind, name), ()):
            low, high = max(start, piece_start), min(start + numel, piece_start + piece_numel)
            if low < high:
                if low < end:  # counted twice, it would make up for one that is missing
                    raise UserError(
                        f"{self.path} holds element {low} of {kind} {name} twice, in {file.name} and before: the "
                        "checkpoint is damaged; give another one"
                    )
                end = high
                result[low - start : high - start] = self._files[file].get_slice(key)[
                    low - piece_start : high - piece_start
                ]
                filled += high - low
        if filled != numel:
            raise UserError(
                f"{self.path} holds {filled} of {numel} elements of {kind} {name}: the checkpoint is incomplete"
            )
        return result

    def weights(self) -> dict[str, torch.Tensor]:
        """Every parameter whole, in fp32."""
        return {
            name: self.read(name, "weight", 0, torch.Size(shape).numel()).reshape(shape)
            for name, shape in self.shapes.items()
        }

    def require_same_model(self, expected: dict[str, tuple[int, ...]]) -> None:
        """UserError that names the first difference, where the checkpoint's parameters are not ``expected``."""
        ours, theirs = expected, self.shapes
        for name in sorted(set(ours) | set(theirs)):
            if ours.get(name) != theirs.get(name):
                raise UserError(
                    f"{self.path} is of another architecture: {name} is {_shape(theirs.get(name))} there and "
                    f"{_shape(ours.get(name))} here; "
                    f"give the model flags it was made with (its model is {self.state['config']['model']['name']}, "
                    "see state.json)"
                )


def verify(path: Path) -> str | None:
    """None when every file of ``path`` is as its manifest says, else what is wrong."""
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
    """``(path, remarks)``: the newest checkpoint in ``folder`` that verifies, and why newer ones were passed over."""
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
    """The checkpoint that a user means by ``path``: a checkpoint folder, or a run, whose newest good one is taken.

    Raises:
        UserError: there is none, or the named one is damaged. A named checkpoint is never replaced by another.
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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else "x".join(map(str, shape))
