"""How a command ends: a line for what a user can mend, a traceback for a fault of ours."""

from __future__ import annotations

import ast
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from mirl.dataloaders import load_images
from mirl.errors import UserError
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
    "ModuleNotFoundError": "import mirl.absent",
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
    # One traceback, of that very error: not of another one that handling it met.
    assert ended.stderr.startswith("Traceback (most recent call last)") and ended.stderr.count("Traceback") == 1
    assert ended.stderr.splitlines()[-1].startswith(f"{name.split()[0]}: ")


def test_the_traceback_of_a_user_error_can_be_asked_for():
    ended = end_of(USER_ERRORS["UserError"], MIRL_TRACEBACK="1")
    assert ended.returncode == 1 and "Traceback" in ended.stderr and "steps is 0" in ended.stderr


def test_one_class_says_whose_error_it_is_and_nobody_looks_at_tracebacks():
    for folder in ("engine", "kernels", "dataloaders", "mirl"):
        for path in (CHECKOUT / folder).rglob("*.py"):
            tree = ast.parse(path.read_text())
            names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
            assert not names & {"__traceback__", "tb_frame", "tb_next"}, f"{path} looks at a traceback"
            if path != CHECKOUT / "mirl" / "errors.py":
                classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
                named = {ast.unparse(name).split(".")[-1] for one in classes for name in one.bases}
                assert not (named | {one.name for one in classes}) & {"UserError", "ValueError"}, path


@pytest.mark.parametrize(("kind", "codes"), [("fault", [69, 1]), ("to mend", [2, 2])])
def test_an_error_in_the_loader_of_one_rank_ends_both(server, photographs, tmp_path, kind, codes):
    run = server.start(
        tmp_path, "--data", photographs, "--steps", 3, "--out", "out", inject={1: ["break_loader", kind]}
    )
    assert run.end(60) == codes, run.output()[-2000:] + run.output(1)[-2000:]
    told = "error: rank 0: rank 1 met a fault in its loader: " if kind == "fault" else "error: rank 1: "
    assert told + "the second micro-batch is lost" in run.output() and "Traceback" not in run.output()
    traceback = "ValueError: the second micro-batch is lost"
    assert (traceback in run.output(1)) == ("Traceback" in run.output(1)) == (kind == "fault")


def test_an_array_file_that_is_cut_is_named(tmp_path):
    """A lone picture to look at: no other file tells what the data set holds."""
    np.save(tmp_path / "whole.npy", np.zeros((40, 40, 3), np.float32))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "whole.npy").read_bytes()[:300])
    with pytest.raises(UserError, match=r"cut\.npy: .*; give another image"):
        load_images([tmp_path / "cut.npy"], image_size=(32, 32))


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
