"""Weights & Biases. Its own variables (WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE, WANDB_API_KEY) say where to."""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
from pathlib import Path
from typing import Any

import psutil
from PIL import Image

from mirl.engine.training.tracking.facts import Facts, versions
from mirl.engine.training.tracking.tracker import FINISHED

PROJECT = "mirl"
_STEP = "step"
_TEAR_DOWN_SECONDS = 5.0


class WandbRun:
    """One run there. Its history is by our step, so that steps which a resumed run makes again are taken too."""

    name = "wandb"

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._run: Any = None

    def start(self) -> str:
        import wandb

        facts = self._facts
        key = facts.recall(self.name).get("id")
        if key is None:
            key = secrets.token_hex(4)
            facts.note(self.name, {"id": key})
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=facts.name,
            id=key,
            resume="allow",
            dir=str(facts.out),
            # Silent also means that it never asks for a key on the terminal. Our streams stay our own.
            settings=wandb.Settings(silent=True, console="off"),
        )
        self._run = run
        run.config.update({**facts.config, **versions()}, allow_val_change=True)
        run.define_metric(_STEP, hidden=True)
        run.define_metric("*", step_metric=_STEP)
        # Asked for where there is none, it warns on the terminal.
        return f"offline, wandb sync {run.settings.sync_dir}" if run.offline else str(run.url)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self._run.log({**values, _STEP: step})

    def picture(self, name: str, image: Image.Image, step: int) -> None:
        import wandb

        self._run.log({name: wandb.Image(image), _STEP: step})

    def checkpoint(self, path: Path) -> None:
        import wandb

        if not path.exists():  # taken away since, in favour of newer ones: wandb refuses it
            return
        artifact = wandb.Artifact(f"checkpoint-{self._run.id}", type="model")
        # Without a checksum: that would read the whole checkpoint again.
        artifact.add_reference(path.resolve().as_uri(), name=path.name, checksum=False)
        self._run.log_artifact(artifact, aliases=["latest", path.name])

    def best(self, values: dict[str, float | str]) -> None:
        self._run.summary.update({f"best.{name}": value for name, value in values.items()})

    def finish(self, end: str) -> None:
        self._run.finish(exit_code=0 if end == FINISHED else 1)

    def abandon(self) -> None:
        # When Python leaves, wandb waits for its process, which waits for the server. What it has is on disk.
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                if "wandb-core" in " ".join(child.cmdline()[:1]):
                    child.kill()
        # Then this takes its hook away. It may want what the thread that hangs holds.
        closing = threading.Thread(target=_tear_down, daemon=True)
        closing.start()
        closing.join(_TEAR_DOWN_SECONDS)


def _tear_down() -> None:
    with contextlib.suppress(BaseException):  # the process it speaks to is gone
        import wandb

        wandb.teardown(exit_code=1)
