"""A fine-tuning run that cannot be is refused before torch is imported, in the words of the run."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mirl.engine.configuration.flags import parse
from mirl.engine.transfer.classification.command_line import FINETUNE
from mirl.engine.transfer.classification.early import refuse_early
from mirl.errors import UserError
from tests.engine.conftest import write_classes
from tests.engine.models.helpers import tiny_config
from tests.support.launch import CHECKOUT, launch_environment

MISTAKES = {
    "no data": (["--checkpoint", "{run}"], "data is not given"),
    "no checkpoint": (["--data", "{train}"], "checkpoint is not given"),
    "no such checkpoint": (
        ["--data", "{train}", "--checkpoint", "{run}-not"],
        "-not does not exist: give a folder like",
    ),
    "no such data": (["--data", "{train}-not", "--checkpoint", "{run}"], "train-not does not exist; check the path"),
    "other classes": (
        ["--data", "{train}", "--checkpoint", "{run}", "--val", "{other}"],
        "classes of data and val differ: val has class 'c', which data lacks; val lacks class 'b'",
    ),
}


@pytest.fixture
def places(checkpoint, tmp_path) -> dict[str, Path]:
    return {
        "run": checkpoint(tiny_config()),
        "train": write_classes(tmp_path / "train", {"a": 1, "b": 1}),
        "val": write_classes(tmp_path / "val", {"a": 1, "b": 1}),
        "other": write_classes(tmp_path / "other", {"a": 1, "c": 1}),
    }


@pytest.mark.process
@pytest.mark.parametrize("name", MISTAKES)
def test_it_is_told_before_torch(name, places):
    arguments, message = MISTAKES[name]
    filled = [text.format(**places) for text in arguments]
    code = (
        "import sys\nfrom mirl.errors import UserError\nfrom mirl.engine.finetune import main\n"
        "try:\n    main(sys.argv[1:])\nexcept UserError as error:\n    print('torch' in sys.modules, error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *filled], cwd=CHECKOUT, env=launch_environment(), capture_output=True, text=True
    )
    assert done.stdout.startswith("False ") and message in done.stdout, done.stdout + done.stderr


def test_what_the_run_takes_passes(places, tmp_path):
    def refuse(*arguments: object) -> None:
        refuse_early(parse(FINETUNE, list(map(str, arguments))))

    common = ["--checkpoint", places["run"], "--data"]
    refuse(*common, places["train"], "--val", places["val"])
    (places["val"] / "empty").mkdir()  # a folder without images is no class
    refuse(*common, places["train"], "--val", places["val"])
    both = tmp_path / "both"
    for split in ("train", "val"):
        shutil.copytree(places["train"], both / split)
    refuse(*common, both, "--val", both)
    refuse("--data", places["train"], "--resume", "auto")
    with pytest.raises(UserError, match="classes of data and val differ"):
        refuse(*common, both, "--val", places["other"])
