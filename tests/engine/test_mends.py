"""What a run tells to type next is typed here as it is told, with the words in capitals filled in."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from mirl.engine.cli import dispatch
from mirl.errors import UserError
from tests.engine.conftest import write_classes
from tests.support.runs import TINY

MIRL = [sys.executable, "-m", "mirl.engine.cli"]
SHORT = ["--steps", "2", "--warmup-steps", "1", "--batch-size", "4", "--no-tensorboard", "--loader-threads", "1"]


def told(output: str, command: str) -> list[str]:
    """The words behind `mirl` of a command that was told in ``output``."""
    return shlex.split(re.search(rf"\bmirl ({command} .*?)(?:  .*|\).*)?$", output, re.M)[1])


def filled(words: list[str], **places: Path) -> list[str]:
    """``words`` with TRAIN, VAL ... replaced, and without the dots of a list."""
    return [str(places.get(word, word)) for word in words if word != "..."]


def test_the_commands_that_runs_tell_run_as_they_are_told(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train = write_classes(tmp_path / "train", {"blue": 12, "red": 12})
    val = write_classes(tmp_path / "val", {"blue": 3, "red": 3})
    places = {"TRAIN": train, "VAL": val, "IMAGE": next(val.glob("*/*.png")), "DIR": tmp_path / "exported"}
    out = tmp_path / "runs of it's" / "pre"
    done = run(*MIRL, "pretrain", "--data", train, *TINY, *SHORT, "--out", out)
    assert done.returncode == 0, done.stderr[-2000:]
    said = done.stdout
    assert dispatch(filled(told(said, "visualize"), **places)) == 0
    assert dispatch(filled(told(said, "probe"), **places)) == 0
    finetuning = told(said, "finetune")
    # A run that is no classifier yet: the refusal tells the same command.
    capsys.readouterr()
    with pytest.raises(UserError) as refused:
        dispatch(["predict", str(out), str(places["IMAGE"])])
    assert told(str(refused.value), "finetune") == finetuning
    tuned = tmp_path / "runs of it's" / "tuned"
    done = run(*MIRL, *filled(finetuning, **places), *SHORT, "--precision", "fp32", "--out", tuned)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for command in ("evaluate", "predict", "export"):
        assert dispatch(filled(told(done.stdout, command), **places)) == 0, command
    assert list((tmp_path / "exported").glob("*.safetensors"))
    # What exists is not written over, unless it is said.
    table = ["predict", str(tuned), str(val), "--out", "classes.csv"]
    assert dispatch(table) == 0
    for words in (filled(told(said, "visualize"), **places), table):
        with pytest.raises(UserError) as refused:
            dispatch(words)
        assert dispatch([*words, re.search(r"--overwrite", str(refused.value))[0]]) == 0


@pytest.mark.parametrize("which", ["best", None])
def test_a_run_without_its_best_checkpoint_is_read_by_the_flag_that_is_named(which, checkpoint, tmp_path):
    from mirl.engine.checkpoints.best import Best, write_best
    from mirl.engine.checkpoints.kinds import given
    from tests.engine.models.helpers import tiny_config

    folder = checkpoint(tiny_config()).parent
    if which is None:
        write_best(folder, Best(step=9, epoch=1.0, weights="last", top1_percent=50.0, images=8))
    with pytest.raises(UserError) as refused:
        given(folder.parent, which)
    value = re.search(r"give (?:--which )?(last)", str(refused.value))[1]
    assert given(folder.parent, value).checkpoint.parent == folder
