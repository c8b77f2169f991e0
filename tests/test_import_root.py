"""`mirl` is the one import root: lazy, complete, and in nobody's way."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import mirl
from tests.support.launch import CHECKOUT, launch_environment


def python(code: str, *, cwd: Path, path: Path | None = None) -> str:
    """What ``code`` prints, run in folder ``cwd`` with ``path`` on PYTHONPATH."""
    environment = launch_environment() | ({"PYTHONPATH": str(path)} if path else {})
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_it_costs_no_torch():
    assert python("import mirl, sys; mirl.recipe('demo'); print('torch' in sys.modules)", cwd=CHECKOUT) == "False"


@pytest.mark.parametrize(
    "module", ["mirl.engine.errors", "mirl.engine.cli", "mirl.engine.pretrain", "mirl.engine.finetune"]
)
def test_help_and_a_wrong_flag_wait_for_no_torch(module):
    assert python(f"import {module}, sys; print('torch' in sys.modules)", cwd=CHECKOUT) == "False"


def test_every_name_of_the_face_is_there():
    assert set(mirl.__all__) == set(mirl._HOMES)
    assert all(getattr(mirl, name) is not None for name in mirl.__all__)
    assert set(mirl.__all__) <= set(dir(mirl))
    with pytest.raises(AttributeError, match="has no attribute 'pretraine'"):
        mirl.pretraine  # noqa: B018


@pytest.fixture
def installed(tmp_path) -> Path:
    """A place where another package called `kernels` is installed."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("def get_kernel(): return 'theirs'\n")
    return tmp_path


@pytest.mark.parametrize("before", ["", "import mirl.kernels; "])
def test_an_installed_kernels_is_found_from_within_the_checkout(installed, before):
    # PYTHONPATH stands for site-packages: like it, it comes after the folder that Python was started in.
    code = before + "import kernels, mirl.kernels; print(kernels.get_kernel(), mirl.kernels.attention.__module__)"
    assert python(code, cwd=CHECKOUT, path=installed) == "theirs mirl.kernels.attention"


def test_without_one_the_folder_of_the_checkout_answers_and_nothing_breaks():
    code = "import kernels, transformers.utils.import_utils as t; print(t.is_kernels_available())"
    assert python(code, cwd=CHECKOUT) == "False"


def test_the_checkout_goes_behind_everything_else():
    code = "import sys, mirl, os; print([os.path.realpath(p or '.') for p in sys.path][-1])"
    assert python(code, cwd=CHECKOUT) == str(CHECKOUT)


def test_a_keyword_of_a_recipe_is_a_flag():
    config = mirl.recipe("demo", steps=20, image_size=(64, 32), data="photographs", model="vit_s")
    assert (config.optim.steps, config.model.image_height, config.model.image_width) == (20, 64, 32)
    assert config.data.data == ("photographs",) and config.model.name == "vit_s" and config.recipe == "demo"
    assert mirl.finetune_recipe("small_data", image_size=64).finetune.image_width == 64
    with pytest.raises(mirl.UserError, match="batchsize is no setting: did you mean batch_size"):
        mirl.recipe("demo", batchsize=3)
