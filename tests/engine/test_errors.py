"""How a command ends: a line for what a user can mend, a traceback for a fault of ours."""

from __future__ import annotations

import ast
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.support.launch import CHECKOUT, launch_environment
from tests.support.tars import add_member

USER_ERRORS = {
    "UserError": "raise UserError('steps is 0: give 1 or more')",
    "missing file": "open('/nowhere/at/all')",
    "folder as a file": "open('/')",
}
FAULTS = {
    "ValueError": "raise ValueError('a value of ours')",
    "KeyError": "{}['absent']",
    "ImportError": "import mirl.absent",
    "RuntimeError": "raise RuntimeError('a fault')",
    "FileNotFoundError without a file": "raise FileNotFoundError('a fault')",
}


def end_of(body: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process whose entry point runs ``body`` inside a module of ours, as a fault of ours would stand there."""
    code = (
        "import mirl.engine.version as ours\n"
        "from mirl import UserError\n"
        "from mirl.engine.errors import run_entry_point\n"
        f"code = compile({body!r}, ours.__file__, 'exec')\n"
        "run_entry_point(lambda: exec(code, ours.__dict__ | {'UserError': UserError}))\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=CHECKOUT, env=launch_environment() | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("name", USER_ERRORS)
def test_what_a_user_can_mend_is_one_line_and_exit_code_2(name):
    ended = end_of(USER_ERRORS[name])
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ") and len(ended.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_ours_keeps_its_traceback_and_exit_code_1(name):
    ended = end_of(FAULTS[name])
    assert ended.returncode == 1
    assert ended.stderr.startswith("Traceback (most recent call last)")


def test_the_traceback_of_a_user_error_can_be_asked_for():
    ended = end_of(USER_ERRORS["UserError"], MIRL_TRACEBACK="1")
    assert ended.returncode == 1 and "Traceback" in ended.stderr and "steps is 0" in ended.stderr


def test_one_class_says_whose_error_it_is_and_nobody_looks_at_tracebacks():
    for folder in ("engine", "kernels", "dataloaders", "mirl"):
        for path in (CHECKOUT / folder).rglob("*.py"):
            tree = ast.parse(path.read_text())
            names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
            assert not names & {"__traceback__", "tb_frame", "tb_next"}, f"{path} looks at a traceback"
            defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
            assert "UserError" not in defined or path == CHECKOUT / "mirl" / "errors.py"


def test_a_class_part_that_is_no_number_is_named_and_the_run_ends(server, tmp_path):
    """In shards to evaluate on, whose labels are looked at before the run begins."""
    import tarfile

    from mirl.dataloaders.sources.tar_index import make_index

    for name, label in (("good", b"0"), ("bad", b"zero")):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as shard:
            for number in range(8):
                picture = Image.fromarray(np.full((32, 32, 3), 30 * number, np.uint8))
                add_member(shard, f"{number:03d}.png", picture)
                add_member(shard, f"{number:03d}.cls", label if number == 5 else str(number % 2).encode())
        make_index(tmp_path / f"{name}.tar")
    trained = server.start(tmp_path, "--data", tmp_path / "good.tar", "--steps", 1, "--out", "pre", ranks=1)
    assert trained.end(60) == [0], trained.output()[-2000:]
    flags = ["--checkpoint", "pre", "--data", tmp_path / "good.tar", "--num-classes", 2, "--steps", 1, "--warmup-steps"]
    flags += [0, "--batch-size", 4, "--rand-augment", "off", "--out", "ft", "--val", tmp_path / "bad.tar"]
    run = server.start(tmp_path, *flags, ranks=1, entry="finetune")
    assert run.end(60) == [2], run.output()[-2000:]
    assert "bad.tar::005.png: its cls part is b'zero', not a class number" in run.output()
    assert "Traceback" not in run.output() and not (tmp_path / "ft").exists()
