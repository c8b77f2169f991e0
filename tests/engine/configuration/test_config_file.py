"""`--config FILE`: a file says what flags would say, in every format; a run's own config.json repeats the run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from mirl.engine.cli import dispatch
from mirl.engine.configuration.flags import parse
from mirl.engine.pretraining.command_line import PRETRAIN, parse_pretrain
from mirl.engine.transfer.classification.command_line import FINETUNE
from mirl.errors import UserError

FLAGS = [
    "--recipe", "small_data", "--data", "a", "b", "--lr", "1e-3", "--steps", "50", "--image-size", "64x96", "--compile",
    "on", "--no-tensorboard", "--activation-checkpointing", "4", "--depth", "6", "--segments", "2", "--change", "lr",
]  # fmt: skip
YAML = """
recipe: small_data
data: [a, b]
lr: 1e-3
steps: 50
image_size: [64, 96]
compile: on
log: {tensorboard: false}
run:
  activation_checkpointing: 4
  change: lr
model: {depth: 6, segments: 2}
"""
TOML = """
recipe = "small_data"
data = ["a", "b"]
image_size = [64, 96]
[optim]
lr = 1e-3
steps = 50
[log]
tensorboard = false
[run]
compile = "on"
activation_checkpointing = "4"
change = ["lr"]
[model]
depth = 6
segments = 2
"""


def written(tmp_path: Path, name: str, text: str) -> str:
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


@pytest.mark.parametrize(("name", "text"), [("x.yaml", YAML), ("x.yml", YAML), ("x.toml", TOML)])
def test_a_file_says_what_flags_say(name, text, tmp_path):
    assert parse_pretrain(["--config", written(tmp_path, name, text)]) == parse_pretrain(FLAGS)


def test_flags_go_before_the_file_and_a_length_takes_the_place_of_another(tmp_path):
    file = written(
        tmp_path, "x.json", json.dumps({"recipe": "small_data", "steps": 50, "batch_size": 64, "model": "vit_b"})
    )
    config = parse_pretrain(["--batch-size", "32", "--epochs", "3", "--config", file])
    assert (config.recipe, config.model.name, config.optim.batch_size) == ("small_data", "vit_b", 32)
    assert (config.optim.steps, config.optim.epochs) == (0, 3)
    assert parse_pretrain(["--recipe", "demo", "--config", file]).recipe == "demo"  # of two, the flag's


@pytest.mark.parametrize(
    ("values", "name"),
    [({"steps": 9}, "demo"), ({"data": ["x"]}, "tiny"), ({"data": {"data": "x"}}, "tiny"), ({"data": []}, "demo")],
)
def test_a_file_that_names_data_and_no_recipe_takes_the_one_for_given_data(values, name, tmp_path):
    file = written(tmp_path, "x.json", json.dumps(values))
    assert parse_pretrain(["--config", file]).recipe == name
    assert parse_pretrain(["--config", file, "--data", "y"]).recipe == "tiny"


@pytest.mark.parametrize("command", [PRETRAIN, FINETUNE], ids=lambda command: command.command)
def test_the_configuration_of_a_run_gives_that_run(command, tmp_path):
    first = parse(command, ["--data", "a", "--lr", "0.125", "--resume", "auto", "--change", "lr", "--out", "there"])
    again = parse(command, ["--config", written(tmp_path, "config.json", first.to_json())])
    # Each start says for itself whether it resumes.
    assert again == dataclasses.replace(first, run=dataclasses.replace(first.run, resume="", change=()))
    other = FINETUNE if command is PRETRAIN else PRETRAIN
    with pytest.raises(UserError, match="is the configuration of another kind of run"):
        parse(other, ["--config", str(tmp_path / "config.json")])
    with pytest.raises(UserError, match="is the whole configuration of a run: leave --recipe out"):
        parse(command, ["--recipe", command.default, "--config", str(tmp_path / "config.json")])


def test_what_mirl_config_prints_can_be_given(tmp_path, capsys):
    assert dispatch(["config", *FLAGS]) == 0
    file = written(tmp_path, "mine.json", capsys.readouterr().out)
    expected = parse_pretrain(FLAGS)
    assert parse_pretrain(["--config", file, "--change", "lr"]) == expected
    assert dispatch(["config", "finetune", "--checkpoint", "c", "--data", "d"]) == 0
    assert json.loads(capsys.readouterr().out)["finetune"]["checkpoint"] == "c"
    with pytest.raises(UserError, match="'fintune' is no kind of run"):
        dispatch(["config", "fintune"])


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("x.yaml", "stepz: 5", r"stepz is no setting: did you mean steps\?"),
        ("x.yaml", "steps: many", "steps is 'many' in .*x.yaml: give a whole number"),
        ("x.yaml", "steps: 2.5", "steps is 2.5 .*: give a whole number"),
        ("x.yaml", "steps: true", "steps is True .*: give a whole number"),
        ("x.yaml", "lr: .nan", "lr is nan"),
        ("x.yaml", "lr: fast", "lr is 'fast' .*: give a number"),
        ("x.yaml", "flip: 1", "flip is 1 .*: give true or false"),
        ("x.yaml", "out: [a]", r"out is \['a'\] .*: give a text"),
        ("x.yaml", "steps: 5\noptim: {steps: 6}", "steps is given twice"),
        ("x.yaml", "recipe: smal_data", "recipe is 'smal_data' in .*did you mean 'small_data'"),
        ("x.yaml", "compile: maybe", "compile is 'maybe'"),
        ("x.yaml", "a: [", "which is no YAML: "),
        ("x.toml", "steps = ", "which is no TOML: "),
        ("x.json", "{steps: 1}", "which is no JSON: "),
        ("x.json", "[1]", "give names with values"),
        ("x.yaml", "1: 2", "give names with values"),
        ("x.ini", "", "give a file that ends with .json, .yaml, .yml or .toml"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_in_one_line(name, text, told, tmp_path):
    with pytest.raises(UserError, match=told) as refused:
        parse_pretrain(["--config", written(tmp_path, name, text)])
    assert "\n" not in str(refused.value)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read: .*No such file"):
        parse_pretrain(["--config", str(tmp_path / "none.yaml")])
