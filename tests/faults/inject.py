"""Faults that a rank meets at an exact point of its own work. The engine is not changed: Python reports files that are
opened, renamed and removed to audit hooks before it happens, and the hook ends the process then.
"""

from __future__ import annotations

import os
import signal
import sys

# Phase of a save -> (rank that is killed, audit event, part of its first argument)
PHASES = {
    "the shard is written, not synced": (1, "open", "rank-00001-of-00002.safetensors"),
    "the shard is not announced": (1, "open", "rank-00001-of-00002.done"),
    "all shards are there, no state": (0, "open", ".state.json.tmp"),
    "no manifest": (0, "open", ".manifest.json.tmp"),
    "not renamed into place": (0, "os.rename", ".partial"),
    "renamed, the pointer is old": (0, "open", ".latest.tmp"),
    "the new pointer is aside": (0, "os.rename", ".latest.tmp"),
    "published, old ones not removed": (0, "shutil.rmtree", "step-"),
}


def kill_in_save(phase: str, step: str) -> None:
    """kill -9 of this process in ``phase`` of saving checkpoint ``step`` (the folder's name)."""
    _, wanted, part = PHASES[phase]
    saving = False

    def hook(event: str, arguments: tuple) -> None:
        nonlocal saving
        if event not in ("open", "os.rename", "os.mkdir", "shutil.rmtree"):
            return
        path = os.fspath(arguments[0]) if isinstance(arguments[0], str | os.PathLike) else ""
        saving = saving or (step in path and event == "os.mkdir")
        inside = path.split("/checkpoints/")[-1]
        name = inside if event == "shutil.rmtree" else os.path.basename(path)
        if saving and event == wanted and part in name and (event != "os.rename" or not name.endswith(".done.tmp")):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
