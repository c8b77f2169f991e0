"""A checkpoint is whole or absent: written aside, described by a manifest, renamed into place, pointed to last.

    OUT/checkpoints/latest                          name of the newest whole checkpoint
    OUT/checkpoints/best.json                       which one is the best by validation, and its score (see best.py)
    OUT/checkpoints/step-00000300/manifest.json     size and sha256 of every other file
    OUT/checkpoints/step-00000300/state.json        step counters, loader position, configuration, parameter shapes
    OUT/checkpoints/step-00000300/rank-00000-of-00002.safetensors
                                                    fp32 weights and AdamW moments owned by that rank, keyed
                                                    KIND/NAME@START

A fragment file says which elements of which parameter it holds, so any number of ranks and any ZeRO stage can read the
files of any other. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from mirl.disk import sync
from mirl.engine.checkpoints.files import (
    POINTER,
    describe,
    list_checkpoints,
    name_of,
    save_tensors,
    write_json,
    write_manifest,
    write_whole,
)
from mirl.engine.distributed.ds_engine import Fragment
from mirl.engine.distributed.launch import Ranks
from mirl.engine.streams import say

COMMIT_TIMEOUT_S = 1800.0
ABANDON_GRACE_S = 10.0


class CheckpointWriter:
    """Write the checkpoints of one run in the background, one at a time.

    `save` copies the state to host memory and returns; a thread writes it. Rank 0's thread publishes the checkpoint
    once every rank's file is on disk. A save that fails leaves every earlier checkpoint as it was, and `poll` tells of
    it.
    """

    def __init__(self, folder: Path, ranks: Ranks, *, keep: int) -> None:
        self.folder, self.ranks, self.keep = folder, ranks, keep
        self.stall_seconds = 0.0
        # Names of checkpoints that are not pruned, and of those that this writer has published.
        self.spared: frozenset[str] = frozenset()
        self.published: set[str] = set()
        # The token names the unfinished folders of this run, so that those of a killed run cannot be taken for ours.
        self._token = ranks.broadcast(secrets.token_hex(4))
        self._thread: threading.Thread | None = None
        self._failure: str | None = None
        self._published: Path | None = None
        self._stalls_ms: dict[str, float] = {}
        self._give_up_at = float("inf")
        if ranks.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob(".step-*.partial"):
                shutil.rmtree(leftover, ignore_errors=True)
        ranks.barrier()

    def save(self, step: int, fragments: Iterable[Fragment], state: dict[str, Any]) -> None:
        """Start writing the checkpoint of ``step``, after waiting for the one before it."""
        started = time.perf_counter()
        self.wait()
        copies = {fragment.key: fragment.tensor.detach().to("cpu", copy=True) for fragment in fragments}
        thread = threading.Thread(target=self._write, args=(step, copies, state), name="checkpoint")
        thread.start()  # this may fail: if addresses are limited, there may be no room for its stack
        self._thread = thread
        stall_seconds = time.perf_counter() - started
        self.stall_seconds += stall_seconds
        self._stalls_ms[name_of(step)] = 1000 * stall_seconds

    def wait(self) -> None:
        """Wait until this rank's part of the last save is written (on rank 0: until it is published)."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def abandon(self) -> None:
        """Finish writing, but wait no longer than a moment for other ranks: some may never come."""
        self._give_up_at = time.monotonic() + ABANDON_GRACE_S
        self.wait()

    def stall_ms(self, published: Path) -> float:
        """Return how long this rank's training stood still for a checkpoint that `poll` returned."""
        return self._stalls_ms.pop(published.name)

    def poll(self) -> tuple[Path | None, str | None]:
        """Return ``(published, failure)`` since the last call: a new checkpoint's path, a failed one's reason."""
        result = self._published, self._failure
        self._published = self._failure = None
        return result

    def _write(self, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        name = name_of(step)
        partial = self.folder / f".{name}.{self._token}.partial"
        path = partial / f"rank-{self.ranks.rank:05d}-of-{self.ranks.world_size:05d}.safetensors"
        try:
            partial.mkdir(exist_ok=True)
            save_tensors(tensors, path)
            sync(path)
            write_json(partial / f"{path.stem}.done", describe(path))
            if self.ranks.is_main:
                self._publish(partial, self.folder / name, state)
        except Exception as error:  # a thread must hand on every error (safetensors has a type of its own)
            self._failure = f"the checkpoint of step {step} was not written: {error}"
            if self.ranks.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            else:
                _mark_failed(path, str(error))

    def _publish(self, partial: Path, final: Path, state: dict[str, Any]) -> None:
        files = self._await_all(partial)
        write_manifest(partial, state, files, world_size=self.ranks.world_size)
        for marker in partial.glob("*.done"):
            marker.unlink()
        sync(partial)
        if final.exists():  # the run had saved this step already, before it was resumed at an earlier step
            shutil.rmtree(final)
        os.replace(partial, final)
        sync(self.folder)
        write_whole(self.folder / POINTER, final.name + "\n")
        sync(self.folder)
        self._published = final
        self.published.add(final.name)
        self.prune()

    def _await_all(self, partial: Path) -> dict[str, Any]:
        """Return the descriptions of all ranks' files, once all are there."""
        deadline = time.monotonic() + COMMIT_TIMEOUT_S
        while True:
            failed = list(partial.glob("*.failed"))
            if failed:
                raise OSError(f"{failed[0].stem}: {failed[0].read_text().strip() or 'see the output of that rank'}")
            done = sorted(partial.glob("*.done"))
            if len(done) == self.ranks.world_size:
                return {f"{marker.stem}.safetensors": json.loads(marker.read_text()) for marker in done}
            if time.monotonic() > self._give_up_at:
                raise TimeoutError(f"the run ended when {len(done)} of {self.ranks.world_size} ranks had written")
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"only {len(done)} of {self.ranks.world_size} ranks wrote into {partial.parent}: is --out on a "
                    "file system that all hosts share?"
                )
            time.sleep(0.02)

    def prune(self) -> None:
        """Remove all but the newest checkpoints and the spared ones, on rank 0."""
        if self.keep:
            for old in list_checkpoints(self.folder)[: -self.keep]:
                if old.name in self.spared:
                    continue
                shutil.rmtree(old, ignore_errors=True)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _mark_failed(path: Path, reason: str) -> None:
    """Tell rank 0, which waits for file ``path``. A full disk has no room for a new file, but for a new name."""
    marker = path.with_suffix(".failed")
    try:
        if path.exists():
            os.truncate(path, 0)
            os.replace(path, marker)
        marker.write_text(reason)
    except OSError as error:
        say(f"{path.stem}: {reason}; rank 0 may not have been told why: {error}")
