"""MLflow. Its own variables (MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, MLFLOW_TRACKING_TOKEN) say where to."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from PIL import Image

from mirl.engine.training.tracking.facts import Facts, versions
from mirl.engine.training.tracking.tracker import FAILED, FINISHED, STOPPED

EXPERIMENT = "mirl"
_STATUS = {FINISHED: "FINISHED", STOPPED: "KILLED", FAILED: "FAILED"}
_AT_ONCE = 100  # parameters that a server takes in one request
_OF_A_START = frozenset({"run.resume", "run.change", "run.init_from"})
_LONGEST = 6000  # characters of a parameter
# Its own are two minutes and seven tries with pauses, longer than a run should wait at its end; `Sender` tries again.
_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    # It would call its makers, and wait for that at the exit of the process.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


class MlflowRun:
    """One run there. Settings are its parameters, which never change; those of a later start that differ are tags."""

    name = "mlflow"

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._client: Any = None
        self._run = ""

    def start(self) -> str:
        for variable, value in _DEFAULTS.items():
            os.environ.setdefault(variable, value)
        from mlflow import MlflowClient, get_tracking_uri

        facts, server = self._facts, get_tracking_uri()
        self._client = client = MlflowClient(server)
        noted = facts.recall(self.name)
        known = self._known(noted["run"]) if noted.get("server") == server and "run" in noted else None
        if known is None:
            created = client.create_run(self._experiment(), run_name=facts.name)
            self._run, params = created.info.run_id, {}
            facts.note(self.name, {"server": server, "run": self._run})
        else:
            self._run, params = known.info.run_id, known.data.params
            client.update_run(self._run, status="RUNNING")
        self._describe(params)
        return f"{server}, run {self._run}"

    def _known(self, run: str) -> Any:
        """The run of an earlier start; None where it was deleted there."""
        from mlflow.exceptions import MlflowException

        try:
            found = self._client.get_run(run)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return None if found.info.lifecycle_stage == "deleted" else found

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
        if number := os.environ.get("MLFLOW_EXPERIMENT_ID"):
            return number
        found = self._client.get_experiment_by_name(name)
        return found.experiment_id if found is not None else self._client.create_experiment(name)

    def _describe(self, before: dict[str, str]) -> None:
        from mlflow.entities import Param, RunTag

        settings = {name: str(value)[:_LONGEST] for name, value in _flat(self._facts.config).items()}
        fresh = [Param(name, value) for name, value in settings.items() if name not in before]
        for first in range(0, len(fresh), _AT_ONCE):
            self._client.log_batch(self._run, params=fresh[first : first + _AT_ONCE])
        tags = versions()
        if "engine_git_commit" in tags:
            tags["mlflow.source.git.commit"] = tags["engine_git_commit"].split()[0]
        tags |= {
            f"from step {self._facts.start_step}: {name}": value
            for name, value in settings.items()
            if before.get(name, value) != value and name not in _OF_A_START
        }
        self._client.log_batch(self._run, tags=[RunTag(name, value) for name, value in tags.items()])

    def metrics(self, step: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self._client.log_batch(self._run, metrics=[Metric(name, value, now, step) for name, value in values.items()])

    def picture(self, name: str, image: Image.Image, step: int) -> None:
        self._client.log_image(self._run, image, key=name, step=step, synchronous=True)

    def checkpoint(self, path: Path) -> None:
        self._client.set_tag(self._run, "checkpoint.latest", str(path.resolve()))

    def best(self, values: dict[str, float | str]) -> None:
        for name, value in values.items():
            self._client.set_tag(self._run, f"best.{name}", str(value))

    def finish(self, end: str) -> None:
        self._client.set_terminated(self._run, status=_STATUS[end])

    def abandon(self) -> None:
        """Nothing: it has no process, and its requests end with the thread."""


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found
