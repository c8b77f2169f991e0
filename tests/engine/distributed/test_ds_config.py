"""The DeepSpeed JSON against our configuration."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from mirl.engine.configuration.config import OptimConfig
from mirl.engine.distributed.ds_config import NAMES, read_ds_config, resolve_batch, resolve_ds_config, resolve_precision
from mirl.engine.pretraining.recipes import recipe
from mirl.errors import UserError

CPU = torch.device("cpu")


def config(**changes):
    demo = recipe("demo")
    run = dataclasses.replace(demo.run, **{key: value for key, value in changes.items() if hasattr(demo.run, key)})
    optim = dataclasses.replace(
        demo.optim, **{key: value for key, value in changes.items() if hasattr(demo.optim, key)}
    )
    return dataclasses.replace(demo, run=run, optim=optim)


def resolve(values: dict, resolved_precision: str = "bf16", **changes):
    """``changes`` are fields of the run and optimiser sections."""
    return resolve_ds_config(
        values, config(**changes), micro_batch=32, accumulation=1, precision=resolved_precision, device=CPU
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_file_resolves_with_nothing_left_to_guess(name):
    values = read_ds_config(name)
    resolved = resolve(values)
    assert "auto" not in json.dumps(resolved)
    assert resolved["train_batch_size"] == 32
    assert resolved["bf16"] == {"enabled": True}
    assert resolved["data_types"]["grad_accum_dtype"] == "fp32"
    assert resolved["gradient_clipping"] == config().optim.clip_grad
    assert values == read_ds_config(name)  # the caller's object is left alone


def test_a_name_a_shipped_path_and_a_file_are_read(tmp_path, monkeypatch):
    mine = tmp_path / "mine.json"
    mine.write_text('{"zero_optimization": {"stage": 1}}')
    monkeypatch.chdir(tmp_path)
    assert read_ds_config("mine.json") == {"zero_optimization": {"stage": 1}}
    assert read_ds_config("ds_configs/zero3.json") == read_ds_config("zero3")
    mine.write_text("[1]")
    with pytest.raises(UserError, match="holds a list, not a JSON object"):
        read_ds_config("mine.json")


STAGE = {"zero_optimization": {"stage": 2}}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (STAGE | {"train_batch_size": 64}, "train_batch_size 64 and batch_size is 32"),
        (STAGE | {"train_micro_batch_size_per_gpu": 8}, "train_micro_batch_size_per_gpu 8 and micro_batch is 32"),
        (STAGE | {"gradient_clipping": 0.5}, "gradient_clipping 0.5 and clip_grad is 1.0"),
        (STAGE | {"optimizer": {"type": "AdamW"}}, "has a section 'optimizer': remove it and use --base-lr"),
        (STAGE | {"scheduler": {"type": "WarmupLR"}}, "has a section 'scheduler'"),
        (STAGE | {"fp16": {"enabled": True}}, "has a section 'fp16'"),
        (STAGE | {"bf16": {"enabled": True}}, "bf16.enabled True and precision is fp32"),
        ({}, "zero_optimization.stage None: give 1, 2 or 3"),
        ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage 0"),
        (
            {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}},
            '"auto" for zero_optimization.reduce_bucket_size',
        ),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, "only offload_optimizer to cpu"),
    ],
)
def test_what_disagrees_is_refused_by_both_names(values, message):
    with pytest.raises(UserError) as caught:
        resolve(values, "fp32", deepspeed_config="mine.json", precision="fp32")
    assert message in str(caught.value)
    assert "mine.json" in str(caught.value)


def test_a_disabled_section_is_no_conflict():
    assert resolve(STAGE | {"fp16": {"enabled": False}})["zero_optimization"]["stage"] == 2


def test_the_effective_batch_is_shared_equally():
    base = config()

    def share(batch: int, micro: int, ranks: int) -> tuple[int, int]:
        optim = dataclasses.replace(base.optim, batch_size=batch, micro_batch=micro)
        return resolve_batch(dataclasses.replace(base, optim=optim), ranks)

    assert share(4096, 0, 8) == (512, 1)
    assert share(4096, 64, 8) == (64, 8)
    with pytest.raises(UserError, match="batch_size is 30 and there are 4 ranks"):
        share(30, 0, 4)
    with pytest.raises(UserError, match="micro_batch is 3 and each of 2 ranks has 16 images"):
        share(32, 3, 2)


def test_the_learning_rate_follows_the_batch():
    assert OptimConfig(batch_size=4096, epochs=300).peak_lr == pytest.approx(2.4e-3)
    assert OptimConfig(batch_size=512, epochs=300, lr=1e-3).peak_lr == 1e-3


def test_precision_follows_the_device_unless_it_is_asked_for():
    assert resolve_precision("fp32", CPU) == ("fp32", "as asked")
    expected = "bf16" if torch.cpu._is_amx_tile_supported() else "fp32"
    assert resolve_precision("auto", CPU)[0] == expected
