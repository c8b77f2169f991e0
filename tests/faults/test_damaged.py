"""Checkpoints damaged after they were written, and ranks that come and go between them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mirl.engine.checkpoints.reader import find_newest_good
from mirl.engine.errors import EXIT_USER_ERROR
from tests.support.files import flip_bit
from tests.support.runs import losses

SHARD = "rank-00001-of-00002.safetensors"


@pytest.fixture(scope="module")
def whole(_server, photographs, tmp_path_factory) -> Path:
    """The folder in which a run of 2 ranks made 7 steps, an epoch and two, with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("whole")
    run = _server.start(folder, "--data", photographs, *FLAGS)
    assert run.end() == [0, 0], run.output()[-3000:]
    return folder


FLAGS = ["--steps", "7", "--checkpoint-every", "1", "--keep-checkpoints", "0", "--out", "out"]


def copy_of(whole: Path, folder: Path, *, newest: int) -> Path:
    """The run of ``whole`` in ``folder`` as if it had been killed after step ``newest``; its checkpoints."""
    shutil.copytree(whole / "out", folder / "out")
    cut(folder / "out" / "checkpoints", newest)
    return folder / "out" / "checkpoints"


def cut(checkpoints: Path, newest: int) -> None:
    for path in checkpoints.glob("step-*"):
        if int(path.name.split("-")[1]) > newest:
            shutil.rmtree(path)
    (checkpoints / "latest").write_text(f"step-{newest:08d}\n")


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_damaged_shards_and_a_dangling_pointer_are_passed_over(server, whole, photographs, tmp_path):
    checkpoints = copy_of(whole, tmp_path, newest=5)
    flip_bit(checkpoints / "step-00000005" / SHARD)
    truncate(checkpoints / "step-00000004" / SHARD)
    (checkpoints / "step-00000003" / SHARD).unlink()
    (checkpoints / "latest").write_text("step-00000099\n")
    kept = contents(checkpoints / "step-00000002")
    run = server.start(tmp_path, "--data", photographs, *FLAGS, "--resume", "auto")
    assert run.end() == [0, 0], run.output()[-3000:]
    text = run.output()
    assert "latest names 'step-00000099', the newest checkpoint is step-00000005" in text
    assert f"step-00000005 is passed over: {SHARD} was changed after it was written" in text
    assert f"step-00000004 is passed over: {SHARD} has " in text
    assert f"step-00000003 is passed over: {SHARD} is missing" in text
    assert "resumed from out/checkpoints/step-00000002" in text
    assert losses(tmp_path / "out") == losses(whole / "out")
    assert contents(checkpoints / "step-00000002") == kept
    found, remarks = find_newest_good(checkpoints)
    assert (found.name, remarks) == ("step-00000007", [])


def test_an_empty_pointer_is_told_and_a_named_damaged_checkpoint_is_refused(server, whole, photographs, tmp_path):
    checkpoints = copy_of(whole, tmp_path, newest=5)
    (checkpoints / "latest").write_text("")
    damaged = checkpoints / "step-00000004"
    flip_bit(damaged / SHARD)
    before = contents(tmp_path / "out")
    named = server.start(tmp_path, "--data", photographs, *FLAGS, "--resume", damaged)
    # Rank 1 may see rank 0 leave first.
    assert named.end()[0] == EXIT_USER_ERROR
    assert f"error: checkpoint {damaged} is damaged: {SHARD} was changed" in named.output()
    assert "Traceback" not in named.output() + named.output(1)
    assert contents(tmp_path / "out") == before
    auto = server.start(tmp_path, "--data", photographs, *FLAGS, "--resume", "auto")
    assert auto.end() == [0, 0], auto.output()[-3000:]
    assert "latest is missing or empty, the newest checkpoint is step-00000005" in auto.output()
    assert losses(tmp_path / "out") == losses(whole / "out")


def test_when_no_checkpoint_is_whole_nothing_is_trained_over_it(server, whole, photographs, tmp_path):
    checkpoints = copy_of(whole, tmp_path, newest=1)
    truncate(checkpoints / "step-00000001" / SHARD)
    before = contents(tmp_path / "out")
    run = server.start(tmp_path, "--data", photographs, *FLAGS, "--resume", "auto")
    assert run.end()[0] == EXIT_USER_ERROR
    assert "error: no checkpoint in out/checkpoints is whole" in run.output()
    assert contents(tmp_path / "out") == before


def test_two_ranks_then_one_then_two_is_the_run_of_two(server, whole, photographs, tmp_path):
    checkpoints = copy_of(whole, tmp_path, newest=2)
    one = server.start(tmp_path, "--data", photographs, *FLAGS, "--resume", "auto", "--micro-batch", "4", ranks=1)
    assert one.end() == [0], one.output()[-3000:]
    assert "resumed from out/checkpoints/step-00000002" in one.output()
    assert "effective batch 8 = 4 x 2 accumulation x 1 ranks" in one.output()
    cut(checkpoints, 4)
    assert (checkpoints / "step-00000004" / "rank-00000-of-00001.safetensors").exists()
    two = server.start(tmp_path, "--data", photographs, *FLAGS, "--resume", "auto")
    assert two.end() == [0, 0], two.output()[-3000:]
    assert "resumed from out/checkpoints/step-00000004" in two.output()
    # The same images and masks; the gradient of one rank is summed in another order, in fp32.
    assert losses(tmp_path / "out") == pytest.approx(losses(whole / "out"), rel=1e-5)
