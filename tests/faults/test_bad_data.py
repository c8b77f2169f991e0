"""What one rank's images can do: break, or hold numbers whose loss is not finite."""

from __future__ import annotations

import shutil
import sys

import numpy as np

from mirl.dataloaders.order import EpochOrder
from mirl.engine.checkpoints.reader import find_newest_good
from mirl.engine.errors import EXIT_USER_ERROR
from tests.support.runs import equal_tensors, events, losses, records

# Finite, so that the file is read; in float32 its square is not. NaN in a file makes it a broken image.
TOO_LARGE = 1e30
KEEP = ["--keep-checkpoints", "0"]


def image_of(step: int, rank: int, images: int) -> int:
    """The number of an image that ``rank`` of two shows in ``step`` (from 1) of the first epoch."""
    return int(EpochOrder(images, 0)(0)[8 * (step - 1) + 4 * rank])


def test_broken_images_of_one_rank_are_replaced_and_too_many_end_all_ranks(server, photographs, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(photographs, data)
    for step in (2, 4):
        broken = data / f"{image_of(step, 1, 44):03d}.jpg"
        broken.write_bytes(broken.read_bytes()[:300])
    run = server.start(tmp_path, "--data", data, "--steps", "6", "--checkpoint-every", "100", "--out", "out")
    codes = run.end()
    assert codes[0] == codes[1] == EXIT_USER_ERROR, run.output()[-3000:] + run.output(1)[-3000:]
    # Reading runs ahead of training; what a step would show is counted before it, and the one too many is not shown.
    logged = [record["bad_images"] for record in records(tmp_path / "out") if "bad_images" in record]
    assert logged == [0, 1, 1]
    assert f"broken image {data}/{image_of(2, 1, 44):03d}.jpg" in run.output(1)
    assert "error: 2 of 44 images are broken, more than the 1 that bad_image_limit 0.001 allows" in run.output()
    assert "mirl validate-data" in run.output()
    found, remarks = find_newest_good(tmp_path / "out" / "checkpoints")
    assert (found.name, remarks) == ("step-00000003", [])
    # With them allowed the same run goes on.
    more = server.start(
        tmp_path, "--data", data, "--steps", "6", "--out", "out", "--resume", "auto", "--max-bad-images", "0.1"
    )
    assert more.end() == [0, 0], more.output()[-3000:]
    assert set(losses(tmp_path / "out")) == set(range(1, 7))


def test_after_validate_data_as_the_message_advises_the_run_goes_on(server, run, photographs, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(photographs, data)
    for step in (2, 4):
        broken = data / f"{image_of(step, 1, 44):03d}.jpg"
        broken.write_bytes(broken.read_bytes()[:300])
    given = ["--data", data, "--steps", "8", "--checkpoint-every", "100"]
    tolerant = server.start(tmp_path, *given, "--max-bad-images", "0.1", "--out", "tolerant")
    assert tolerant.end() == [0, 0]
    stopped = server.start(tmp_path, *given, "--out", "out")
    assert stopped.end() == [EXIT_USER_ERROR] * 2
    advice = "run mirl validate-data on the data set, which writes a manifest that leaves them out"
    assert advice in stopped.output() and "then --resume auto goes on" in stopped.output()
    validated = run(sys.executable, "-m", "mirl.engine.cli", "validate-data", str(data))
    assert "2 broken" in validated.stdout, validated.stdout + validated.stderr
    more = server.start(tmp_path, *given, "--out", "out", "--resume", "auto", "--max-bad-images", "0")
    assert more.end() == [0, 0], more.output()[-3000:]
    assert "2 of 44 images, called broken by the manifest, keep their places" in more.output()
    assert losses(tmp_path / "out") == losses(tmp_path / "tolerant")


def test_a_loss_that_is_not_finite_on_one_rank_skips_the_step_on_all_and_names_rank_and_file(server, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    generator = np.random.default_rng(0)
    for number in range(44):
        np.save(data / f"{number:03d}.npy", generator.standard_normal((40, 40, 3), dtype=np.float32))
    bad = data / f"{image_of(3, 1, 44):03d}.npy"
    np.save(bad, np.full((40, 40, 3), TOO_LARGE, dtype=np.float32))
    run = server.start(tmp_path, "--data", data, "--steps", "5", "--checkpoint-every", "1", "--out", "out", *KEEP)
    assert run.end() == [0, 0], run.output()[-3000:]
    (skipped,) = events(tmp_path / "out", "skipped_step")
    assert skipped["step"] == 3 and skipped["in_a_row"] == 1
    assert "step 3 was skipped, 1 in a row: not finite (rank 1: loss of pair_1_4, pair_2_3, files" in run.output()
    assert str(bad) in skipped["detail"]
    known = {record["step"]: record for record in records(tmp_path / "out") if "loss" in record}
    assert [known[step]["skipped_steps"] for step in range(1, 6)] == [0, 0, 1, 1, 1]
    assert all(np.isfinite(known[step]["loss"]) for step in (1, 2, 4, 5)) and known[3]["loss"] is None
    checkpoints = tmp_path / "out" / "checkpoints"
    steps = [checkpoints / f"step-{step:08d}" for step in range(1, 6)]
    # Every rank kept weights and moments as they were before the skipped step, and went on from them.
    assert equal_tensors(steps[1], steps[2]) and not equal_tensors(steps[2], steps[3])


def test_not_finite_again_and_again_ends_all_ranks_with_the_checkpoint_intact(server, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    generator = np.random.default_rng(0)
    for number in range(44):
        np.save(data / f"{number:03d}.npy", generator.standard_normal((40, 40, 3), dtype=np.float32))
    for step in (3, 4):
        np.save(data / f"{image_of(step, 1, 44):03d}.npy", np.full((40, 40, 3), TOO_LARGE, dtype=np.float32))
    flags = ["--steps", "9", "--checkpoint-every", "2", "--max-nonfinite-steps", "2", "--out", "out"]
    run = server.start(tmp_path, "--data", data, *flags)
    assert run.end() == [3, 3], run.output()[-3000:]
    assert "error: step 4: loss or gradient was not finite for 2 steps in a row (rank 1: loss of" in run.output()
    found, remarks = find_newest_good(tmp_path / "out" / "checkpoints")
    assert (found.name, remarks) == ("step-00000002", [])
