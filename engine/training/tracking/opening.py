"""All trackers of one run behind one face, for `RunLog`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from mirl.engine.training.tracking.facts import Facts
from mirl.engine.training.tracking.mlflow_run import MlflowRun
from mirl.engine.training.tracking.sending import Call, Sender, wait_for_all
from mirl.engine.training.tracking.tracker import Tracker
from mirl.engine.training.tracking.wandb_run import WandbRun

CLOSE_SECONDS = 30.0
KINDS: Mapping[str, Callable[[Facts], Tracker]] = {"wandb": WandbRun, "mlflow": MlflowRun}


class Trackers:
    """Sends what a run records to each of its trackers. Nothing raises, and nothing but `close` waits."""

    def __init__(self, trackers: Iterable[Tracker]) -> None:
        self._senders = [Sender(tracker) for tracker in trackers]

    def metrics(self, values: Mapping[str, Any]) -> None:
        """Record the finite numbers of ``values``, which hold "step"."""
        step = int(values["step"])
        numbers = {
            name: float(value)
            for name, value in values.items()
            if name != "step" and isinstance(value, int | float) and math.isfinite(value)
        }
        if numbers:
            self._send(lambda tracker: tracker.metrics(step, numbers))

    def picture(self, image: Image.Image, step: int, name: str) -> None:
        """Record ``image``."""
        self._send(lambda tracker: tracker.picture(name, image, step), picture=True)

    def event(self, kind: str, step: int, details: Mapping[str, Any]) -> None:
        """Record an event of the log, if it tells of a checkpoint or of the best one."""
        if kind == "checkpoint":
            path = Path(details["path"])
            self._send(lambda tracker: tracker.checkpoint(path))
        elif kind == "best":
            values = {"step": step, **details}
            self._send(lambda tracker: tracker.best(values))

    def _send(self, call: Call, *, picture: bool = False) -> None:
        for sender in self._senders:
            sender.send(call, picture=picture)

    def told(self) -> Iterator[str]:
        """The lines for the log since the last call."""
        for sender in self._senders:
            while sender.told:
                yield sender.told.popleft()

    def close(self, end: str, seconds: float = CLOSE_SECONDS) -> None:
        """Send what waits, at most for ``seconds``; ``end``: how the run ended, see `tracker`."""
        for sender in self._senders:
            sender.close(end)
        wait_for_all(self._senders, seconds)


def open_trackers(names: Iterable[str], facts: Facts) -> Trackers:
    """The trackers called ``names``, each starting in its thread."""
    return Trackers([KINDS[name](facts) for name in names])
