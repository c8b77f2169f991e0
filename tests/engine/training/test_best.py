"""The best checkpoint of a run: spared, recorded once it is on disk, known to a resumed run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from mirl.engine.checkpoints.best import Best, Standing, read_best
from mirl.engine.checkpoints.finding import verify
from mirl.engine.checkpoints.kinds import given
from mirl.engine.distributed.ds_engine import Fragment
from mirl.engine.distributed.launch import Ranks
from mirl.engine.errors import NotSaved
from mirl.engine.training.run_folder import Progress
from mirl.engine.training.saving import Saver
from mirl.errors import UserError

RANKS = Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1, device=torch.device("cpu"))


class Run:
    """Steps of a run that evaluates at each, as the trainer makes them, without anything being trained."""

    def __init__(self, out: Path, *, step: int = 0, keep: int = 1) -> None:
        self.progress, self.said = Progress(step=step), []
        module = nn.Linear(2, 2)
        log: Any = SimpleNamespace(say=self.said.append, event=lambda *arguments, **details: None)
        engine: Any = SimpleNamespace(module=module, stage=2, fragments=self._fragments)
        loader: Any = SimpleNamespace(steps_per_epoch=2, state_dict=dict, plan=SimpleNamespace(micro_batch=1))
        config: Any = SimpleNamespace(run=SimpleNamespace(keep_checkpoints=keep), to_dict=lambda: {"model": {}})
        self.saver = Saver(
            config, ranks=RANKS, engine=engine, task=SimpleNamespace(fragments=tuple), loader=loader, log=log,
            progress=self.progress, folder=out / "checkpoints",
        )  # fmt: skip

    def _fragments(self) -> list[Fragment]:
        value = float(self.progress.step)
        return [
            Fragment(name="weight", kind="weight", start=0, tensor=torch.full((4,), value)),
            Fragment(name="bias", kind="weight", start=0, tensor=torch.full((2,), value)),
        ]

    def steps(self, *top1: float, save: bool = True) -> Run:
        """One step for each accuracy."""
        for value in top1:
            self.progress.step += 1
            if save:
                self.saver.save()
            self.saver.keep_if_best(Standing(weights="ema", score_percent=value, images=10))
            self.saver.report()
        return self

    def finish(self) -> Run:
        self.saver.finish()
        return self


def steps_in(out: Path) -> list[int]:
    folders = sorted((out / "checkpoints").glob("step-*"))
    assert all(verify(folder) is None for folder in folders)
    return [int(folder.name.split("-")[1]) for folder in folders]


@pytest.mark.parametrize("save", [True, False], ids=["every step is saved", "the best alone"])
def test_the_best_outlives_the_newer_ones(save, tmp_path):
    Run(tmp_path).steps(30, 50, 40, 50, 45, save=save).finish()
    assert steps_in(tmp_path) == ([2, 5] if save else [2])
    best = read_best(tmp_path / "checkpoints")
    assert best == Best(weights="ema", score_percent=50, images=10, step=2, epoch=1.0)
    found = given(tmp_path)
    assert found.checkpoint.name == "step-00000002" and found.weights == "ema" and "epoch 1 (step 2)" in str(found)
    assert given(tmp_path, "last").checkpoint.name == ("step-00000005" if save else "step-00000002")


def test_the_start_is_the_best_until_a_step_is_better(tmp_path):
    def begin(out: Path) -> Run:
        run = Run(out)
        run.saver.keep_if_best(Standing(weights="last", score_percent=45, images=10))
        return run

    begin(tmp_path / "worse").steps(30, 44).finish()
    assert read_best(tmp_path / "worse" / "checkpoints").step == 0 and steps_in(tmp_path / "worse") == [0, 2]
    assert Run(tmp_path / "worse", step=2).said[0].startswith("best so far: epoch 0 (step 0), top-1 45.00%")
    begin(tmp_path / "better").steps(30, 45, 45).finish()
    assert read_best(tmp_path / "better" / "checkpoints").step == 2 and steps_in(tmp_path / "better") == [2, 3]


def test_a_resumed_run_keeps_the_best_so_far(tmp_path):
    Run(tmp_path).steps(30, 50, 40).finish()
    resumed = Run(tmp_path, step=3).steps(45, 49).finish()
    assert "best so far: epoch 1 (step 2), top-1 50.00% of 10 images" in resumed.said[0]
    assert steps_in(tmp_path) == [2, 5] and read_best(tmp_path / "checkpoints").step == 2
    Run(tmp_path, step=5).steps(51, 20).finish()
    assert steps_in(tmp_path) == [6, 7] and read_best(tmp_path / "checkpoints").step == 6


def test_going_back_before_the_best_seeks_it_afresh(tmp_path):
    Run(tmp_path, keep=0).steps(30, 20, 50).finish()
    again = Run(tmp_path, step=2, keep=0)
    assert "it is sought afresh" in again.said[0] and read_best(tmp_path / "checkpoints") is None
    again.steps(10, 12).finish()
    assert read_best(tmp_path / "checkpoints").step == 4


def test_one_that_could_not_be_written_is_no_best(tmp_path, monkeypatch):
    run = Run(tmp_path).steps(30).finish()

    def fail(*arguments: object) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("mirl.engine.checkpoints.writer.save_tensors", fail)
        run.steps(60)
        run.saver.wait()
        run.saver.report()
    assert any("the checkpoint of step 2 was not written" in line for line in run.said)
    assert steps_in(tmp_path) == [1] and read_best(tmp_path / "checkpoints").step == 1
    run.steps(40).finish()  # worse than the lost one, better than the one that is there
    assert read_best(tmp_path / "checkpoints").step == 3 and steps_in(tmp_path) == [3]


@pytest.mark.parametrize("told", [False, True], ids=["at the end", "before the end"])
def test_a_last_checkpoint_that_is_lost_is_no_success_whenever_it_is_told(told, tmp_path, monkeypatch):
    def fail(*arguments: object) -> None:
        raise OSError("No space left on device")

    run = Run(tmp_path).steps(30).finish()
    with monkeypatch.context() as patch:
        patch.setattr("mirl.engine.checkpoints.writer.save_tensors", fail)
        run.progress.step += 1
        run.saver.save()
        run.saver.wait()
        if told:
            run.saver.report()
    with pytest.raises(NotSaved, match="the checkpoint of step 2 was not written"):
        run.finish()
    run.steps(10).finish()  # a later one is written


def test_a_record_that_cannot_be_written_costs_no_training(tmp_path, monkeypatch):
    def fail(*arguments: object) -> None:
        raise OSError("No space left on device")

    run = Run(tmp_path, keep=0).steps(30).finish()
    with monkeypatch.context() as patch:
        patch.setattr("mirl.engine.training.saving.write_best", fail)
        run.steps(60).finish()
    assert any("step 2 could not be recorded as the best: No space left" in line for line in run.said)
    assert read_best(tmp_path / "checkpoints").step == 1 and steps_in(tmp_path) == [1, 2]


def test_a_damaged_best_is_named_and_never_replaced(tmp_path):
    Run(tmp_path).steps(30, 50, 40).finish()
    (next((tmp_path / "checkpoints" / "step-00000002").glob("rank*"))).write_bytes(b"")
    with pytest.raises(UserError, match="the best checkpoint of .*step-00000002, is damaged: .* give --which last"):
        given(tmp_path)
    assert given(tmp_path, "last").checkpoint.name == "step-00000003"
    (tmp_path / "checkpoints" / "best.json").write_text("{")
    assert given(tmp_path).checkpoint.name == "step-00000003"
    with pytest.raises(UserError, match="which is 'best' and .* has no best checkpoint: give last"):
        given(tmp_path, "best")
