"""Read checkpoints: assemble any part of any parameter from the files of any number of ranks."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mirl.engine.checkpoints.finding import find_newest_good, locate, read_state, verify
from mirl.errors import UserError

__all__ = ["CheckpointReader", "find_newest_good", "locate", "verify"]


class CheckpointReader:
    """A reader opens one checkpoint folder, and reads tensors from disk as they are asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state: dict[str, Any] = read_state(path)
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
        """Return the shape of every parameter, by name."""
        return {name: tuple(shape) for name, shape in self.state["parameters"].items()}

    def read(self, name: str, kind: str, start: int, numel: int) -> torch.Tensor:
        """Return elements ``start`` to ``start + numel`` of a flattened parameter's ``kind``, fp32 on the CPU.

        Raises:
            UserError: the checkpoint does not hold all of them.
        """
        result = torch.empty(numel, dtype=torch.float32)
        filled, end = 0, start
        for piece_start, piece_numel, key, file in self._index.get((kind, name), ()):
            low, high = max(start, piece_start), min(start + numel, piece_start + piece_numel)
            if low < high:
                if low < end:  # an element counted twice would make up for a missing one
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
        """Return every parameter whole, in fp32."""
        return {
            name: self.read(name, "weight", 0, torch.Size(shape).numel()).reshape(shape)
            for name, shape in self.shapes.items()
        }

    def require_same_model(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Raise a UserError that names the first difference, unless the checkpoint's parameters are ``expected``."""
        ours, theirs = expected, self.shapes
        for name in sorted(set(ours) | set(theirs)):
            if ours.get(name) != theirs.get(name):
                raise UserError(
                    f"{self.path} is of another architecture: {name} is {_shape(theirs.get(name))} there and "
                    f"{_shape(ours.get(name))} here; "
                    f"give the model flags it was made with (its model is {self.state['config']['model']['name']}, "
                    "see state.json)"
                )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else "x".join(map(str, shape))
