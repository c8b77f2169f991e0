"""A disk that fills up during the run: a small tmpfs."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from mirl.engine.checkpoints.reader import find_newest_good, verify
from mirl.engine.errors import EXIT_NOT_SAVED, EXIT_USER_ERROR
from tests.support.runs import losses


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12m", "none", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(file: Path) -> None:
    with file.open("wb", buffering=0) as stream:
        for size in (1 << 16, 1):
            try:
                while True:
                    stream.write(b"\0" * size)
            except OSError as error:
                assert error.errno == errno.ENOSPC


def test_a_full_disk_costs_the_new_checkpoints_and_never_an_old_one(server, small_disk, photographs, tmp_path):
    out = small_disk / "out"
    flags = ["--data", photographs, "--steps", "20", "--checkpoint-every", "4", "--keep-checkpoints", "1", "--out", out]
    run = server.start(tmp_path, *flags)
    run.wait_for("step  6/20")
    fill(small_disk / "filler")
    codes = run.end()
    text = run.output()
    assert codes == [EXIT_NOT_SAVED, EXIT_NOT_SAVED], text[-3000:] + run.output(1)[-3000:]
    assert "warning: the checkpoint of step" in text and "No space left on device" in text
    assert "training goes on, earlier checkpoints are intact" in text
    assert "step 19/20" in text  # it did go on
    assert "error: the checkpoint of step 20 was not written" in text and "make room" in text
    assert "Traceback" not in text
    found, _ = find_newest_good(out / "checkpoints")
    assert found is not None and all(verify(path) is None for path in (out / "checkpoints").glob("step-*"))
    reached = int(found.name.split("-")[1])
    assert 4 <= reached < 20

    fill(small_disk / "more")
    before = {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    full = server.start(tmp_path, *flags, "--resume", "auto")
    assert full.end() == [EXIT_USER_ERROR, EXIT_USER_ERROR], full.output()[-3000:]
    assert f"error: out is {out}, where a file cannot be " in full.output()
    assert "[Errno 28] No space left on device; make room there" in full.output()
    kept = {path: path.read_bytes() for path in before}
    assert kept == before
    for file in ("filler", "more"):
        (small_disk / file).unlink()
    again = server.start(tmp_path, *flags, "--resume", "auto")
    assert again.end() == [0, 0], again.output()[-3000:]
    assert f"step-{reached:08d}" in again.output()
    assert max(losses(out)) == 20 and find_newest_good(out / "checkpoints")[0].name == "step-00000020"
