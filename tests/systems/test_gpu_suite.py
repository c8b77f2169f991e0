"""`benchmarks/gpu_suite.sh` keeps what it has measured, whatever ends it; here in its smallest form."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.launch import CHECKOUT, launch_environment

SUITE = CHECKOUT / "benchmarks" / "gpu_suite.sh"


def test_what_was_measured_survives_a_sigterm(tmp_path):
    out = tmp_path / "suite"
    suite = subprocess.Popen(
        [SUITE, "--quick", out], cwd=tmp_path, env=launch_environment() | {"PYTHON": sys.executable},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        wait_for(out / "tests.log", suite)  # the second part has begun
        suite.send_signal(signal.SIGTERM)
        told, _ = suite.communicate(timeout=60)
    finally:
        if suite.poll() is None:
            os.killpg(suite.pid, signal.SIGKILL)
    assert suite.returncode == 1
    assert told.splitlines()[-1] == f"stopped by SIGTERM: {out} holds what was measured until then"
    measured = json.loads((out / "suite.json").read_text())
    (case,) = measured["cases"]
    assert case["measured_as"] == "engine" and case["images_per_s"] > 0
    assert 0 < case["mfu_percent"] < case["plain_mfu_percent"]
    assert [(part["name"], part["status"]) for part in measured["parts"]] == [
        ("headline", "passed"),
        ("tests", "stopped"),
    ]
    summary = (out / "summary.md").read_text()
    assert "whole engine: " in summary and "| tests | stopped |" in summary


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)


def test_steps_are_on_disk_after_each_case(tmp_path):
    """A SIGKILL in the middle of the second case leaves the first."""
    command = "from benchmarks import bench_step; import os\n"
    command += "real = bench_step.measure_case; seen = []\n"
    command += "def measure(*args):\n    seen.append(1)\n    if len(seen) == 2: os.kill(os.getpid(), 9)\n"
    command += "    return real(*args)\n"
    command += "bench_step.measure_case = measure\nbench_step.main()\n"
    flags = ["--models", "vit_s", "--batch", "1", "2", "--contestants", "ours", "--rounds", "1", "--no-mae"]
    ended = subprocess.run(
        [sys.executable, "-c", command, *flags, "--out", tmp_path], cwd=CHECKOUT, env=launch_environment(),
        capture_output=True, timeout=200, check=False,
    )  # fmt: skip
    assert ended.returncode == -signal.SIGKILL
    (path,) = tmp_path.glob("*.json")
    assert [case["batch"] for case in json.loads(path.read_text())["cases"]] == [1]


@pytest.mark.parametrize("words", [["--stage", "5"], ["--stage"], ["--slow"]])
def test_a_wrong_flag_is_told(words, tmp_path):
    ended = subprocess.run([SUITE, *words], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1
