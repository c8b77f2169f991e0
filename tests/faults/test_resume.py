"""A run is gone on with as it was, by one process group at a time, also on a file system that is not the local one."""

from __future__ import annotations

import json
import os
import signal

import pytest

from mirl.engine.checkpoints.reader import find_newest_good
from mirl.engine.errors import EXIT_PREEMPTED, EXIT_USER_ERROR
from tests.support.runs import equal_tensors, losses

FLAGS = ["--steps", "12", "--warmup-steps", "1", "--checkpoint-every", "2", "--keep-checkpoints", "0", "--out", "out"]


def files(folder) -> dict:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_forgotten_flags_are_refused_and_a_change_on_purpose_goes_on(server, photographs, tmp_path):
    given = ["--data", photographs, *FLAGS]
    first = server.start(tmp_path, *given, "--lr", "1e-4", "--mask-ratio", "0.5", "--no-flip", "--steps", "4")
    assert first.end() == [0, 0], first.output()[-3000:]
    before = files(tmp_path / "out")
    forgotten = server.start(tmp_path, *given, "--resume", "auto")
    assert forgotten.end() == [EXIT_USER_ERROR] * 2
    (line,) = [line for line in forgotten.output().splitlines() if line.startswith("error: ")]
    assert "mask_ratio is 0.75 and out/checkpoints/step-00000004 was trained with 0.5" in line
    assert "flip is True, it was False" in line and "it was 0.0001" in line
    assert "give --mask-ratio 0.5 --no-flip --lr 0.0001 as before" in line
    assert "--change mask_ratio flip lr" in line
    assert files(tmp_path / "out") == before
    meant = server.start(tmp_path, *given, "--resume", "auto", "--change", "mask_ratio", "flip", "lr")
    assert meant.end() == [0, 0], meant.output()[-3000:]
    assert "goes on with other settings than step-00000004 was trained with: mask_ratio 0.5 -> 0.75" in meant.output()
    assert set(losses(tmp_path / "out")) == set(range(1, 13))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model"]["mask_ratio"] == 0.75
    (old,) = map(json.loads, (tmp_path / "out" / "config-history.jsonl").read_text().splitlines())
    assert old["step"] == 4 and old["config"]["model"]["mask_ratio"] == 0.5


def test_a_second_start_is_refused_and_the_run_that_was_killed_is_taken_over(server, photographs, tmp_path):
    given = ["--data", photographs, *FLAGS, "--steps", "5000", "--checkpoint-every", "50", "--resume", "auto"]
    first = server.start(tmp_path, *given)
    first.wait_for("step   60/")
    second = server.start(tmp_path, *given)
    assert second.end() == [EXIT_USER_ERROR] * 2, second.output()[-3000:]
    held = json.loads((tmp_path / "out" / "run.lock").read_text())
    assert f"where process {held['process']} on {os.uname().nodename}, started" in second.output()
    assert (tmp_path / "out" / "log.txt").read_text().count("FRESH START") == 1
    os.kill(held["process"], signal.SIGKILL)
    first.end()
    assert (tmp_path / "out" / "run.lock").exists()
    found, _ = find_newest_good(tmp_path / "out" / "checkpoints")
    length = str(int(found.name.split("-")[1]) + 2)
    third = server.start(tmp_path, *given, "--steps", length, "--change", "steps")
    assert third.end() == [0, 0], third.output()[-3000:]
    assert f"took over out from process {held['process']} on " in third.output()
    assert f"resumed from {found.relative_to(tmp_path)}" in third.output()
    assert not (tmp_path / "out" / "run.lock").exists()


@pytest.mark.parametrize("call", ["chmod", "fsync"])
def test_a_mount_without_chmod_or_folder_sync_keeps_every_checkpoint(call, server, photographs, tmp_path):
    inject = {"0": ["refuse", call], "1": ["refuse", call]}
    run = server.start(tmp_path, "--data", photographs, *FLAGS, "--steps", "4", inject=inject)
    assert run.end() == [0, 0], run.output()[-3000:]
    assert "warning" not in run.output()
    assert [path.name for path in sorted((tmp_path / "out" / "checkpoints").glob("step-*"))] == [
        "step-00000002",
        "step-00000004",
    ]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_share_that_is_gone_ends_in_a_saved_state_that_is_queued_again(ranks, server, photographs, tmp_path):
    given = ["--data", photographs, *FLAGS, "--checkpoint-every", "100"]
    whole = server.start(tmp_path, *given, "--out", "whole", ranks=ranks)
    assert whole.end() == [0] * ranks, whole.output()[-3000:]
    cut = server.start(tmp_path, *given, ranks=ranks, inject={str(ranks - 1): ["lose_share"]})
    assert cut.end() == [EXIT_PREEMPTED] * ranks, cut.output()[-3000:]
    assert "stopped: " in cut.output() and "the file system of the data does not answer" in cut.output()
    assert "broken image" not in cut.output()
    found, _ = find_newest_good(tmp_path / "out" / "checkpoints")
    assert found is not None and 0 < int(found.name.split("-")[1]) < 12
    again = server.start(tmp_path, *given, "--resume", "auto", ranks=ranks)
    assert again.end() == [0] * ranks, again.output()[-3000:]
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")
    last = "checkpoints/step-00000012"
    assert equal_tensors(tmp_path / "out" / last, tmp_path / "whole" / last)
