"""The DeepSpeed JSON against our configuration."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest
import torch

from mirl.engine.configuration.config import OptimConfig
from mirl.engine.distributed.ds_config import NAMES, read_ds_config, resolve_batch, resolve_ds_config, resolve_precision
from mirl.engine.pretraining.recipes import recipe
from mirl.errors import UserError
from tests.support.runs import ENTRY, TINY

CPU = torch.device("cpu")


def config(**changes):
    demo = recipe("tiny")
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
FILES = {
    b"\xef\xbb\xbf" + json.dumps(STAGE).encode(): None,
    json.dumps(STAGE).encode("utf-16"): None,
    b'{"zero_optimization": {"stage": 2},\n "note": "caf\xe9"}': "is not UTF-8 text: byte 0xe9 in line 2; save it as",
    b'{ // zero\n "zero_optimization": {"stage": 2}}': "is not JSON: Expecting property name .*JSON has no comments",
    b'{"zero_optimization": {"stage": 2},}': "is not JSON: Expecting property name",
    b"": "is not JSON: Expecting value",
    b"[" * 100_000: "is not JSON: ",
    b'{"zero_optimization": 2}': r'has zero_optimization 2: give an object, e.g. {"stage": 2}',
    b'{"zero_optimization": [2]}': r"has zero_optimization \[2\]: give an object",
    b'{"zero_optimization": null}': "has zero_optimization null: give an object",
    b'{"zero_optimization": {"stage": "2"}}': 'has zero_optimization.stage "2": give the number 1, 2 or 3',
    b'{"zero_optimization": {"stage": true}}': "has zero_optimization.stage true: give the number",
    b'{"bf16": true}': r'has bf16 true: give an object, e.g. {"enabled": true}',
    b'{"bf16": {"enabled": "yes"}}': 'has bf16.enabled "yes": give true, false or "auto"',
    b'{"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}': 'offload_optimizer "cpu": give an object, e.g.',
    b'{"zero_optimization": {"stage": 2, "offload_param": true}}': "offload_param true: give an object, or leave it",
    b'{"data_types": "fp32"}': 'has data_types "fp32": give an object',
    b'{"gradient_clipping": NaN}': "holds NaN: give a finite number",
    b'{"bf16": {"enabled": true}, "bf16": {"enabled": false}}': "holds 'bf16' twice in one object",
}


@pytest.mark.parametrize(("content", "message"), FILES.items(), ids=[key[:50].decode("latin-1") for key in FILES])
def test_a_file_of_another_kind_is_read_or_refused_in_one_line(content, message, tmp_path):
    path = tmp_path / "mine.json"
    path.write_bytes(content)
    if message is None:
        assert read_ds_config(str(path)) == STAGE
        return
    with pytest.raises(UserError, match=f"^deepspeed_config .*mine.json .*{message}") as caught:
        read_ds_config(str(path))
    assert "\n" not in str(caught.value)


def test_null_says_that_there_is_no_offload(tmp_path):
    (tmp_path / "mine.json").write_text('{"zero_optimization": {"stage": 2, "offload_optimizer": null}}')
    assert resolve(read_ds_config(str(tmp_path / "mine.json")))["zero_optimization"]["stage"] == 2


def test_what_only_deepspeed_refuses_is_one_line_too(photographs, tmp_path, run):
    (tmp_path / "mine.json").write_text('{"zero_optimization": {"stage": 2, "reduce_bucket_size": "large"}}')
    flags = [*TINY, "--data", photographs, "--steps", "1", "--out", "out", "--deepspeed_config", "mine.json"]
    ended = run(sys.executable, ENTRY, *flags)
    assert ended.returncode == 2, ended.stderr[-2000:]
    assert "reduce_bucket_size is 'large'" in ended.stderr and "Traceback" not in ended.stderr


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
