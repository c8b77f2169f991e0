"""What a tracker does. `Sender` calls it, in one thread; any exception of it means that it could not do it now."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from PIL import Image

FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"
"""How a run ends: at its last step, early with its state saved, or by an error."""


class Tracker(Protocol):
    """Each call may take long and raise anything; one that raised may be made again with the same arguments."""

    name: str

    def start(self) -> str:
        """Open the run, the one of an earlier start where there was one; returns where it is to be seen."""
        ...

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Record finite ``values`` of ``step``."""
        ...

    def picture(self, name: str, image: Image.Image, step: int) -> None:
        """Record ``image``."""
        ...

    def checkpoint(self, path: Path) -> None:
        """Record that ``path`` is the newest checkpoint; its files stay there."""
        ...

    def best(self, values: dict[str, float | str]) -> None:
        """Record what is known of the best checkpoint so far."""
        ...

    def finish(self, end: str) -> None:
        """Close the run; ``end``: `FINISHED`, `STOPPED` or `FAILED`. Returns when everything is where it belongs."""
        ...

    def abandon(self) -> None:
        """Let nothing of the tracker keep the process from leaving; called from another thread, at any time."""
        ...
