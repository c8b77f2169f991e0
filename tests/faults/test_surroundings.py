"""What may be missing around a run: a free port, a compiler, a library. Each is a start of its own."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from pathlib import Path

from mirl.engine.errors import EXIT_USER_ERROR
from tests.support.runs import ENTRY, TINY, losses

# A library that cannot be imported, as one whose shared libraries do not fit, or that was never installed.
WITHOUT = """
import runpy, sys
missing = sys.argv[1].split(",")
class Absent:
    def find_spec(self, name, path=None, target=None):
        if any(name == item or name.startswith(item + ".") for item in missing):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
sys.argv = sys.argv[2:]
sys.path[0] = ""
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def finish(command: list[str], folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_a_taken_port_is_one_line_that_names_it(server, photographs, tmp_path):
    """Over several hosts; on one host no port is needed (tests/engine/pretraining/test_pretrain.py)."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        environment = {"CROSS_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        run = server.start(
            tmp_path, "--data", photographs, "--steps", "1", "--out", "out", ranks=[0], world_size=2,
            environment=environment,
        )  # fmt: skip
        assert run.end() == [EXIT_USER_ERROR], run.output()[-3000:]
    assert f"error: port {port} of 127.0.0.1 is taken by another program" in run.output()
    assert "--master_port" in run.output() and "Traceback" not in run.output()
    assert not (tmp_path / "out").exists()


def test_without_a_compiler_a_run_on_two_ranks_trains(environment, photographs, tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("sh", "bash", "env", "uname", "hostname"):
        found = shutil.which(name)
        if found:
            (tools / name).symlink_to(found)
    python = Path(sys.executable).parent
    for name in ("python", "python3", "deepspeed"):
        (tools / name).symlink_to(python / name)
    environment |= {"PATH": str(tools)}
    environment.pop("CC", None)
    assert shutil.which("cc", path=environment["PATH"]) is shutil.which("ninja", path=environment["PATH"]) is None
    command = [str(python / "deepspeed"), "--num_accelerators", "2", ENTRY, *TINY, "--steps", "2", "--out", "out"]
    result = finish([*command, "--data", str(photographs)], tmp_path, environment)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert set(losses(tmp_path / "out")) == {1, 2}


def test_without_triton_and_xformers_the_same_losses_come_from_plain_torch(environment, photographs, tmp_path, server):
    flags = ["--data", str(photographs), "--steps", "2", "--out"]
    without = [sys.executable, "-c", WITHOUT, "triton,xformers", ENTRY, *TINY, *flags, "out"]
    result = finish(without, tmp_path, environment)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "kernels torch on" in result.stdout and "Traceback" not in result.stderr
    with_both = server.start(tmp_path, *flags, "with", ranks=1)
    assert with_both.end() == [0], with_both.output()[-3000:]
    assert losses(tmp_path / "out") == losses(tmp_path / "with") and set(losses(tmp_path / "out")) == {1, 2}


def test_xformers_asked_for_and_missing_is_one_line_with_the_pip_command(server, photographs, tmp_path):
    flags = ["--data", photographs, "--steps", "2", "--out", "out", "--attention", "xformers"]
    run = server.start(tmp_path, *flags, ranks=1, inject={0: ["hide", "xformers"]})
    assert run.end() == [EXIT_USER_ERROR], run.output()[-3000:]
    assert "pip install" in run.output() and "xformers" in run.output() and "Traceback" not in run.output()
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_without_dali_pictures_are_refused_with_the_pip_command(environment, photographs, tmp_path):
    flags = [ENTRY, *TINY, "--data", str(photographs), "--steps", "2", "--out", "out"]
    result = finish([sys.executable, "-c", WITHOUT, "nvidia.dali", *flags], tmp_path, environment)
    assert result.returncode == EXIT_USER_ERROR, result.stdout[-3000:] + result.stderr[-3000:]
    assert "pip install nvidia-dali-cuda130" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_closed_terminal_does_not_end_training(environment, photographs, tmp_path):
    """`... | head`, a closed ssh session: nobody reads what is printed."""
    flags = [ENTRY, *TINY, "--data", str(photographs), "--steps", "12", "--out", "out"]
    process = subprocess.Popen(
        [sys.executable, *flags],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("step  2/12"):
            break
    process.stdout.close()
    process.stderr.close()
    assert process.wait(timeout=180) == 0
    assert "warning: lines are missing from the terminal" in (tmp_path / "out" / "log.txt").read_text()
    assert set(losses(tmp_path / "out")) == set(range(1, 13))
