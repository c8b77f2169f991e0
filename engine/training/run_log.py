"""What a run tells: lines, a progress bar in a terminal, metrics.jsonl, TensorBoard and other trackers."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from mirl.engine.accounting.devices import device_reported
from mirl.engine.accounting.free_memory import peak_host_memory
from mirl.engine.errors import Preempted
from mirl.engine.training.tracking.opening import Trackers
from mirl.engine.training.tracking.tracker import FAILED, FINISHED, STOPPED


def peak_flops(device: torch.device) -> float | None:
    """Peak bf16 FLOP/s of ``device``, None where it is not in the table."""
    if device.type != "cuda":
        return None
    found = device_reported(torch.cuda.get_device_name(device))
    return None if found is None else found.peak_flops


def memory_gib(device: torch.device) -> float:
    """Peak memory: torch's on a GPU since the last call, of the process on a CPU."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / 2**30
    return peak_host_memory() / 2**30


def to_json(values: Any) -> str:
    """Write ``values`` as JSON of one line. A number that is not finite, which JSON does not have, becomes null."""
    return json.dumps(_finite(values), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, list | tuple) else value


class RunLog:
    """Rank 0 writes, the other ranks are silent.

    ``out`` holds log.txt (the lines), metrics.jsonl (a JSON object a line, full precision, null for what is not finite)
    and tensorboard/.
    """

    def __init__(self, out: Path, *, is_main: bool) -> None:
        self.out, self.is_main = out, is_main
        self._bar: tqdm | None = None
        self._board: Any = None
        self._trackers: Trackers | None = None
        self._lines: Any = None
        self._metrics: Any = None
        self._problems: set[str] = set()

    def open(self, *, total_steps: int, start_step: int, tensorboard: bool, trackers: Trackers | None = None) -> None:
        """Open the files, on rank 0; OSError where ``out`` cannot be written. ``trackers`` are closed with the log."""
        out = self.out
        self._trackers = trackers
        self._lines = (out / "log.txt").open("a", encoding="utf-8", errors="backslashreplace")
        self._metrics = _open_metrics(out / "metrics.jsonl", start_step)
        if sys.stderr is not None and sys.stderr.isatty():
            self._bar = tqdm(total=total_steps, initial=start_step, unit="step", dynamic_ncols=True, leave=False)
        if tensorboard:
            # Imported here: it takes a second, and a rank that does not write has no need of it.
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(out / "tensorboard"), purge_step=start_step + 1)

    def say(self, line: str) -> None:
        """One line to the terminal and to log.txt."""
        if not self.is_main:
            return
        self._show(line)
        self._append(self._lines, line)

    def advance(self, step: int) -> None:
        """Move the progress bar to ``step``."""
        if self._bar is not None:
            try:
                self._bar.update(step - self._bar.n)
            except (OSError, ValueError) as error:
                self._bar = None
                self._complain("the terminal", error)

    def metrics(self, values: dict[str, Any], line: str | None) -> None:
        """Record ``values`` (they hold "step") and say ``line``, if there is one."""
        if not self.is_main:
            return
        if line is not None:
            self.say(line)
        self._append(self._metrics, to_json(values))
        if self._board is not None:
            numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
            self._on_board(
                lambda board: [board.add_scalar(key, numbers[key], values["step"]) for key in numbers if key != "step"]
            )
        if self._trackers is not None:
            self._trackers.metrics(values)
            self._say_of_trackers()

    def event(self, kind: str, step: int, **details: Any) -> None:
        """An occurrence that is no measurement (a skipped step, a bad image, a checkpoint) in metrics.jsonl."""
        if self.is_main:
            self._append(self._metrics, to_json({"event": kind, "step": step, "time": time.time(), **details}))
            if self._trackers is not None:
                self._trackers.event(kind, step, details)

    def picture(self, image: Image.Image, step: int, *, name: str = "reconstructions") -> None:
        """Show ``image`` in TensorBoard and in the trackers."""
        if self._board is not None:
            self._on_board(lambda board: board.add_image(name, np.asarray(image), step, dataformats="HWC"))
        if self._trackers is not None:
            self._trackers.picture(image, step, name)

    def close_after(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close, where a block ended by an exception of class ``kind``, None for none; for `ExitStack.push`."""
        ended_early = kind is not None and issubclass(kind, Preempted)
        self.close(FINISHED if kind is None else STOPPED if ended_early else FAILED)

    def close(self, end: str = FINISHED) -> None:
        """Close the files and the trackers, which may take some seconds; ``end``: how the run ended."""
        if not self.is_main:
            return
        if self._trackers is not None:
            self._trackers.close(end)
            self._say_of_trackers()
        if self._bar is not None:
            self._bar.close()
        if self._board is not None:
            self._on_board(lambda board: board.close())
        for stream in (self._metrics, self._lines):
            if stream is None:
                continue
            try:
                stream.close()
            except OSError as error:
                self._complain(stream.name, error)

    def _say_of_trackers(self) -> None:
        for line in self._trackers.told() if self._trackers is not None else ():
            self.say(line)

    # A full disk, a lost share or a closed terminal costs lines of the log, never the training.

    def _show(self, line: str) -> None:
        try:
            if self._bar is None:
                print(line, flush=True)
            else:
                tqdm.write(line)
        except (OSError, ValueError) as error:
            self._complain("the terminal", error)

    def _append(self, stream: Any, line: str) -> None:
        try:
            stream.write(line + "\n")
            stream.flush()
        except OSError as error:
            self._complain(stream.name, error)

    def _on_board(self, write: Callable[[Any], Any]) -> None:
        try:
            write(self._board)
        except OSError as error:
            self._board = None
            self._complain("TensorBoard", error)

    def _complain(self, what: str, error: Exception) -> None:
        """Say once what is no longer written, wherever that can still be said."""
        if what not in self._problems:
            self._problems.add(what)
            line = f"warning: lines are missing from {what}: {error}; training goes on"
            self._show(line)
            if what != self._lines.name:
                self._append(self._lines, line)


def _open_metrics(path: Path, start_step: int) -> Any:
    """metrics.jsonl without the lines of steps that the resumed run will do again."""
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if _step_of(line) <= start_step]
        aside = path.with_suffix(".tmp")
        aside.write_text("".join(line + "\n" for line in kept))
        aside.replace(path)
    return path.open("a")


def _step_of(line: str) -> float:
    """The step of a line; a line cut short by a crash counts as later than any."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")
