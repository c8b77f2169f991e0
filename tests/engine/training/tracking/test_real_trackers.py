"""A whole run with both trackers: W&B offline, and a server of MLflow on the loopback, which is then killed."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

import mirl
from mirl.engine.configuration.config import PretrainConfig
from mirl.engine.training.run_log import RunLog
from mirl.engine.training.tracking.facts import Facts
from mirl.engine.training.tracking.opening import open_trackers
from tests.support.runs import losses

SMALL = {
    "warmup_steps": 1, "batch_size": 4, "precision": "fp32", "image_size": 32, "depth": 4, "width": 32, "heads": 2,
    "decoder_width": 32, "decoder_heads": 2, "pictures": 1, "tensorboard": False, "loader_threads": 1,
    "watchdog_minutes": 0.0, "log_every": 1, "checkpoint_every": 2, "cpu_threads": 1,
}  # fmt: skip
START_S = 60.0


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of W&B outside of the test's folder, and nothing over the network."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "wandb" / name))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


@pytest.fixture
def mlflow_server(places: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen]:
    """A server that begins to start, in a process of its own; the client's variables point to it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    quick = {"MLFLOW_ALLOW_FILE_STORE": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"file://{tmp_path / 'store'}", "--artifacts-destination", str(tmp_path / "art")]
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, start_new_session=True, cwd=tmp_path,
            env=os.environ | quick | {"MLFLOW_DISABLE_TELEMETRY": "true"},
        )  # fmt: skip
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    try:
        yield process
    finally:
        _kill(process)


def _wait_for(process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while True:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
        try:
            with urllib.request.urlopen(os.environ["MLFLOW_TRACKING_URI"] + "/health", timeout=1):
                return
        except OSError:
            time.sleep(0.1)


def _kill(process: subprocess.Popen) -> None:
    """The server and its worker, which are a session."""
    try:
        os.killpg(process.pid, 9)
    except ProcessLookupError:
        return
    process.wait()


def wandb_records(file: Path) -> list:
    """The records of a run's file: a log of LevelDB (blocks of 32 KiB, fragments with a header of 7 bytes)."""
    from wandb.proto import wandb_internal_pb2

    data, place, parts, found = file.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        room = 32768 - place % 32768
        if room < 7:
            place += room
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last fragment
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            found.append(record)
            parts = b""
    return found


def _log(out: Path, config: PretrainConfig, names: list[str], start_step: int) -> RunLog:
    """The log of a start of the run in ``out``, as `run_training` opens it."""
    log = RunLog(out, is_main=True)
    facts = Facts(out=out, config=config.to_dict(), start_step=start_step)
    log.open(total_steps=9, start_step=start_step, tensorboard=False, trackers=open_trackers(names, facts))
    return log


def test_a_run_is_tracked_resumed_and_outlives_the_server(mlflow_server, photographs, tmp_path):
    config = mirl.recipe("tiny", data=str(photographs), out=str(tmp_path / "mine"), steps=2, track=("wandb",), **SMALL)
    out = mirl.pretrain(config)
    _wait_for(mlflow_server, tmp_path / "server.log")
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()

    # A second start, with both.
    log = _log(out, config, ["wandb", "mlflow"], 2)
    log.metrics({"step": 3, "loss": 0.5}, None)
    log.picture(Image.new("RGB", (8, 8)), 3)
    log.event("checkpoint", 4, path=str(out / "checkpoints" / "step-00000003"))  # taken away since
    shutil.copytree(out / "checkpoints" / "step-00000002", out / "checkpoints" / "step-00000004")
    log.event("checkpoint", 4, path=str(out / "checkpoints" / "step-00000004"))
    log.close()

    # W&B: two files of one run.
    files = sorted((out / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    first, second = map(wandb_records, files)
    both = [*first, *second]
    assert {record.run.run_id for record in both if record.HasField("run")} == {files[0].stem[4:]}
    rows = [{_key(item): item.value_json for item in record.history.item} for record in both]
    assert {int(row["step"]): float(row["loss"]) for row in rows if "loss" in row} == losses(out)
    assert list(losses(out)) == [1, 2, 3]
    settings = {item.key: item.value_json for record in first for item in record.config.update}
    assert head in settings["engine_git_commit"] and '"depth":4' in settings["model"].replace(" ", "")
    entries = [entry for record in both if record.HasField("artifact") for entry in record.artifact.manifest.contents]
    assert {entry.path.split("/")[0] for entry in entries} == {"step-00000002", "step-00000004"}
    assert all(entry.ref.startswith(f"file://{out}/checkpoints/step-") for entry in entries)
    assert [row["step"] for row in rows if "reconstructions.path" in row] == ["2", "3"]

    # A third start: MLflow has one run, with everything of both.
    longer = dataclasses.replace(
        config, optim=dataclasses.replace(config.optim, steps=9), run=dataclasses.replace(config.run, resume="auto")
    )
    from mlflow import MlflowClient

    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    before = client.search_runs([client.get_experiment_by_name("mirl").experiment_id])
    assert [run.info.status for run in before] == ["FINISHED"]
    log = _log(out, longer, ["mlflow"], 3)
    log.metrics({"step": 5, "loss": 0.25}, None)
    deadline = time.monotonic() + 30
    while (found := client.get_run(before[0].info.run_id)).data.metrics["loss"] != 0.25:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert (found.info.run_name, found.info.status) == ("mine", "RUNNING")
    assert [item.step for item in client.get_metric_history(found.info.run_id, "loss")] == [3, 5]
    assert found.data.params["model.depth"] == "4" and found.data.params["optim.steps"] == "2"
    tags = found.data.tags
    assert tags["from step 3: optim.steps"] == "9" and "from step 3: run.resume" not in tags
    assert tags["checkpoint.latest"] == str(out / "checkpoints" / "step-00000004")
    assert tags["engine_git_commit"].split()[0] == tags["mlflow.source.git.commit"] == head
    assert {item.path.split("+")[2] for item in client.list_artifacts(found.info.run_id, "images")} == {"3"}

    # The server is killed in the middle of it: it goes on, and closes in time.
    _kill(mlflow_server)
    began = time.monotonic()
    for step in range(6, 10):
        log.metrics({"step": step, "loss": 0.5}, None)
        log.picture(Image.new("RGB", (8, 8)), step)
    assert time.monotonic() - began < 1
    log.close()
    told = (out / "log.txt").read_text()
    assert "tracker mlflow: fails (MlflowException: API request" in told
    # The answer to the one before may be lost as well.
    assert re.search("tracker mlflow: was given up: [89] records and the end of the run are missing there", told)


def _key(item) -> str:
    return item.key or ".".join(item.nested_key)
