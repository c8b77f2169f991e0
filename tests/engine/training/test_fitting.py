"""The micro-batch that fits: chosen, kept, refused, on all ranks alike, and in real runs under a memory limit."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mirl.engine.accounting.free_memory import FreeMemory
from mirl.engine.accounting.machines import ROOM_ON_CPU, micro_batches
from mirl.engine.accounting.run_memory import classifier_footprint, pretraining_footprint
from mirl.engine.distributed.ds_config import read_ds_config, resolve_batch, resolve_ds_config
from mirl.engine.distributed.launch import Ranks
from mirl.engine.models import model_config
from mirl.engine.pretraining.recipes import recipe
from mirl.engine.training import fitting
from mirl.engine.training.fitting import fit_to_memory
from mirl.engine.training.plan import RunPlan
from mirl.engine.transfer.classification.classifier import encoder_config
from mirl.engine.transfer.classification.recipes import finetune_recipe
from mirl.errors import UserError
from tests.support.limits import under_ulimit
from tests.support.runs import ENTRY

GIB = 2**30
CPU = torch.device("cpu")
ONE = Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1, device=CPU)


class Two(Ranks):
    """The first of two ranks; the other one has ``other`` bytes free."""

    def gather(self, value):
        return [value, FreeMemory(3 * GIB, "free on the other host")] if isinstance(value, FreeMemory) else [value] * 2

    def broadcast(self, value):
        return value


def plan_of(config, ranks: Ranks = ONE, reader=None) -> RunPlan:
    micro, accumulation = resolve_batch(config, ranks.world_size)
    ds_config = resolve_ds_config(
        read_ds_config("zero2"), config, micro_batch=micro, accumulation=accumulation, precision="fp32", device=CPU
    )
    return RunPlan(
        config=config, ranks=ranks, out=Path("none"), micro_batch=micro, accumulation=accumulation,
        micro_batch_given=bool(config.optim.given_micro_batch), ds_config=ds_config, precision="fp32",
        precision_reason="", reader=reader, lock=None, remarks=["first"],
    )  # fmt: skip


def of_pretraining(plan):
    return pretraining_footprint(plan.config, plan.precision, on_gpu=False)


def of_finetuning(plan):
    model = encoder_config(model_config("vit_s"))
    return classifier_footprint(model, 10, "fp32", on_gpu=False, averaged=True, paired=bool(plan.config.finetune.mixup))


@pytest.fixture
def free(monkeypatch):
    def set_to(gib: float) -> None:
        monkeypatch.setattr(fitting, "free_memory", lambda *_: FreeMemory(gib * GIB, "free on this machine"))

    return set_to


def resumed(config, micro: int) -> SimpleNamespace:
    """A checkpoint of a run of ``config``, as a plan sees it."""
    return SimpleNamespace(state={"config": config.to_dict(), "micro_batch": micro, "world_size": 1})


def test_micro_batches_divide_the_share():
    assert micro_batches(12) == [12, 6, 4, 3, 2, 1]
    assert micro_batches(12, 2) == [12, 6, 4, 2]
    assert micro_batches(9, 2) == [9, 3, 1]  # nothing is even: mixup refuses it in its own words


@pytest.mark.parametrize("gib", [4, 8, 23, 200])
def test_the_largest_that_fits_is_chosen_and_the_batch_stays(free, gib):
    free(gib)
    plan = plan_of(recipe("small_data"))
    fitted = fit_to_memory(plan, of_pretraining)
    need = fitting.Need(plan, of_pretraining)
    assert fitted.micro_batch * fitted.accumulation == 512
    assert fitted.ds_config["train_batch_size"] == 512
    assert fitted.ds_config["train_micro_batch_size_per_gpu"] == fitted.micro_batch
    assert fitted.ds_config["gradient_accumulation_steps"] == fitted.accumulation
    assert need(fitted.micro_batch) <= ROOM_ON_CPU * gib * GIB
    if fitted.micro_batch < 512:
        assert need(2 * fitted.micro_batch) > ROOM_ON_CPU * gib * GIB
        assert f"in {fitted.accumulation} micro-batches" in fitted.remarks[-1]
    assert fitted.remarks[0] == "first" and f"micro-batch {fitted.micro_batch}, {gib}.0 GiB" in fitted.remarks[-1]


def test_the_rank_with_the_least_decides(free):
    free(100)
    two = Two(rank=0, world_size=2, local_rank=0, local_world_size=1, device=CPU)
    fitted = fit_to_memory(plan_of(recipe("small_data"), two), of_pretraining)
    assert fitted.micro_batch < 256 and "other host" in fitted.remarks[-1]
    assert fitted.micro_batch * fitted.accumulation == 256


def test_a_given_micro_batch_is_kept_warned_of_or_refused(free):
    config = recipe("small_data", micro_batch=128)
    plan = plan_of(config)
    need = fitting.Need(plan, of_pretraining)(128) / GIB
    free(2 * need)
    assert "warning" not in fit_to_memory(plan, of_pretraining).remarks[-1]
    free(need / 1.05)
    fitted = fit_to_memory(plan, of_pretraining)
    assert fitted.micro_batch == 128 and fitted.remarks[-1].startswith("warning: memory")
    free(need / 1.2)
    with pytest.raises(
        UserError, match=r"memory is .* GiB \(free on this machine\) and the run needs about .* GiB with"
    ):
        fit_to_memory(plan, of_pretraining)


def test_every_way_out_that_is_named_fits(free):
    free(3)
    with pytest.raises(UserError) as caught:
        fit_to_memory(plan_of(recipe("small_data", model="vit_b_24", micro_batch=64)), of_pretraining)
    assert "--model vit_s --micro-batch 1" in str(caught.value) and "\n" not in str(caught.value)
    free(4)
    with pytest.raises(UserError) as caught:
        fit_to_memory(plan_of(recipe("small_data", micro_batch=256)), of_pretraining)
    ways = re.search(r": give (.*)", str(caught.value))[1].split(", or ")
    assert len(ways) == 3
    from mirl.engine.pretraining.command_line import parse_pretrain

    for way in ways:
        config = parse_pretrain(["--recipe", "small_data", "--micro-batch", "256", *way.split()])
        fit_to_memory(plan_of(config), of_pretraining)  # raises nothing


def test_nothing_fits_and_it_says_so(free):
    free(1)
    with pytest.raises(UserError, match="even with micro-batch 1: give a smaller --model or --image-size"):
        fit_to_memory(plan_of(recipe("small_data")), of_pretraining)


def test_mixed_pairs_want_an_even_micro_batch(free):
    free(2.6)
    config = finetune_recipe("small_data", batch_size=18, checkpoint="x", drop_path=0.0, mixup=0.8, cutmix=1.0)
    config = dataclasses.replace(config, model=encoder_config(model_config("vit_s")))
    assert fit_to_memory(plan_of(config), of_finetuning).micro_batch == 2
    plain = dataclasses.replace(config, finetune=dataclasses.replace(config.finetune, mixup=0.0, cutmix=0.0))
    assert fit_to_memory(plan_of(plain), of_finetuning).micro_batch in (1, 3)


def test_a_resumed_run_keeps_its_micro_batch(free):
    free(100)
    config = recipe("small_data", resume="auto")
    fitted = fit_to_memory(plan_of(config, reader=resumed(config, 32)), of_pretraining)
    assert fitted.micro_batch == 32 and "of the checkpoint is kept" in fitted.remarks[-1]
    old = resumed(config, 32)
    del old.state["micro_batch"]  # written before it was recorded: the whole share
    assert fit_to_memory(plan_of(config, reader=old), of_pretraining).micro_batch == 512
    free(4)
    assert fit_to_memory(plan_of(config, reader=resumed(config, 512)), of_pretraining).micro_batch < 512
    mixed = finetune_recipe("small_data", resume="auto", checkpoint="x", mixup=0.8, batch_size=128)
    mixed = dataclasses.replace(mixed, model=encoder_config(model_config("vit_s")))
    with pytest.raises(UserError, match=r"with micro-batch 128: give --micro-batch"):
        fit_to_memory(plan_of(mixed, reader=resumed(mixed, 128)), of_finetuning)


# --- real runs

SMALL = [
    "--recipe", "small_data", "--image-size", "64", "--patch-size", "4", "--depth", "8", "--width", "128", "--heads",
    "4", "--decoder-width", "64", "--decoder-heads", "4", "--steps", "1", "--precision", "fp32", "--batch-size", "128",
    "--log-every", "1", "--pictures", "0", "--no-tensorboard", "--loader-threads", "1", "--out", "out",
]  # fmt: skip


def chosen(output: str) -> tuple[int, int]:
    """Micro-batch and accumulation that a run told."""
    found = re.search(r"effective batch 128 = (\d+) x (\d+) accumulation", output)
    assert found, output[-3000:]
    return int(found[1]), int(found[2])


def test_a_run_fits_itself_into_a_limit(run, photographs, tmp_path):
    """The command runs, its step in several micro-batches; it is refused where it is told to take them at once.

    tests/systems/test_memory_limit.py has both in a control group.
    """
    flags = [sys.executable, ENTRY, "--data", str(write_more(photographs, tmp_path)), *SMALL]
    prefix = under_ulimit(int(6.5 * GIB))
    done = run(*prefix, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    micro, accumulation = chosen(done.stdout)
    assert micro < 128 and micro * accumulation == 128
    assert f"in {accumulation} micro-batches" in done.stdout and "step 1/1" in done.stdout
    refused = run(*prefix, *flags[:-1], "other", "--micro-batch", "128")
    assert refused.returncode == 2, refused.stdout[-2000:]
    (line,) = [text for text in refused.stderr.splitlines() if text.startswith("error: ")]
    assert "with micro-batch 128: give --micro-batch" in line


def write_more(photographs: Path, folder: Path) -> Path:
    """The photographs three times under other names: a step of 128."""
    target = folder / "photographs"
    target.mkdir()
    for copy in range(3):
        for path in photographs.glob("*.jpg"):
            (target / f"{copy}-{path.name}").symlink_to(path)
    return target
