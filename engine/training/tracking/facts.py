"""What a tracker is told of a run besides its measurements."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirl.engine.checkpoints.files import write_whole
from mirl.engine.version import __version__

FOLDER = "trackers"
"""In a run's folder: for each tracker a file that says which run of the tracker is this run."""
_GIT_SECONDS = 10.0
_ENGINE = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """One run. config: nested plain values, as in config.json. start_step: from which this start goes on."""

    out: Path
    config: dict[str, Any]
    start_step: int

    @property
    def name(self) -> str:
        """What the run is called: the name of its folder."""
        return self.out.resolve().name

    def recall(self, tracker: str) -> dict[str, str]:
        """What an earlier start of this run noted for ``tracker``; nothing where there was none."""
        try:
            noted = json.loads((self.out / FOLDER / f"{tracker}.json").read_text())
        except (OSError, ValueError):
            return {}
        return noted if isinstance(noted, dict) else {}

    def note(self, tracker: str, values: dict[str, str]) -> None:
        """Note ``values`` for later starts. OSError where they cannot be written."""
        (self.out / FOLDER).mkdir(exist_ok=True)
        write_whole(self.out / FOLDER / f"{tracker}.json", json.dumps(values, indent=1) + "\n")


def versions() -> dict[str, str]:
    """The version of the engine, and the commits of its checkout and of the folder that the run was started in.

    A commit ends with " (changed)" where tracked files differ from it. What is no checkout, or has no git, is left out.
    """
    found = {"engine_version": __version__}
    # A wheel may lie in an environment within somebody's repository, whose commit says nothing of the engine.
    if _git(_ENGINE, "ls-files", "--error-unmatch", "version.py") and (commit := _commit(_ENGINE)):
        found["engine_git_commit"] = commit
    if commit := _commit(Path.cwd()):
        found["git_commit"] = commit
    return found


def _commit(folder: Path) -> str | None:
    commit = _git(folder, "rev-parse", "--verify", "HEAD")
    if not commit:
        return None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return commit if changed == "" else f"{commit} (changed)"


def _git(folder: Path, *arguments: str) -> str | None:
    """What git says, None where it fails."""
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_GIT_SECONDS, check=True, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
