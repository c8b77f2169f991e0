"""A contract for each piece that is replaced inside DeepSpeed: its names are there, and the reason for it still holds.

The reason is shown on a tiny model by DeepSpeed as it is, without our piece. Such a test that fails says that upstream
has mended something, and that the piece can go.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import tomllib
from importlib import metadata
from types import SimpleNamespace

import deepspeed
import pytest
import torch
from deepspeed.comm.torch import build_shm_op
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import nn

import mirl
from mirl.engine.distributed import deepspeed_patches as patches
from mirl.engine.distributed.ds_config import resolve_ds_config
from mirl.engine.distributed.ds_engine import KINDS, TrainEngine
from mirl.errors import UserError
from tests.support.launch import CHECKOUT
from tests.support.runs import TINY, losses

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
REPLACED = ("reduce_gradients", "overlapping_partition_gradients_reduce_epilogue", "backward_epilogue")


@pytest.fixture(scope="module", autouse=True)
def process_group():
    begin_group()
    patches.forget_process_group_of_earlier_run()  # of another module of tests in this process
    with pytest.MonkeyPatch.context() as environment:
        for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
            environment.setenv(name, value)
        # ZeRO 3 puts another in its place for the rest of the process; later tests get torch's back.
        environment.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)
        yield
    torch.distributed.destroy_process_group()


def begin_group() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)


def settings(stage: int, *, bf16: bool = False, **others: object) -> dict:
    zero = {"stage": stage} | {key: others.pop(key) for key in list(others) if key == "offload_optimizer"}
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 1.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": bf16},
    } | others


def model_and_optimizer() -> tuple[nn.Module, torch.optim.Optimizer]:
    """Two layers, weights in one group and biases in another, as in training."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    groups = [{"params": [p for p in model.parameters() if p.dim() == dim]} for dim in (2, 1)]
    return model, torch.optim.AdamW(groups, lr=1e-2)


def inputs(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).to(dtype)


def plain_engine(config: dict) -> DeepSpeedEngine:
    """DeepSpeed without what we replace in its engine and its optimiser."""
    patches.without_shared_memory_collectives()
    model, optimizer = model_and_optimizer()
    return patches.deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]


def source(thing: object) -> str:
    return " ".join(inspect.getsource(thing).split())


def test_the_installed_version_is_tested_and_the_bound_of_the_package_admits_it():
    assert metadata.version("deepspeed") == patches.VERSION
    assert patches.is_tested() and patches.remark_on_version() == []
    dependencies = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert "deepspeed>=0.19.8,<0.20" in dependencies
    assert patches.DEEPSPEED_INSTALL == "pip install 'deepspeed>=0.19.8,<0.20'"


def test_muon_still_compiles_as_it_is_imported(monkeypatch):
    from deepspeed.runtime.zero.muon import original_muon

    assert not hasattr(original_muon.muon_update, "_torchdynamo_orig_callable"), "it was imported compiled after all"
    assert torch.compile.__module__ == "torch", "torch.compile was not put back"
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    importlib.reload(original_muon)
    assert compiled, "import_muon_uncompiled can go"


def test_shared_memory_collectives_are_still_built_for_training(monkeypatch):
    patches.without_shared_memory_collectives()
    assert build_shm_op() is None
    built = []
    builder = SimpleNamespace(NAME="deepspeed_shm_comm", load=lambda: built.append(1), absolute_name=lambda: "shm")
    accelerator = SimpleNamespace(create_op_builder={"ShareMemCommBuilder": builder}.get)
    monkeypatch.setitem(build_shm_op.__globals__, "get_accelerator", lambda: accelerator)
    build_shm_op()
    assert not built, "the table of operators that can be built is not asked"
    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", True)
    build_shm_op()
    assert built, "without_shared_memory_collectives can go"


def test_the_process_group_of_an_earlier_run_is_still_kept(monkeypatch):
    TrainEngine(*model_and_optimizer(), settings(2))
    torch.distributed.destroy_process_group()
    begin_group()
    with monkeypatch.context() as without:
        without.setattr(patches, "forget_process_group_of_earlier_run", lambda: None)
        with pytest.raises(ValueError, match="Group .* is not registered"):
            TrainEngine(*model_and_optimizer(), settings(2))
    TrainEngine(*model_and_optimizer(), settings(2))


def test_float32_accumulation_in_stage_1_still_builds_another_optimizer():
    config = settings(1, bf16=True, data_types={"grad_accum_dtype": "fp32"})
    assert type(plain_engine(config).optimizer) is BF16_Optimizer, "gradient_types can go"
    assert type(plain_engine(patches.gradient_types(config, True)).optimizer) is DeepSpeedZeroOptimizer
    assert patches.gradient_types(config, False) is config
    for other in ({"stage": 2}, {"stage": 1, **OFFLOAD}):
        assert patches.gradient_types(config | {"zero_optimization": other}, True)["data_types"]


def test_zero_1_and_2_still_look_twice_for_gradients_that_are_not_finite(monkeypatch):
    looks = []
    check = DeepSpeedZeroOptimizer.check_overflow
    monkeypatch.setattr(
        DeepSpeedZeroOptimizer, "check_overflow", lambda self, *args, **kw: looks.append(1) or check(self, *args, **kw)
    )
    engine = plain_engine(settings(2))
    engine.optimizer.check_grad_overflow = True
    for ours in (False, True):
        if ours:
            patches.look_for_nonfinite_gradients(engine.optimizer)
        engine.backward(engine(inputs() * float("nan")).sum())
        engine.step()
        assert engine.optimizer.overflow, "the norm alone does not skip a step"
        assert len(looks) == 1, "look_for_nonfinite_gradients can go" if not ours else "it was not replaced"


def test_a_skipped_step_with_offload_still_leaves_its_gradients():
    engine = plain_engine(settings(2, bf16=True, data_types={"grad_accum_dtype": "fp32"}, **OFFLOAD))
    engine.optimizer.check_grad_overflow = True
    skipped = []
    for scale in (float("nan"), 1.0, 1.0):
        if len(skipped) == 2:
            patches.forget_gradients_of_skipped_step(engine.optimizer)
        engine.backward((engine(inputs(torch.bfloat16)) * scale).sum())
        engine.step()
        skipped.append(engine.optimizer.overflow)
    assert skipped[:2] == [True, True], "forget_gradients_of_skipped_step can go"
    assert not skipped[2]


def test_what_flat_gradients_replace_is_there_and_called(monkeypatch):
    for name in REPLACED:
        assert f"self.optimizer.{name}(" in source(DeepSpeedEngine), f"{name} is not what ends a backward pass"
    assert list(inspect.signature(DeepSpeedZeroOptimizer.scaled_global_norm).parameters) == ["self", "norm_type"]
    engine = TrainEngine(*model_and_optimizer(), settings(2))
    optimizer = engine._optimizer
    assert len(optimizer._grad_acc_hooks) == 4
    calls = []
    for name in ("backward_epilogue", "scaled_global_norm"):
        ours = getattr(optimizer, name)
        monkeypatch.setattr(
            optimizer, name, lambda *args, _ours=ours, _name=name, **kw: calls.append(_name) or _ours(*args, **kw)
        )
    given = []
    apply = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a: given.append(gradients(self)) or apply(self, *a))
    model = model_and_optimizer()[0]
    wanted = torch.autograd.grad(model(inputs()).square().mean(), list(model.parameters()))
    engine.backward(engine.forward(inputs()).square().mean())
    assert engine.step(1e-2)
    assert calls == ["backward_epilogue", "scaled_global_norm"]
    norm = torch.cat([gradient.flatten() for gradient in wanted]).norm()
    assert engine.gradient_norm() == pytest.approx(norm.item(), rel=1e-5)
    assert norm < 1  # so that nothing was clipped
    for dim, found in zip((2, 1), given, strict=True):
        expected = torch.cat([gradient.flatten() for gradient in wanted if gradient.dim() == dim])
        assert torch.allclose(found[: len(expected)], expected, rtol=1e-6)


def gradients(optimizer: torch.optim.Optimizer) -> torch.Tensor:
    (group,) = optimizer.param_groups
    return group["params"][0].grad.clone()


def test_a_step_still_takes_several_passes_over_the_state(monkeypatch):
    """DeepSpeed hands torch a gradient in float32, whatever the weights are, and reads the norm before it."""
    whole = source(DeepSpeedZeroOptimizer.step)
    assert "flat_grad_partition.to(self.single_partition_of_fp32_groups[i].dtype)" in whole, "step_in_one_pass can go"
    assert "bit16_partitions[partition_id].data.copy_(fp32_partition.data)" in whole, "step_in_one_pass can go"
    assert whole.index("is_invalid_grad_norm(scaled_global_grad_norm)") < whole.index("self._optimizer_step(i)")
    # What ours does in its place, and what the engine reads afterwards.
    gather = "all_gather_dp_groups(groups_flat=self.bit16_groups_flat, partitioned_param_groups="
    assert gather + "self.parallel_partitioned_bit16_groups, dp_process_group=self.real_dp_process_group" in whole
    for line in ("self.micro_step_id = INITIAL_MICRO_STEP_ID", "self.averaged_gradients[i] = None"):
        assert line in whole
    taken = source(DeepSpeedEngine._take_model_step)
    assert "self.optimizer.step()" in taken and "self._global_grad_norm = self.optimizer._global_grad_norm" in taken
    engine = TrainEngine(*model_and_optimizer(), settings(2, bf16=True))
    engine.step_in_one_pass(True)
    called = []
    apply = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a: called.append(1) or apply(self, *a))
    monkeypatch.setattr(DeepSpeedZeroOptimizer, "step", lambda self, *a: called.append(2))
    engine.backward(engine.forward(inputs(torch.bfloat16)).square().mean())
    assert engine.step(1e-2) and not called
    assert all(gradient is None for gradient in engine._optimizer.averaged_gradients.values())


WALKS = ("_update_model_bit16_weights", "free_grad_in_param_list", "zero_grad")


def test_a_step_still_walks_over_all_parameters(monkeypatch):
    walks: set[str] = set()
    for name in WALKS:
        real = getattr(DeepSpeedZeroOptimizer, name)
        monkeypatch.setattr(
            DeepSpeedZeroOptimizer,
            name,
            lambda *args, _real=real, _name=name, **kw: walks.add(_name) or _real(*args, **kw),
        )
    engine = plain_engine(settings(2))
    walks.clear()
    engine.backward(engine(inputs()).square().mean())
    engine.step()
    assert walks == set(WALKS), "spare_walks_over_parameters can go, or a part of it"
    engine = TrainEngine(*model_and_optimizer(), settings(2))
    walks.clear()
    engine.backward(engine.forward(inputs()).square().mean())
    assert engine.step(1e-2) and not walks and engine.remarks == []


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_without_the_walks_weights_are_equal_and_nothing_moves(stage, bf16, accumulation, monkeypatch):
    dtype = torch.bfloat16 if bf16 else torch.float32
    config = settings(stage, bf16=bf16, gradient_accumulation_steps=accumulation)
    weights = []
    for walks in (True, False):
        with monkeypatch.context() as context:
            if walks:
                context.setattr(patches, "spare_walks_over_parameters", lambda optimizer: True)
            engine = TrainEngine(*model_and_optimizer(), config)
        places = [parameter.data_ptr() for parameter in engine.module.parameters()]
        for step in range(5):
            for micro in range(accumulation):
                scale = float("nan") if (step, micro) == (2, 0) else 1.0  # one step is skipped
                engine.backward((engine.forward(inputs(dtype) * (micro + 1)) * scale).square().mean())
                engine.step(1e-2)
        assert [parameter.data_ptr() for parameter in engine.module.parameters()] == places
        assert all(parameter.grad is None for parameter in engine.module.parameters())
        weights.append([parameter.detach().clone() for parameter in engine.module.parameters()])
    assert all(map(torch.equal, *weights))
    assert not any(map(torch.equal, weights[0], [p.to(dtype) for p in model_and_optimizer()[0].parameters()]))


def test_parameters_that_lie_elsewhere_keep_the_walks():
    optimizer = TrainEngine(*model_and_optimizer(), settings(2), flat_gradients=False)._optimizer
    assert optimizer.bit16_groups[0][1].data_ptr() != optimizer.bit16_groups_flat[0].data_ptr()
    optimizer.bit16_groups[0][1].data = optimizer.bit16_groups[0][1].data.clone()
    assert not patches.spare_walks_over_parameters(optimizer)
    assert not set(WALKS) & set(vars(optimizer))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_timer_of_deepspeed_still_waits_for_the_device_and_is_off(stage, monkeypatch):
    """On a CPU the wait does nothing, but it is asked for by the same call."""
    config = resolve_ds_config(
        {"zero_optimization": {"stage": stage}, "train_batch_size": "auto"},
        mirl.recipe("tiny", batch_size=4), micro_batch=4, accumulation=1, precision="fp32", device=torch.device("cpu"),
    )  # fmt: skip
    waits: list[int] = []
    accelerator = type(deepspeed.accelerator.get_accelerator())
    monkeypatch.setattr(accelerator, "synchronize", lambda self, device_index=None: waits.append(1))
    for timers in ({}, {"timers": config["timers"]}):
        engine = TrainEngine(*model_and_optimizer(), settings(stage) | timers)
        waits.clear()
        for _ in range(4):  # the first two steps are not timed
            engine.backward(engine.forward(inputs()).square().mean())
            engine.step(1e-2)
        assert bool(waits) == (not timers), "DeepSpeed's timer waits no more: the default can go"


class OnDevice:
    """A number that a step may do nothing with but fetch it, once."""

    def __init__(self, number: torch.Tensor) -> None:
        self.number, self.fetched = number, 0

    def cpu(self) -> torch.Tensor:
        self.fetched += 1
        return self.number


@pytest.mark.parametrize("clip", [0.0, 1e-3])
@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_fetches_one_number_from_the_device(stage, clip, monkeypatch):
    norms = []
    real = patches.FlatGradients.norm
    monkeypatch.setattr(patches.FlatGradients, "norm", lambda *args: norms.append(OnDevice(real(*args))) or norms[-1])
    engine = TrainEngine(*model_and_optimizer(), settings(stage) | {"gradient_clipping": clip})
    for scale, applied in ((1.0, True), (float("nan"), False), (1.0, True)):
        engine.backward((engine.forward(inputs()) * scale).square().mean())
        assert engine.step(1e-2) is applied
        engine.gradient_norm()
    assert [norm.fetched for norm in norms] == [1, 1, 1]


def test_moments_of_all_but_the_first_group_are_still_not_linked():
    engine = plain_engine(settings(2))
    mappings = {name: parameter._hp_mapping for name, parameter in engine.module.named_parameters()}
    assert not any(mapping.optim_fragment for mapping in mappings.values()), "there is something to load into at once"
    engine.backward(engine(inputs()).sum())
    engine.step()
    linked = {name for name, mapping in mappings.items() if mapping.optim_fragment}
    assert linked == {"0.weight", "2.weight"}, "DeepSpeed links every group: make_moments need not"


@pytest.mark.parametrize("stage", [1, 2])
def test_state_of_zero_1_and_2_is_live_and_complete(stage):
    engine = TrainEngine(*model_and_optimizer(), settings(stage))
    parameters = dict(engine.module.named_parameters())
    found = {(fragment.name, fragment.kind): fragment for fragment in engine.fragments()}
    assert set(found) == {(name, kind) for name in parameters for kind in KINDS}
    for (name, kind), fragment in found.items():
        assert (fragment.start, fragment.tensor.numel()) == (0, parameters[name].numel())
        assert torch.equal(fragment.tensor, parameters[name].flatten()) == (kind == "weight")
    before = {key: fragment.tensor.clone() for key, fragment in found.items()}
    engine.backward(engine.forward(inputs()).square().mean())
    engine.step(1e-2)
    assert not any(torch.equal(found[key].tensor, tensor) for key, tensor in before.items()), "a copy, not a view"


def test_state_of_zero_3_is_complete():
    model, optimizer = model_and_optimizer()
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    engine = TrainEngine(model, optimizer, settings(3))
    engine.backward(engine.forward(inputs()).square().mean())
    engine.step(1e-2)
    found = {(fragment.name, fragment.kind): fragment.tensor.clone() for fragment in engine.fragments()}
    assert {key: tensor.numel() for key, tensor in found.items()} == {
        (name, kind): size for name, size in sizes.items() for kind in KINDS
    }
    engine.load_fragments(lambda name, kind, start, numel: found[name, kind] + 1, optimizer_steps=7)
    assert all(torch.equal(fragment.tensor, found[fragment.name, fragment.kind] + 1) for fragment in engine.fragments())
    assert {state["step"].item() for state in engine._optimizer.optimizer.state.values()} == {7}


@pytest.mark.parametrize(("stage", "gone"), [(2, "_hp_mapping"), (3, "fp32_partitioned_groups_flat")])
def test_a_version_that_keeps_the_state_elsewhere_is_refused_by_name(stage, gone, monkeypatch):
    monkeypatch.setattr(patches, "VERSION", "0.99.0")
    optimizer = SimpleNamespace(
        optimizer=None, param_groups=[], overflow=False, _lazy_init_hp_params_optimizer_state=None
    )
    with pytest.raises(UserError, match=rf"deepspeed is 0\.99\.0, whose .* has no {gone}: .*pip install 'deepspeed>="):
        patches.require_state(optimizer, stage, [nn.Parameter(torch.zeros(1))])


def test_a_version_without_a_name_that_is_imported_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(deepspeed, "__version__", "0.99.0")
    monkeypatch.delattr("deepspeed.utils.safe_set_local_fp32_param")
    spec = importlib.util.spec_from_file_location("second_patches", patches.__file__)
    with pytest.raises(
        UserError, match=r"deepspeed is 0\.99\.0, from which an import fails .*safe_set_local_fp32_param"
    ):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_version_that_was_not_tested_keeps_its_own_ways_says_so_and_trains_alike(stage, monkeypatch):
    """On two ranks and with the real model this is held by the cases of test_zero.py that end in -untested."""
    tested = TrainEngine(*model_and_optimizer(), settings(stage))
    monkeypatch.setattr(patches, "VERSION", "0.19.9")
    untested = TrainEngine(*model_and_optimizer(), settings(stage))
    assert tested.remarks == []
    (line,) = untested.remarks
    assert line.startswith("deepspeed 0.19.9 is not a version that this engine was tested with (0.19.8)")
    replaced = {*REPLACED, "scaled_global_norm", "check_overflow"}
    assert replaced & set(vars(tested._optimizer)) == (replaced if stage < 3 else set())
    assert not replaced & set(vars(untested._optimizer))
    trained = {}
    for engine in (tested, untested):
        trained[engine] = []
        for _ in range(4):
            loss = engine.forward(inputs()).square().mean()
            engine.backward(loss)
            assert engine.step(1e-2)
            trained[engine].append(loss.item())
    assert trained[tested][-1] < 0.95 * trained[tested][0]
    assert trained[untested] == pytest.approx(trained[tested], rel=1e-6)


def test_a_run_under_a_version_that_was_not_tested_says_so_once(photographs, run, tmp_path):
    script = (
        "import sys, deepspeed; deepspeed.__version__ = '0.19.9'\n"
        "from mirl.engine.pretrain import main; sys.exit(main(sys.argv[1:]))"
    )
    flags = [*TINY, "--data", photographs, "--steps", "2", "--out", "out"]
    done = run(sys.executable, "-c", script, *flags, env={"PYTHONPATH": str(CHECKOUT)})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("deepspeed 0.19.9 is not a version that this engine was tested with") == 1
    assert set(losses(tmp_path / "out")) == {1, 2}
