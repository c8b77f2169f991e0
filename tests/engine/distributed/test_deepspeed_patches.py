"""A contract for each piece that is replaced inside DeepSpeed: its names are there, and the reason for it still holds.

A test of the second kind that fails says that upstream has mended something, and that our piece can go.
"""

from __future__ import annotations

import inspect
import tomllib
from importlib import metadata
from types import SimpleNamespace

import deepspeed
import pytest
import torch
from deepspeed.comm import comm
from deepspeed.comm.torch import build_shm_op
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups
from torch import nn

from mirl.engine.distributed import deepspeed_patches as patches
from mirl.errors import UserError
from tests.support.launch import CHECKOUT


def source(thing: object) -> str:
    return " ".join(inspect.getsource(thing).split())


def test_the_installed_version_is_tested_and_the_bound_of_the_package_admits_it():
    assert metadata.version("deepspeed") == patches.VERSION
    assert patches.is_tested() and patches.remark_on_version() == []
    dependencies = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert "deepspeed>=0.19.8,<0.20" in dependencies


def test_muon_still_compiles_as_it_is_imported():
    from deepspeed.runtime.zero.muon import original_muon

    assert "@compiler.compile()" in inspect.getsource(original_muon), "import_muon_uncompiled can go"
    assert not hasattr(original_muon.muon_update, "_torchdynamo_orig_callable"), "it was imported compiled after all"
    assert torch.compile.__module__ == "torch", "torch.compile was not put back"


def test_shared_memory_collectives_are_still_asked_for_by_name():
    patches.without_shared_memory_collectives()
    assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False
    assert "__compatible_ops__" in source(build_shm_op)
    assert build_shm_op() is None


def test_the_process_group_is_still_kept_for_the_life_of_the_process():
    """That a second run in one process trains is held by tests/test_docs.py."""
    assert "if _WORLD_GROUP is None" in source(groups._clone_world_group)
    assert hasattr(comm, "cdb") and "cdb" in source(comm.init_distributed)


def test_float32_accumulation_in_stage_1_still_builds_another_optimizer():
    text = source(DeepSpeedEngine._do_optimizer_sanity_check)
    assert "grad_accum_dtype == torch.float32" in text and "return BFLOAT16" in text, "gradient_types can go"
    given = {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}}
    assert patches.gradient_types(given, True)["data_types"] == {}
    assert patches.gradient_types(given, False) is given
    for other in ({"stage": 2}, {"stage": 1, "offload_optimizer": {"device": "cpu"}}):
        assert patches.gradient_types(given | {"zero_optimization": other}, True)["data_types"]


def test_zero_1_and_2_still_look_twice_for_gradients_that_are_not_finite():
    text = source(DeepSpeedZeroOptimizer.step)
    assert "if self.check_grad_overflow: self.check_overflow(" in text, "the replaced check_overflow is not called"
    assert "is_invalid_grad_norm(scaled_global_grad_norm): self.overflow = True" in text, "the norm decides no more"
    assert list(inspect.signature(DeepSpeedZeroOptimizer.check_overflow).parameters) == ["self", "partition_gradients"]


def test_a_skipped_step_with_offload_still_leaves_its_gradients():
    text = source(DeepSpeedZeroOptimizer.step)
    skipped = text[text.index("if self.overflow: if self.compute_grad_norm") :]
    assert "if self.cpu_offload: self.reset_cpu_buffers() else: for k in self.averaged_gradients" in skipped
    assert "averaged_gradients" not in source(DeepSpeedZeroOptimizer.reset_cpu_buffers), (
        "forget_gradients_of_skipped_step can go"
    )


def test_what_flat_gradients_replace_is_there_and_called():
    for name in ("overlapping_partition_gradients_reduce_epilogue", "reduce_gradients", "backward_epilogue"):
        assert callable(getattr(DeepSpeedZeroOptimizer, name))
        assert f"self.optimizer.{name}(" in source(DeepSpeedEngine), f"{name} is not what ends a backward pass"
    assert list(inspect.signature(DeepSpeedZeroOptimizer.scaled_global_norm).parameters) == ["self", "norm_type"]
    assert "self._grad_acc_hooks.append(register_grad_hook(" in source(DeepSpeedZeroOptimizer)
    text = source(DeepSpeedZeroOptimizer.step)
    assert "self.scaled_global_norm()" in text
    for name in ("averaged_gradients", "bit16_groups_flat", "round_robin_bit16_offsets", "round_robin_bit16_indices"):
        assert f"self.{name}" in source(DeepSpeedZeroOptimizer), f"FlatGradients reads {name}"
    assert 'getattr(grad_group, "flat_partition", None)' in source(DeepSpeedZeroOptimizer).replace("'", '"')


def test_state_that_checkpoints_need_is_where_we_look():
    assert "lazy_init_hp_params_optimizer_state(" in source(DeepSpeedZeroOptimizer._lazy_init_hp_params_optimizer_state)
    text = source(DeepSpeedZeroOptimizer_Stage3)
    assert "self.fp32_partitioned_groups_flat" in text


@pytest.mark.parametrize("stage", [2, 3])
def test_a_version_that_keeps_the_state_elsewhere_is_refused_by_name(stage, monkeypatch):
    monkeypatch.setattr(patches, "VERSION", "0.99.0")
    with pytest.raises(UserError, match=r"deepspeed is 0\.99\.0, whose .* has no .*pip install 'deepspeed>=0\.19\.8"):
        patches.require_state(SimpleNamespace(optimizer=None), stage, [nn.Parameter(torch.zeros(1))])


def test_a_version_that_was_not_tested_is_left_its_own_ways_and_says_so(monkeypatch):
    """That it trains the same losses is held by the cases of test_zero.py that end in -untested."""
    monkeypatch.setattr(patches, "VERSION", "0.19.9")
    (line,) = patches.remark_on_version()
    assert line.startswith("deepspeed 0.19.9 is not a version that this engine was tested with (0.19.8)")
    optimizer = object.__new__(DeepSpeedZeroOptimizer)
    optimizer.cpu_offload = False
    assert not patches.takes_flat_gradients(optimizer)
    patches.look_for_nonfinite_gradients(optimizer)
    assert "check_overflow" not in vars(optimizer) and optimizer.check_grad_overflow
