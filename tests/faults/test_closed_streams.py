"""Runs that were started without a standard output or error, as cron jobs and daemons are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.runs import ENTRY, TINY, losses


def end_of(folder: Path, environment: dict[str, str], redirection: str, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "-c", f'exec "$@" {redirection}', "bash", sys.executable, ENTRY, *TINY, *flags, "--out", "out"],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("redirection", ["2>&-", ">&- 2>&-"])
def test_a_run_without_a_stream_trains_to_its_end(redirection, environment, photographs, tmp_path):
    ended = end_of(tmp_path, environment, redirection, "--data", str(photographs), "--steps", "2")
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert set(losses(tmp_path / "out")) == {1, 2}
    assert "step-00000002" in (tmp_path / "out" / "log.txt").read_text()
    assert len(list((tmp_path / "out" / "checkpoints").glob("step-*"))) >= 1


def test_a_stopped_run_without_an_output_is_queued_again(environment, photographs, tmp_path):
    flags = ["--data", str(photographs), "--steps", "5000", "--max-minutes", "0.01"]
    ended = end_of(tmp_path, environment, ">&-", *flags)
    assert ended.returncode == 75, ended.stderr[-3000:]
    assert "stopped: the time limit of --max-minutes was reached" in ended.stderr
