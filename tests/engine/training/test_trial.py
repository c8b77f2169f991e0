"""--micro-batch auto, and what is said when memory runs out."""

from __future__ import annotations

import dataclasses
import json
import random
import resource
from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from torch import nn

from mirl.engine.accounting.free_memory import FreeMemory
from mirl.engine.accounting.run_memory import Footprint
from mirl.engine.pretraining.command_line import parse_pretrain
from mirl.engine.pretraining.recipes import recipe
from mirl.engine.training import fitting, trial
from mirl.engine.training.fitting import fit_to_memory
from mirl.engine.training.out_of_memory import explain, is_out_of_memory
from mirl.engine.training.plan import make_plan
from mirl.engine.training.trial import TooLarge, try_micro_batch
from mirl.engine.transfer.dense import norms
from mirl.engine.transfer.detection.detector import Detector
from mirl.engine.transfer.detection.run import Detection
from mirl.engine.transfer.segmentation.run import Segmenting
from mirl.engine.transfer.segmentation.segmenter import Segmenter
from mirl.errors import UserError
from tests.engine.models.helpers import tiny_config
from tests.engine.training.test_fitting import ONE, of_pretraining, plan_of, resumed
from tests.support.launch import CHECKOUT


def engine_of(module: nn.Module) -> SimpleNamespace:
    return SimpleNamespace(stage=2, module=module)


def failing(monkeypatch, error: BaseException) -> None:
    def step(*_):
        raise error

    monkeypatch.setattr(trial, "trial_step", step)


def test_none_is_left_below_one_and_faults_are_no_lack_of_memory(monkeypatch):
    plan = plan_of(recipe("tiny", micro_batch=1))
    engine = engine_of(nn.Linear(1, 1))
    failing(monkeypatch, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(UserError, match="memory ran out in a trial step with micro-batch 1, for which"):
        try_micro_batch(engine, plan, of_pretraining, None)
    failing(monkeypatch, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes"):
        try_micro_batch(engine, plan, of_pretraining, None)


def test_halving_keeps_pairs_together(monkeypatch):
    """Mixup pairs the images of a micro-batch: 12 is followed by 6, and that by 2."""
    failing(monkeypatch, torch.OutOfMemoryError("CUDA out of memory"))

    def in_pairs(_):
        return Footprint(parameters=1, image_bytes=1, pixel_bytes=1, group=2)

    found = []
    for micro in (12, 6):
        plan = plan_of(recipe("tiny", batch_size=12, micro_batch=micro))
        with pytest.raises(TooLarge) as caught:
            try_micro_batch(engine_of(nn.Linear(1, 1)), plan, in_pairs, None)
        found.append(caught.value.smaller)
    assert found == [6, 2]


def test_under_zero_3_no_step_is_tried():
    said = try_micro_batch(SimpleNamespace(stage=3), plan_of(recipe("tiny")), of_pretraining, None)
    assert "no trial step under ZeRO 3" in said


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("could not create a primitive"), False),  # without a limit: oneDNN cannot do it
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
        assert is_out_of_memory(RuntimeError("could not create a primitive"))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_what_is_in_use_already_is_not_advised():
    text = str(
        explain(MemoryError(), plan_of(recipe("tiny", activation_checkpointing="every")), of_pretraining, when="here")
    )
    assert "recompute" not in text and "checkpointing" not in text and "zero2" not in text and "\n" not in text


@pytest.mark.parametrize("value", ["autos", "-1", "1.5", "0", "Auto", ""])
def test_other_words_are_refused(value):
    with pytest.raises(UserError, match=r"micro.batch") as caught:
        parse_pretrain([f"--micro-batch={value}"])
    assert "\n" not in str(caught.value)


def test_deepspeeds_file_and_auto_contradict_each_other(tmp_path):
    raw = json.loads((CHECKOUT / "ds_configs" / "zero2.json").read_text())
    (tmp_path / "own.json").write_text(json.dumps(raw | {"train_micro_batch_size_per_gpu": 4}))
    config = parse_pretrain(
        ["--micro-batch", "auto", "--deepspeed-config", str(tmp_path / "own.json"), "--out", str(tmp_path / "out")]
    )
    with ExitStack() as closing, pytest.raises(UserError, match="micro_batch is 'auto' and .*own.json sets") as caught:
        make_plan(config, ONE, closing, recipe_out="runs/pretrain")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_auto_given_anew_is_tried_anew_and_otherwise_the_number_of_the_checkpoint_stays(monkeypatch):
    monkeypatch.setattr(fitting, "free_memory", lambda *_: FreeMemory(2.0**40, "believed"))
    written, forgotten = (recipe("small_data", resume="auto", micro_batch=micro) for micro in ("auto", 0))
    assert fit_to_memory(plan_of(forgotten, reader=resumed(written, 32)), of_pretraining).micro_batch == 32
    assert fit_to_memory(plan_of(written, reader=resumed(written, 32)), of_pretraining).micro_batch == 512
    assert fit_to_memory(plan_of(written, reader=None), of_pretraining, at_most=100).micro_batch == 64


def test_past_what_the_machine_leaves_an_allocation_fails_in_place_of_the_kernels_kill(monkeypatch):
    held = psutil.Process().memory_info().rss
    monkeypatch.setattr(trial, "free_host_memory", lambda *_, **__: FreeMemory(held + 100 * 2**20, "believed"))
    sizes = []

    def step(_, micro, *__):
        sizes.append(torch.empty(micro * 10 * 2**20, dtype=torch.uint8).numel())

    monkeypatch.setattr(trial, "trial_step", step)
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    with pytest.raises(TooLarge, match="micro-batch 32 ran out of memory in a trial step") as caught:
        try_micro_batch(engine_of(nn.Linear(1, 1)), plan_of(recipe("tiny", micro_batch=32)), of_pretraining, None)
    assert caught.value.smaller == 16 and not sizes
    assert resource.getrlimit(resource.RLIMIT_DATA) == limits
    plan = plan_of(recipe("tiny", micro_batch=4))
    assert "micro-batch 4: a trial step fits" in try_micro_batch(engine_of(nn.Linear(1, 1)), plan, of_pretraining, None)
    assert len(sizes) == 1


@pytest.mark.parametrize("kind", ["segment", "detect"])
def test_a_trial_passes_through_the_heads_waits_for_nobody_and_leaves_everything_as_it_was(kind, monkeypatch):
    config = dataclasses.replace(tiny_config(depth=6, segments=2, patch_size=8), image_height=40, image_width=64)
    seen = []
    if kind == "segment":
        model, run, head = Segmenter(config, num_classes=3, drop_path=0.1), Segmenting(), "decode_head.conv_seg"
    else:
        model, run, head = (
            Detector(config, classes=3, channels=8, regions=8, proposals=20, drop_path=0.1),
            Detection(),
            "roi_heads",
        )
    named = dict(model.named_modules())
    (named[head] if kind == "segment" else named["roi_heads.mask_head"]).register_forward_hook(
        lambda *_: seen.append(head)
    )
    monkeypatch.setattr(norms, "_ranks", lambda: 2)  # and no process group: a collective would fail
    before = {name: tensor.clone() for name, tensor in model.state_dict(keep_vars=False).items()}
    before |= {name: buffer.clone() for name, buffer in model.named_buffers()}
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    plan = plan_of(recipe("tiny", micro_batch=2))
    said = try_micro_batch(engine_of(model), plan, of_pretraining, partial(run.trial_loss, plan, model))
    assert "fits into memory" in said and seen == [head]
    for name, tensor in [*model.state_dict().items(), *model.named_buffers()]:
        assert torch.equal(tensor, before[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1]) and random.getstate() == states[2]
