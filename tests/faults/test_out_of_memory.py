"""Memory runs out: in the trial step of --micro-batch auto, which halves it, and later, which ends the run."""

from __future__ import annotations

import json
import re
import shutil

from mirl.engine.checkpoints.reader import CheckpointReader
from mirl.engine.configuration.config import AUTO
from mirl.engine.errors import EXIT_LOST_RANK, EXIT_USER_ERROR
from tests.support.runs import losses

# A quarter of a GiB of activations and more for 22 images, of which the trial's limit allows about half.
LARGE = ["--image-size", "128", "--batch-size", "22", "--steps", "1", "--pictures", "0", "--cpu-threads", "1"]
SMALL = ["--pictures", "0", "--cpu-threads", "1"]


def told(output: str, *ways: str) -> str:
    """The one line of the error; it names ``ways`` with an estimate each, and nothing stands before it."""
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in output
    assert re.search(r"memory ran out .* with micro-batch \d+, for which \d+\.\d GiB were estimated\. Estimated", line)
    for way in ways:
        assert re.search(rf"{way}[^:]*: \d+\.\d GiB \(\d+\.\d GiB (less|more)\)", line), (way, line)
    return line


def test_it_is_halved_under_a_real_limit_and_an_error_later_says_what_would_take_less(server, photographs, tmp_path):
    def start(out: str, micro: str, *fault: str):
        flags = [*LARGE, "--micro-batch", micro, "--data", photographs, "--out", out]
        return server.start(tmp_path, *flags, ranks=1, inject={"0": ["limit_addresses", *fault]})

    auto = start("auto", AUTO, "trial", "250")
    assert auto.end() == [0], auto.output()[-3000:]
    log = (tmp_path / "auto" / "log.txt").read_text()
    assert "micro-batch 22 ran out of memory in a trial step" in log
    assert "micro-batch 11: a trial step fits into memory" in log and "22 = 11 x 2 accumulation" in log
    assert json.loads((tmp_path / "auto" / "config.json").read_text())["optim"]["micro_batch"] == AUTO
    assert CheckpointReader(tmp_path / "auto" / "checkpoints" / "step-00000001").state["micro_batch"] == 11
    given = start("given", "11", "trial", "250")
    assert given.end() == [0], given.output()[-3000:]
    assert losses(tmp_path / "auto") == losses(tmp_path / "given") and set(losses(tmp_path / "given")) == {1}
    later = start("later", "22", "forward", "150")
    assert later.end() == [EXIT_USER_ERROR], later.output()[-3000:]
    ways = ("--micro-batch 11", "--recompute-pointwise", "--activation-checkpointing every", "--deepspeed_config zero3")
    line = told(later.output(), *ways)
    assert "DefaultCPUAllocator" in line
    # As `--micro-batch 11` itself is told when it is given.
    estimate = re.search(
        r"memory (\d\.\d GiB) estimated for micro-batch 11", (tmp_path / "given" / "log.txt").read_text()
    )[1]
    assert f"--micro-batch 11: {estimate} (" in line


def test_a_rank_that_runs_out_halves_it_on_all_and_ends_all_in_a_step(server, photographs, tmp_path):
    def start(out: str, micro: str, rank: str, *fault: str):
        flags = [*SMALL, "--steps", "2", "--micro-batch", micro, "--data", photographs, "--out", out]
        return server.start(tmp_path, *flags, inject={rank: ["run_out_of_memory", *fault]})

    auto = start("auto", AUTO, "1", "trial", "1")
    assert auto.end() == [0, 0], auto.output()[-3000:] + auto.output(1)[-3000:]
    log = (tmp_path / "auto" / "log.txt").read_text()
    assert "micro-batch 4 ran out of memory in a trial step on rank 1" in log
    assert "8 = 2 x 2 accumulation x 2 ranks" in log and set(losses(tmp_path / "auto")) == {1, 2}
    later = start("later", "4", "0", "forward", "2")
    assert later.end() == [EXIT_USER_ERROR, EXIT_LOST_RANK], later.output()[-3000:] + later.output(1)[-3000:]
    assert "error: memory ran out after step 1 with" in told(later.output(), "--micro-batch 2", "zero3")
    assert "error: rank 1: another rank is gone" in later.output(1) and "Traceback" not in later.output(1)


def test_a_classifiers_evaluation_that_runs_out_ends_the_run_after_its_step(server, photographs, tmp_path):
    for number, path in enumerate(sorted(photographs.glob("*.jpg"))[:16]):
        target = tmp_path / "data" / str(number % 2) / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    encoder = server.start(tmp_path, *SMALL, "--steps", "1", "--data", photographs, "--out", "encoder", ranks=1)
    assert encoder.end() == [0], encoder.output()[-3000:]
    data = tmp_path / "data"
    flags = ["--checkpoint", "encoder", "--data", data, "--val", data, "--batch-size", "8", "--micro-batch", AUTO]
    flags += ["--steps", "1", "--head-init", "random", "--precision", "fp32", "--no-tensorboard", "--cpu-threads", "1"]
    run = server.start(
        tmp_path,
        *flags,
        "--out",
        "run",
        ranks=1,
        entry="finetune",
        inject={"0": ["limit_addresses", "evaluation", "1"]},
    )
    assert run.end() == [EXIT_USER_ERROR], run.output()[-3000:]
    assert "micro-batch 8: a trial step fits into memory" in run.output()
    assert "memory ran out after step 1" in told(run.output(), "--recompute-pointwise")
    CheckpointReader(tmp_path / "run" / "checkpoints" / "step-00000001")
