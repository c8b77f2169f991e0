"""Ranks that wait for others say so, and why that may be; done as told, the command runs."""

from __future__ import annotations

import inspect
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from mirl.engine.commands import doctor
from mirl.engine.distributed.environment import who_is_missing, without_launcher
from tests.support.launch import CHECKOUT, launch_environment

PROGRAM = """
import datetime, os, sys
from mirl.engine.distributed import launch
from mirl.engine.errors import run_entry_point
launch.SILENCE_S, launch.RENDEZVOUS_TIMEOUT = 0.5, datetime.timedelta(seconds=float(sys.argv[1]))
def main():
    ranks = launch.join()
    ranks.barrier()
    launch.leave()
    os.write(1, f"met {ranks.rank} {ranks.world_size}\\n".encode())  # a line at once: ranks share a pipe
run_entry_point(main)
"""
SLURM = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "bash"}
SRUN = SLURM | {"SLURM_STEP_NUM_TASKS": "2"}


@pytest.fixture
def port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in launch_environment().items() if not name.startswith("SLURM_")}


def start(limit_s: float, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(limit_s)], cwd=CHECKOUT, env=clean_environment() | environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


ALONE = {
    "a Slurm shell": (SLURM, "rank 0 of 2", "rank 1", "SLURM_NTASKS is 2 and only srun starts that many: start this"),
    "WORLD_SIZE alone": (
        {"WORLD_SIZE": "3"},
        "rank 0 of 3",
        "ranks 1 to 2, or some",
        "WORLD_SIZE is 3, which a launch",
    ),
    "rank 1 alone": ({"RANK": "1", "WORLD_SIZE": "2"}, "rank 1 of 2", "rank 0", "WORLD_SIZE is 2, which a launcher"),
    "a task of srun": (SRUN, "rank 0 of 2", "rank 1", "see what they print, if the launcher has started them"),
}


@pytest.mark.parametrize("name", ALONE)
def test_a_rank_that_waits_says_so_once_and_gives_up_in_one_line(name, port):
    environment, who, missing, why = ALONE[name]
    process = start(4, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **environment)
    _, told = process.communicate(timeout=60)
    lines = [line for line in told.splitlines() if line.startswith(("warning: rank", "error:"))]
    assert lines[0].startswith(f"warning: {who} waits for {missing}") and why in lines[0]
    assert f" at 127.0.0.1:{port}: " in lines[0]
    speaker = "rank 1: " if environment.get("RANK") else ""
    assert lines[1].startswith(f"error: {speaker}{who} waited 0.0666667 minutes in vain for {missing}")
    assert why in lines[1] and len(lines) == 2
    assert process.returncode == 2 and "Traceback" not in told


def test_after_it_was_said_the_others_are_still_welcome(port):
    at = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    first = start(60, **at)
    assert "waits for rank 1" in first.stderr.readline()
    second = start(60, RANK="1", **at)
    for process, rank in ((first, 0), (second, 1)):
        out, _ = process.communicate(timeout=60)
        assert (process.returncode, out) == (0, f"met {rank} 2\n")


def test_ranks_that_meet_at_once_say_nothing(port):
    started = time.monotonic()
    process = start(60, MASTER_PORT=port)
    out, told = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "met 0 1\n") and "waits" not in told, time.monotonic() - started


HERE = {"MASTER_ADDR": "127.0.0.1"}
WAITING = {
    "a Slurm shell": SLURM,
    "a Slurm shell with MASTER_ADDR": SLURM | HERE,
    "WORLD_SIZE alone": {"WORLD_SIZE": "3"} | HERE,
}
REFUSED = {
    "a rank that is none of them": {"RANK": "2", "WORLD_SIZE": "2"} | HERE,
    "no number": {"RANK": "abc"},
    "no number of ranks": {"RANK": "0", "WORLD_SIZE": "two"} | HERE,
    "no number of tasks": SLURM | {"SLURM_NTASKS": "many"} | HERE,
    "no number of tasks a host": SLURM | {"SLURM_NTASKS": "3", "SLURM_NTASKS_PER_NODE": "x"} | HERE,
    "no ranks on this host": {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "0"},
    "no port": {"MASTER_PORT": "abc"},
    "a port that is too large": {"MASTER_PORT": "99999"},
}
# Joins in each environment, without what each refusal names until none is left.
DONE_AS_TOLD = """
import datetime, json, os, re, sys
from mirl.engine.distributed import launch
from mirl.errors import UserError
launch.RENDEZVOUS_TIMEOUT = datetime.timedelta(seconds=2)
clean, ends = dict(os.environ), {}
for name, environment in json.loads(sys.argv[1]).items():
    left, told, ranks = dict(environment), [], None
    while ranks is None:
        os.environ.clear()
        os.environ.update(clean | left)
        try:
            ranks = launch.join()
        except UserError as error:
            told.append(str(error))
            for variable in told_to_unset(told[-1], left):
                del left[variable]
    ends[name] = [told, ranks.rank, ranks.world_size]
    launch.leave()
print(json.dumps(ends))
"""


def told_to_unset(line: str, environment: dict[str, str]) -> set[str]:
    """The variables of ``environment`` that a refusal tells to unset."""
    named = re.search(r"unset ([A-Z_]+(?: and [A-Z_]+)*|both)|variable ([A-Z_]+) .* or unset", line)
    assert named, line
    names = set(re.findall(r"[A-Z_]{4,}", line if named[1] == "both" else named[1] or named[2])) & set(environment)
    assert names, line
    return names


@pytest.mark.parametrize("name", WAITING)
def test_done_as_told_a_command_that_waited_runs(name, port):
    """What the line tells to unset is unset, and nothing else is."""
    environment = WAITING[name]
    process = start(1, MASTER_PORT=port, **environment)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 2 and "Traceback" not in told, told
    unset = told_to_unset(told.splitlines()[-1], environment)
    left = {name: value for name, value in environment.items() if name not in unset}
    out, _ = start(4, MASTER_PORT=port, **left).communicate(timeout=60)
    assert out == "met 0 1\n"


def test_done_as_told_a_command_that_was_refused_runs():
    done = subprocess.run(
        [sys.executable, "-c", inspect.getsource(told_to_unset) + DONE_AS_TOLD, json.dumps(REFUSED)],
        cwd=CHECKOUT, env=clean_environment(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    ends = json.loads(done.stdout.splitlines()[-1])
    assert ends.keys() == REFUSED.keys()
    for name, (told, *met) in ends.items():
        assert told and met == [0, 1], name
        # By the name that the user's shell has.
        assert all(any(variable in line for variable in REFUSED[name]) for line in told), name


LAUNCHERS = {
    "deepspeed": ("--master_port N", ["--num_gpus", "2", "--no_local_rank"]),
    "torchrun": ("--rdzv-endpoint HOST:N", ["--nproc-per-node", "2", "--rdzv-backend", "c10d"]),
}


@pytest.fixture(scope="module")
def taken() -> Iterator[tuple[str, str]]:
    """A port at which another program listens, and what a rank that wants it says; the port is taken for a while."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        number = str(other.getsockname()[1])
        process = start(4, MASTER_ADDR="127.0.0.1", MASTER_PORT=number, RANK="0", WORLD_SIZE="2")
        _, told = process.communicate(timeout=60)
        assert process.returncode == 2 and "Traceback" not in told, told
        (line,) = [line for line in told.splitlines() if line.startswith("error:")]
        yield number, line


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_done_as_told_ranks_meet_at_another_port(launcher, taken, port, tmp_path):
    number, line = taken
    flag, words = LAUNCHERS[launcher]
    assert f"port {number} of 127.0.0.1 is taken" in line and f"{launcher} {flag}" in line
    script = tmp_path / "meet.py"
    script.write_text(PROGRAM)
    flag = flag.replace("HOST", "127.0.0.1").replace("N", port)
    done = subprocess.run(
        [launcher, *words, *flag.split(), str(script), "60"],
        cwd=CHECKOUT, env=clean_environment() | {"MASTER_PORT": number}, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert {"met 0 2", "met 1 2"} <= set(done.stdout.splitlines())


def test_who_is_missing():
    assert [who_is_missing(rank, 8) for rank in (0, 5)] == ["ranks 1 to 7, or some of them", "rank 0"]


FOREIGN = {
    "a Slurm shell": SLURM,
    "a Slurm shell with MASTER_ADDR": SLURM | {"MASTER_ADDR": "127.0.0.1"},
    "WORLD_SIZE alone": {"WORLD_SIZE": "2"},
    "a rank of torchrun": {"RANK": "1", "WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "x", "LOCAL_RANK": "1"},
}


# A process that imports DeepSpeed each: one with all that Slurm leaves, one with all that a launcher leaves.
CHECKED = ("a Slurm shell with MASTER_ADDR", "a rank of torchrun")


@pytest.mark.parametrize("name", FOREIGN)
def test_doctor_checks_deepspeed_as_one_process_in_any_shell(name, monkeypatch):
    for variable in set(os.environ) - set(without_launcher(os.environ)):  # what a run in this process left
        monkeypatch.delenv(variable)
    for variable, value in FOREIGN[name].items():
        monkeypatch.setenv(variable, value)
    if name in CHECKED:
        finding = doctor.check_deepspeed()
        assert finding.level == doctor.OK, finding
    launch = doctor.check_launch()
    assert launch.level == doctor.WARNING and "unset" in launch.mend
    assert ("SLURM_NTASKS is 2" if "SLURM_NTASKS" in FOREIGN[name] else "WORLD_SIZE is ") in launch.text


def test_doctor_blames_deepspeed_for_nothing_else(monkeypatch):
    """Here the process could not begin: what it says is passed on, and nobody is told to install DeepSpeed again."""
    monkeypatch.setattr(doctor, "without_launcher", lambda environment: dict(environment) | {"WORLD_SIZE": "two"})
    finding = doctor.check_deepspeed()
    assert finding.level == doctor.ERROR and "was not tried" in finding.text
    assert "WORLD_SIZE is 'two'" in finding.mend and "pip install" not in str(finding)


def test_an_environment_without_a_launcher_keeps_the_rest():
    kept = {"PATH": "/bin", "OMP_NUM_THREADS": "1", "NCCL_DEBUG": "INFO"}
    assert without_launcher(kept | SRUN | FOREIGN["a rank of torchrun"] | {"MASTER_PORT": "1"}) == kept
