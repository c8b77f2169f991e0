"""--micro-batch auto, and what is said when memory runs out."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from mirl.engine.accounting.run_memory import Footprint
from mirl.engine.configuration.config import AUTO
from mirl.engine.pretraining.command_line import parse_pretrain
from mirl.engine.pretraining.recipes import recipe
from mirl.engine.training import trial
from mirl.engine.training.out_of_memory import explain, is_out_of_memory
from mirl.engine.training.trial import TooLarge, try_micro_batch
from mirl.errors import UserError
from tests.engine.training.test_fitting import of_pretraining, plan_of
from tests.support.launch import CHECKOUT, launch_environment
from tests.support.ranks import run_ranks
from tests.support.runs import TINY, losses

# Half a GiB of activations for 44 images, of which a limit allows about half.
FLAGS = [
    "--image-size", "128", "--patch-size", "8", "--depth", "4", "--width", "64", "--heads", "2", "--segments", "4",
    "--decoder-width", "32", "--decoder-heads", "2", "--precision", "fp32", "--log-every", "1", "--pictures", "0",
    "--no-tensorboard", "--loader-threads", "1", "--cpu-threads", "1", "--steps", "1", "--batch-size", "44",
]  # fmt: skip


def test_it_is_halved_where_memory_runs_out_and_an_error_later_says_what_would_take_less(photographs, tmp_path):
    command = [sys.executable, "-m", "tests.engine.training.trial_worker", "limited", str(tmp_path)]
    done = subprocess.run(
        [*command, *FLAGS, "--data", str(photographs)], cwd=CHECKOUT, env=launch_environment(), capture_output=True,
        text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout[-2000:] + done.stderr[-3000:]
    log = (tmp_path / "auto" / "log.txt").read_text()
    assert "micro-batch 44 ran out of memory in a trial step" in log
    assert "micro-batch 22: a trial step fits into memory" in log and "44 = 22 x 2 accumulation" in log
    assert losses(tmp_path / "auto") == losses(tmp_path / "given") and set(losses(tmp_path / "given")) == {1}
    assert json.loads((tmp_path / "auto" / "config.json").read_text())["optim"]["micro_batch"] == AUTO
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert re.match(r"error: memory ran out .* with micro-batch 44, for which \d\.\d GiB were estimated\.", line)
    for way in ("--micro-batch 22", "--recompute-pointwise", "--activation-checkpointing every", "zero3"):
        assert re.search(rf"{way} \d\.\d GiB", line), way
    assert "DefaultCPUAllocator" in line and "Traceback" not in done.stderr


def test_a_rank_that_runs_out_halves_it_on_all(photographs, tmp_path):
    flags = [*TINY, "--pictures", "0", "--steps", "1", "--cpu-threads", "1", "--data", str(photographs)]
    run_ranks("tests.engine.training.trial_worker", 2, None, "injected", str(tmp_path), *flags)
    log = (tmp_path / "auto" / "log.txt").read_text()
    assert "micro-batch 4 ran out of memory in a trial step on rank 1" in log
    assert "8 = 2 x 2 accumulation x 2 ranks" in log and set(losses(tmp_path / "auto")) == {1}


def failing(monkeypatch, error: BaseException) -> None:
    def step(*_):
        raise error

    monkeypatch.setattr(trial, "trial_step", step)


def test_none_is_left_below_one_and_faults_are_no_lack_of_memory(monkeypatch):
    plan = plan_of(recipe("demo", micro_batch=1))
    engine = SimpleNamespace(stage=2, module=None)
    failing(monkeypatch, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(UserError, match="memory ran out in a trial step with micro-batch 1, for which"):
        try_micro_batch(engine, plan, of_pretraining)
    failing(monkeypatch, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes"):
        try_micro_batch(engine, plan, of_pretraining)


def test_halving_keeps_pairs_together(monkeypatch):
    """Mixup pairs the images of a micro-batch: 12 is followed by 6, and that by 2."""
    failing(monkeypatch, torch.OutOfMemoryError("CUDA out of memory"))

    def in_pairs(_):
        return Footprint(parameters=1, image_bytes=1, pixel_bytes=1, group=2)

    found = []
    for micro in (12, 6):
        plan = plan_of(recipe("demo", batch_size=12, micro_batch=micro))
        with pytest.raises(TooLarge) as caught:
            try_micro_batch(SimpleNamespace(stage=2, module=None), plan, in_pairs)
        found.append(caught.value.smaller)
    assert found == [6, 2]


def test_under_zero_3_no_step_is_tried():
    said = try_micro_batch(SimpleNamespace(stage=3, module=None), plan_of(recipe("demo")), of_pretraining)
    assert "no trial step under ZeRO 3" in said


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("can't start new thread"), False),  # no limit of memory: one of processes
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("not enough memory"), False),
    ],
)
def test_what_lack_of_memory_is(error, is_one):
    assert is_out_of_memory(error) == is_one


def test_a_thread_that_cannot_begin_lacks_memory_where_addresses_are_limited():
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (2**45, hard))
    try:
        assert is_out_of_memory(RuntimeError("can't start new thread"))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_what_is_in_use_already_is_not_advised():
    text = str(
        explain(MemoryError(), plan_of(recipe("demo", activation_checkpointing="every")), of_pretraining, when="here")
    )
    assert "recompute" not in text and "checkpointing" not in text and "zero2" not in text and "\n" not in text


@pytest.mark.parametrize("value", ["autos", "-1", "1.5"])
def test_other_words_are_refused(value):
    with pytest.raises(UserError, match=r"micro.batch") as caught:
        parse_pretrain([f"--micro-batch={value}"])
    assert "\n" not in str(caught.value)
