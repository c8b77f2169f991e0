"""Whether a folder can hold a run, tried before anything is built: a run that cannot save is lost at its end."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from mirl.disk import sync
from mirl.errors import UserError


def probe_folder(out: Path) -> None:
    """Create, write, sync, rename, read and remove a file and a folder in ``out``, as a checkpoint does.

    Raises:
        UserError: one of them fails; names it and its reason.
    """
    token = secrets.token_hex(4)
    folder, renamed = out / f".probe-{token}", out / f".probe-{token}.renamed"
    data = b"a run writes here\n" * 64
    doing = "a folder be made"
    try:
        try:
            folder.mkdir()
            doing = "a file be written"
            path = folder / "file"
            path.write_bytes(data)
            doing = "a file be synced to the disk"
            sync(path)
            doing = "a file be renamed onto another"
            (folder / "older").write_bytes(b"")
            os.replace(path, folder / "older")
            doing = "a folder be synced to the disk"
            sync(folder)
            doing = "a folder be renamed"
            os.replace(folder, renamed)
            doing = "a file be read again"
            if (renamed / "older").read_bytes() != data:
                raise OSError("it does not hold what was written")
            doing = "a file be removed"
            (renamed / "older").unlink()
            renamed.rmdir()
        finally:
            for place in (folder, renamed):
                _remove(place)
    except OSError as error:
        reason = f"[Errno {error.errno}] {error.strerror}" if error.errno else str(error)
        raise UserError(
            f"out is {out}, where {doing.replace(' be ', ' cannot be ')}: {reason}; make room there, or give an --out "
            "on a file system that holds checkpoints"
        ) from error


def _remove(folder: Path) -> None:
    """What is left of a probe that failed; where nothing can be removed either, it stays."""
    try:
        for name in ("file", "older"):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()
    except OSError:
        return
