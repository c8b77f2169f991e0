"""What a run tells to type next is typed here as it is told, with the words in capitals filled in."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mirl.engine.checkpoints.best import Best, write_best
from mirl.engine.checkpoints.kinds import given
from mirl.engine.cli import dispatch
from mirl.engine.commands import doctor
from mirl.engine.configuration.flags import parse
from mirl.engine.distributed.environment import without_launcher
from mirl.engine.transfer.classification.augmentation import BatchAugmentation
from mirl.engine.transfer.classification.command_line import FINETUNE
from mirl.engine.transfer.classification.config import OFF, FinetuneConfig
from mirl.engine.transfer.classification.rand_augment import RandAugment
from mirl.errors import UserError
from tests.engine.conftest import write_classes
from tests.engine.models.helpers import tiny_config

MIRL = [sys.executable, "-m", "mirl.engine.cli"]
SHORT = ["--steps", "2", "--warmup-steps", "1", "--batch-size", "4", "--no-tensorboard", "--loader-threads", "1"]


def told(output: str, command: str) -> list[str]:
    """The words behind `mirl` of a command that was told in ``output``."""
    return shlex.split(re.search(rf"\bmirl ({command} .*?)(?:  .*|\).*)?$", output, re.M)[1])


def filled(words: list[str], **places: Path) -> list[str]:
    """``words`` with TRAIN, VAL ... replaced, and without the dots of a list."""
    return [str(places.get(word, word)) for word in words if word != "..."]


def test_the_commands_that_runs_tell_run_as_they_are_told(server, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train = write_classes(tmp_path / "train", {"blue": 12, "red": 12})
    val = write_classes(tmp_path / "val", {"blue": 3, "red": 3})
    places = {"TRAIN": train, "VAL": val, "IMAGE": next(val.glob("*/*.png")), "DIR": tmp_path / "exported"}
    out = tmp_path / "runs of it's" / "pre"
    done = server.start(tmp_path, "--data", train, *SHORT, "--out", out, ranks=1)
    assert done.end() == [0], done.output()[-2000:]
    said = done.output()
    assert dispatch(filled(told(said, "visualize"), **places)) == 0
    assert dispatch(filled(told(said, "probe"), **places)) == 0
    finetuning = told(said, "finetune")
    # A run that is no classifier yet: the refusal tells the same command.
    capsys.readouterr()
    with pytest.raises(UserError) as refused:
        dispatch(["predict", str(out), str(places["IMAGE"])])
    assert told(str(refused.value), "finetune") == finetuning
    tuned = tmp_path / "runs of it's" / "tuned"
    command, *flags = filled(finetuning, **places)
    more = [*SHORT, "--precision", "fp32", "--out", tuned]
    done = server.start(tmp_path, *flags, *more, entry=command, ranks=1)
    assert done.end() == [0], done.output()[-2000:]
    for command in ("evaluate", "predict", "export"):
        assert dispatch(filled(told(done.output(), command), **places)) == 0, command
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
    folder = checkpoint(tiny_config()).parent
    if which is None:
        write_best(folder, Best(step=9, epoch=1.0, weights="last", score_percent=50.0, images=8))
    with pytest.raises(UserError) as refused:
        given(folder.parent, which)
    value = re.search(r"give (?:--which )?(last)", str(refused.value))[1]
    assert given(folder.parent, value).checkpoint.parent == folder


# --- doctor


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_ID": "7"},
        {"RANK": "0", "WORLD_SIZE": "2"},
    ],
)
def test_doctor_finds_nothing_after_what_it_tells_to_unset(environment, monkeypatch):
    for variable in set(os.environ) - set(without_launcher(os.environ)):
        monkeypatch.delenv(variable)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    finding = doctor.check_launch()
    assert finding.level == doctor.WARNING
    for variable in re.search(r"unset ([A-Z_ ]+)$", finding.mend)[1].split():
        monkeypatch.delenv(variable)
    assert doctor.check_launch().level == doctor.OK


@pytest.mark.process
def test_doctor_is_content_with_the_limit_of_open_files_that_it_tells_to_set():
    program = "from mirl.engine.commands import doctor; print(doctor.check_open_files())"

    def report(*limits: str) -> str:
        shell = " && ".join([*limits, 'exec "$0" -c "$1"'])
        return subprocess.run(
            ["bash", "-c", shell, sys.executable, program], capture_output=True, text=True, check=True, timeout=60
        ).stdout

    limits = ["ulimit -Sn 256", "ulimit -Hn 4096"]
    told = report(*limits)
    assert told.startswith("warning")
    assert report(*limits, re.search(r"ulimit -n \d+", told)[0]).startswith("ok")


# --- fine-tuning


def finetuning(told: str) -> FinetuneConfig:
    """The configuration of a run with the flags that a refusal tells to set."""
    flags = shlex.split(re.search(r"set (--.*)$", told)[1])
    return parse(FINETUNE, ["--checkpoint", "x", "--data", "y", *flags])


def test_an_odd_micro_batch_goes_with_the_flags_that_are_named():
    options = {"micro_batch": 3, "num_classes": 2, "mean": (0.5,) * 3, "std": (0.2,) * 3}
    options |= {"seed": 0, "device": torch.device("cpu")}
    with pytest.raises(UserError) as refused:
        BatchAugmentation(**options, mixup=0.8, cutmix=1.0)
    section = finetuning(str(refused.value)).finetune
    BatchAugmentation(**options, mixup=section.mixup, cutmix=section.cutmix)


def test_images_of_four_channels_go_with_the_flag_that_is_named():
    with pytest.raises(UserError) as refused:
        RandAugment("rand-m9-mstd0.5-inc1", image_size=(8, 8), mean=(0.5,) * 4, seed=0, workers=0)
    assert finetuning(str(refused.value)).finetune.rand_augment == OFF
