"""Publish the files of a checkpoint's folder: write them aside, describe them, and rename the folder into place."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mirl.disk import set_mode, sync
from mirl.errors import UserError

if TYPE_CHECKING:  # commands look for a checkpoint before they import torch, so that a wrong one is told at once
    from torch import Tensor

FORMAT = 1
POINTER = "latest"


@contextmanager
def aside(final: Path) -> Iterator[Path]:
    """Give a name beside ``final`` for a file or a folder, which becomes ``final`` at the end, or is removed.

    Raises:
        UserError: ``final`` exists.
    """
    if final.exists():
        raise UserError(f"{final} exists and is not written over: give another name")
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = final.parent / f".{final.name}.{secrets.token_hex(4)}.partial"
    try:
        yield partial
        for path in (*partial.rglob("*"), partial):
            sync(path)
        os.replace(partial, final)
        sync(final.parent)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def write_weights(final: Path, weights: Mapping[str, Tensor], state: dict[str, Any]) -> None:
    """Write a checkpoint of whole parameters in one process.

    It has no moments, so a run can start from it but not go on. weights: fp32, by parameter name. state: at least
    ``config``; the shapes are added to it.

    Raises:
        UserError: ``final`` exists.
    """
    with aside(final) as partial:
        partial.mkdir()
        path = partial / "rank-00000-of-00001.safetensors"
        save_tensors({f"weight/{name}@0": weight.flatten() for name, weight in weights.items()}, path)
        shapes = {name: list(weight.shape) for name, weight in weights.items()}
        write_manifest(partial, state | {"parameters": shapes}, {path.name: describe(path)}, world_size=1)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file with the usual read permissions of this process's files.

    safetensors itself makes its files readable by their owner alone.
    """
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode & 0o777
    save_file(dict(tensors), path, metadata=metadata)
    set_mode(path, mode)


def write_manifest(folder: Path, state: dict[str, Any], files: dict[str, Any], *, world_size: int) -> None:
    """Write state and manifest of a checkpoint, beside its other ``files`` (name -> `describe`)."""
    write_json(folder / "state.json", state)
    config = json.dumps(state.get("config"), sort_keys=True).encode()
    manifest = {
        "format": FORMAT,
        "world_size": world_size,
        "config_sha256": hashlib.sha256(config).hexdigest(),
        "files": files | {"state.json": describe(folder / "state.json")},
    }
    write_json(folder / "manifest.json", manifest)


def name_of(step: int) -> str:
    """Return the name of the folder of a checkpoint, which sorts by step."""
    return f"step-{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """List the published checkpoints in ``folder``, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def sha256_of(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def describe(path: Path) -> dict[str, Any]:
    """Return the manifest's entry of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    write_whole(path, json.dumps(values, indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write all of ``text`` or nothing."""
    aside = path.with_name(f".{path.name}.tmp")
    with aside.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(aside, path)
