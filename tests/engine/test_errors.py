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


NAMES = {
    "non-ASCII": "b'\\xc3\\xbc\\xe2\\x82\\xac.jpg'.decode()",
    "bytes that are no text": "b'\\xff.jpg'.decode('utf-8', 'surrogateescape')",
    "a newline": "'one\\ntwo.jpg'",
    "U+0085": "'one\\x85two.jpg'",
    "an escape sequence": "'\\x1b[31mred.jpg'",
}


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("name", NAMES)
def test_any_name_can_be_told_in_one_line(name, encoding):
    body = f"print('file', {NAMES[name]})\nraise UserError('file ' + {NAMES[name]} + ' is broken')"
    ended = end_of(body, PYTHONIOENCODING=encoding)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.startswith("error: file ") and len(ended.stderr.splitlines()) == 1
    assert ended.stderr.endswith(" is broken\n") and "\x1b" not in ended.stderr
    assert ended.stdout.startswith("file ")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"RANK": "abc"},
            "error: the environment variable RANK is 'abc': it must be a number, or unset for one process",
        ),
        (
            {"RANK": "", "SLURM_PROCID": "x1"},
            "error: the environment variable SLURM_PROCID is 'x1': it must be a number",
        ),
    ],
)
def test_a_rank_that_is_no_number_is_one_line(environment, message):
    ended = end_of("print('it ran')", **environment)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith(message) and len(ended.stderr.splitlines()) == 1


def test_a_rank_that_is_empty_is_none():
    ended = end_of("print('it ran')", RANK="", SLURM_PROCID="")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "it ran\n", "")


ENDS = {
    0: "print('told')",
    2: "raise UserError('steps is 0: give 1 or more')",
    75: "print('told')\nfrom mirl.engine.errors import Preempted\nraise Preempted('after step 3')",
}


@pytest.mark.parametrize("amount", [10, 10**6])  # fits the buffer of the stream, or does not
def test_an_output_that_does_not_fit_is_told(amount):
    program = f"from mirl.engine.errors import run_entry_point\nrun_entry_point(lambda: print('x' * {amount}))\n"
    ended = subprocess.run(
        ["bash", "-c", 'exec "$0" -c "$1" > /dev/full', sys.executable, program], cwd=CHECKOUT, check=False,
        env=launch_environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 74
    assert ended.stderr.startswith("error: ") and "No space left on device" in ended.stderr
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-", "2>/dev/full"])
@pytest.mark.parametrize("code", ENDS)
def test_a_closed_stream_changes_no_exit_code_and_no_file(code, closed, tmp_path):
    """The file that is opened next must not become the descriptor that libraries take for stdout."""
    body = "import os\nkept = open(os.environ['KEPT'], 'w')\nkept.write('mine')\nkept.flush()\n"
    body += (
        "os.write(1, b'noise')\nos.write(2, b'noise') if 'full' not in os.environ['CLOSED'] else None\n" + ENDS[code]
    )
    program = (
        "import mirl.engine.version as ours\n"
        "from mirl import UserError\n"
        "from mirl.engine.errors import run_entry_point\n"
        f"code = compile({body!r}, ours.__file__, 'exec')\n"
        "run_entry_point(lambda: exec(code, ours.__dict__ | {'UserError': UserError}))\n"
    )
    ended = subprocess.run(
        ["bash", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, program], cwd=CHECKOUT, check=False,
        env=launch_environment() | {"KEPT": str(tmp_path / "kept"), "CLOSED": closed}, capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == code, ended.stderr
    assert (tmp_path / "kept").read_text() == "mine"
    assert "Traceback" not in ended.stderr


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


OWN = {
    "its own": ("raise UserError('data is not here')", 2, "error: rank 3: data is not here\n"),
    "a path": ("open('/nowhere/at/all')", 2, "error: rank 3: [Errno 2] No such file or directory: '/nowhere/at/all'\n"),
    "rank 0's too": ("error = UserError('data is not here')\nerror.of_all_ranks = True\nraise error", 2, ""),
    "a share": (
        "from mirl.errors import StorageLost\nraise StorageLost('the share is gone')",
        75,
        "stopped: rank 3: the share is gone\n",
    ),
    "a request to stop": ("from mirl.engine.errors import Preempted\nraise Preempted('after step 3')", 75, ""),
}


@pytest.mark.parametrize("name", OWN)
def test_an_error_that_rank_0_may_not_have_is_told_by_the_rank_that_has_it(name):
    body, code, told = OWN[name]
    body = f"from mirl.engine.errors import begin_to_meet\nbegin_to_meet()\n{body}"
    ended = end_of(body, RANK="3", WORLD_SIZE="4")
    assert (ended.returncode, ended.stderr) == (code, told)


def test_data_that_one_host_lacks_are_named(server, photographs, tmp_path):
    """Both ranks are of one group here; the second looks into a folder where the data are not."""
    run = server.start(
        tmp_path, "--data", photographs, "--steps", 3, "--out", "out", inject={1: ["lack_data", str(tmp_path / "gone")]}
    )
    assert run.end(60) == [69, 2], run.output()[-2000:] + run.output(1)[-2000:]
    assert f"error: rank 1: data folder {tmp_path / 'gone'} does not exist" in run.output(1)
    assert "Traceback" not in run.output() + run.output(1)
