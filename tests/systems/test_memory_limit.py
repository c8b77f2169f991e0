"""A run takes the micro-batch that fits into what memory there is, or says in one line what would."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from mirl.engine.accounting.run_memory import LIBRARY_BYTES
from mirl.engine.training.fitting import CLEARLY
from tests.support.launch import launch_environment
from tests.support.limits import control_group, peak_beside_files, under_ulimit, watched
from tests.support.runs import ENTRY, losses

GIB = 2**30
# A ViT-S at 224 pixels, as `small_data` trains it, but with fewer images a step; about 40 MB of activations an image.
FLAGS = ["--recipe", "small_data", "--precision", "fp32", "--steps", "1", "--log-every", "1", "--pictures", "0"]
FLAGS += ["--no-tensorboard", "--cpu-threads", "2", "--loader-threads", "1", "--checkpoint-every", "1"]


def pretrain(prefix: list[str], folder: Path, photographs: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [*prefix, sys.executable, ENTRY, *FLAGS, "--data", str(photographs), "--out", "out", *flags]
    return subprocess.run(
        command, cwd=folder, env=launch_environment(), capture_output=True, text=True, timeout=240, check=False
    )


def estimate_gib(output: str) -> float:
    return float(re.search(r"memory (\d+\.\d) GiB estimated for micro-batch", output)[1])


def test_under_a_limit_of_4_gb_a_step_is_divided_and_the_estimate_holds(photographs, tmp_path):
    with control_group(4 * 10**9) as group:
        prefix = [*group.prefix, *watched(tmp_path / "memory.json")]
        done = pretrain(prefix, tmp_path, photographs, "--batch-size", "44")
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        assert group.killed == 0
    told = re.search(
        r"the 44 images of a step at once would take (\d+\.\d) GiB, and so come in (\d+) micro-", done.stdout
    )
    assert told and float(told[1]) > 2.4 and int(told[2]) > 1, done.stdout
    assert set(losses(tmp_path / "out")) == {1}
    # The copy of the state for a checkpoint is estimated too, and may be made when a step has gone.
    peak = (peak_beside_files(tmp_path / "memory.json") + LIBRARY_BYTES) / GIB
    assert peak < estimate_gib(done.stdout) < 1.4 * peak


def test_what_cannot_fit_is_refused_in_one_line_before_anything_is_written(photographs, tmp_path):
    with control_group(int(1.6 * GIB)) as group:
        done = pretrain(group.prefix, tmp_path, photographs, "--batch-size", "44", "--micro-batch", "44")
        assert group.killed == 0
    assert done.returncode == 2, done.stdout[-2000:] + done.stderr[-2000:]
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert re.match(
        r"error: memory is 1\.\d GiB \(.*\) and the run needs about \d+\.\d GiB with micro-batch 44: give ", line
    )
    assert not (tmp_path / "out").exists()


def test_a_limit_of_the_address_space_counts_too(photographs, tmp_path):
    """The refusal tells how much is missing and what would do: with a little less than that the run does not begin,
    with all of it it trains to its end, and so it does with the flag that is named.
    """
    flags, tight = ("--batch-size", "44", "--micro-batch", "44"), 6 * GIB

    def refused_by(limit: int) -> tuple[str, float, float]:
        done = pretrain(under_ulimit(limit), tmp_path, photographs, *flags)
        assert done.returncode == 2, done.stdout[-2000:] + done.stderr[-2000:]
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        bound = f"left by ulimit -v {limit // 1024}"
        told = re.search(rf"memory is (\d+\.\d) GiB \({bound}\) and the run needs about (\d+\.\d) GiB", line)
        assert told, line
        assert not (tmp_path / "out").exists()
        return line, float(told[1]), float(told[2])

    def trains_under(limit: int, *flags: str) -> None:
        done = pretrain(under_ulimit(limit), tmp_path, photographs, *flags)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        assert "may not be enough" not in done.stdout
        assert set(losses(tmp_path / "out")) == {1}
        shutil.rmtree(tmp_path / "out")

    _, left, needed = refused_by(tight)
    rounding = 0.15 * GIB  # of two figures with one digit behind the point
    trains_under(tight + int((needed - left) * GIB + rounding), *flags)
    less = tight + int((needed / CLEARLY - left) * GIB - rounding)
    line, _, _ = refused_by(less)
    trains_under(less, *flags[:2], *re.search(r": give (--micro-batch \d+)", line)[1].split())
