"""The optimiser in one pass through the whole engine, in its plain form on a CPU: it trains as DeepSpeed and torch do.

Both round each float32 result a few times in a step, in another order. A weight of magnitude 1 is off by half a unit in
the last place, 6e-8, each time; twelve steps with some ten roundings stay below 1e-5. A compute weight in bfloat16 may
fall to the other side of a rounding, one unit in the last place, and then the gradients of later steps differ too.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from mirl.engine.distributed import deepspeed_patches as patches
from mirl.engine.distributed.ds_engine import TrainEngine
from mirl.engine.distributed.one_pass import OnePassAdamW

STEPS = 12


@pytest.fixture(scope="module", autouse=True)
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    patches.forget_process_group_of_earlier_run()
    with pytest.MonkeyPatch.context() as environment:
        for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
            environment.setenv(name, value)
        yield
    torch.distributed.destroy_process_group()


def engine_of(*, one_pass: bool, bf16: bool = False, accumulation: int = 1, clip: float = 0.0, **zero) -> TrainEngine:
    """Two layers; weights with decay in one group, biases with another learning rate in the other."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    groups = [
        {"params": [p for p in model.parameters() if p.dim() == 2], "weight_decay": 0.3},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0, "lr_scale": 0.5},
    ]
    settings = {
        "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": accumulation, "gradient_clipping": clip,
        "zero_optimization": {"stage": 2} | zero, "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False, "bf16": {"enabled": bf16},
    }  # fmt: skip
    engine = TrainEngine(model, torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95)), settings)
    if one_pass:
        assert engine.can_step_in_one_pass
        engine.step_in_one_pass(True)
    return engine


def train(engine: TrainEngine, steps: range, accumulation: int = 1, skipped: int = -1) -> list[tuple[bool, float]]:
    """Whether each step was applied, and its norm; that of ``skipped`` has a NaN."""
    told = []
    for step in steps:
        for micro in range(accumulation):
            generator = torch.Generator().manual_seed(100 * step + micro)
            inputs = torch.randn(4, 6, generator=generator).to(engine.weight_dtype)
            scale = float("nan") if step == skipped else 1.0
            engine.backward((engine.forward(inputs) * scale).square().mean() * 10)
            applied = engine.step(1e-2 * (1 + step % 3))
        assert applied is not None
        told.append((applied, engine.gradient_norm()))
    return told


def state(engine: TrainEngine) -> dict[str, torch.Tensor]:
    fragments = {fragment.key: fragment.tensor.detach().clone() for fragment in engine.fragments()}
    return fragments | {name: value.detach().clone() for name, value in engine.module.named_parameters()}


def assert_close(found: TrainEngine, wanted: TrainEngine, *, relative: float) -> None:
    ours, theirs = state(found), state(wanted)
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert tensor.dtype == ours[name].dtype
        scale = tensor.float().abs().max()
        # A bias is no larger than the steps that made it.
        assert (ours[name].float() - tensor.float()).abs().max() <= relative * scale, name


@pytest.mark.parametrize("accumulation, clip", [(1, 0.0), (1, 1.0), (3, 1.0)])
def test_it_trains_as_deepspeed_and_torch_do(accumulation, clip):
    ours, theirs = (engine_of(one_pass=one, accumulation=accumulation, clip=clip) for one in (True, False))
    told, expected = (train(engine, range(STEPS), accumulation, skipped=4) for engine in (ours, theirs))
    assert [applied for applied, _ in told] == [step != 4 for step in range(STEPS)]
    assert max(norm for applied, norm in told if applied) > 1, "nothing was clipped"
    for (applied, norm), (also, wanted) in zip(told, expected, strict=True):
        assert applied == also and (norm == pytest.approx(wanted, rel=1e-5) or not applied)
    assert_close(ours, theirs, relative=1e-5)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_in_bfloat16_too(accumulation):
    ours, theirs = (engine_of(one_pass=one, bf16=True, accumulation=accumulation, clip=1.0) for one in (True, False))
    for engine in (ours, theirs):
        train(engine, range(1), accumulation)
    # One step from the same weights: the gradients are equal, so only the optimiser's own rounding is left.
    for name, tensor in state(theirs).items():
        found = state(ours)[name]
        unit = 2**-7 if tensor.dtype == torch.bfloat16 else 2**-21
        assert (found.float() - tensor.float()).abs().max() <= unit * tensor.float().abs().max(), name
    for engine in (ours, theirs):
        train(engine, range(1, STEPS), accumulation)
    assert_close(ours, theirs, relative=0.05)


def test_a_step_that_is_not_finite_changes_nothing_and_is_not_counted():
    engine = engine_of(one_pass=True, bf16=True, clip=1.0)
    train(engine, range(2))
    before = state(engine)
    assert [applied for applied, _ in train(engine, range(2, 3), skipped=2)] == [False]
    assert all(torch.equal(value, before[name]) for name, value in state(engine).items())
    assert {float(made["step"]) for made in engine._optimizer.optimizer.state.values()} == {2.0}
    assert [applied for applied, _ in train(engine, range(3, 4))] == [True]
    assert {float(made["step"]) for made in engine._optimizer.optimizer.state.values()} == {3.0}


def reader(engine: TrainEngine) -> Callable[[str, str, int, int], torch.Tensor]:
    saved = {(f.name, f.kind): f.tensor.detach().clone() for f in engine.fragments()}
    return lambda name, kind, start, count: saved[name, kind][start : start + count]


@pytest.mark.parametrize("later", [True, False])
def test_a_resumed_run_goes_on_to_the_bit_and_may_go_on_either_way(later):
    """State of six steps in one pass, loaded into a new engine that steps in one pass, or as DeepSpeed does."""
    whole = engine_of(one_pass=True)
    train(whole, range(6))
    resumed = engine_of(one_pass=later)
    train(resumed, range(2))  # of these nothing is left, their count neither
    resumed.load_fragments(reader(whole), optimizer_steps=6)
    with torch.no_grad():
        for new, old in zip(resumed.module.parameters(), whole.module.parameters(), strict=True):
            new.copy_(old)
    for engine in (whole, resumed):
        train(engine, range(6, STEPS))
    assert_close(resumed, whole, relative=0.0 if later else 1e-5)


def test_it_can_be_taken_out_again():
    engine, plain = engine_of(one_pass=True), engine_of(one_pass=False)
    engine.step_in_one_pass(True)
    assert engine.steps_in_one_pass
    engine.step_in_one_pass(False)
    assert not engine.steps_in_one_pass
    for each in (engine, plain):
        train(each, range(3))
    assert_close(engine, plain, relative=0.0)


@pytest.mark.parametrize("zero", [{"stage": 3}, {"offload_optimizer": {"device": "cpu"}}], ids=str)
def test_what_has_no_flat_gradients_has_no_one_pass(zero, monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)  # ZeRO 3 puts another in its place
    assert not engine_of(one_pass=False, **zero).can_step_in_one_pass


def test_another_optimiser_is_left_alone():
    engine = engine_of(one_pass=False)
    for group in engine._optimizer.optimizer.param_groups:
        group["amsgrad"] = True
    assert not engine.can_step_in_one_pass


def test_the_pass_is_queued_before_the_host_waits_for_the_norm(monkeypatch):
    """The device goes on to the step while the host still waits: the norm is fetched after everything is queued."""
    order = []
    engine = engine_of(one_pass=True)
    from mirl.engine.distributed import one_pass

    for name, thing in (("flat_adamw", one_pass), ("get", one_pass.FetchedLater), ("_gather_weights", patches)):
        real = getattr(thing, name)
        monkeypatch.setattr(thing, name, lambda *a, _r=real, _n=name: order.append(_n) or _r(*a))
    train(engine, range(1))
    assert order == ["flat_adamw", "flat_adamw", "_gather_weights", "get"]
    assert isinstance(engine._one_pass, OnePassAdamW)
