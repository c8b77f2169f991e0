"""The optimiser's step is chosen like the rest, and what is chosen is how the engine steps."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from mirl.engine.configuration.config import RunConfig
from mirl.engine.distributed import deepspeed_patches as patches
from mirl.engine.distributed.ds_engine import TrainEngine
from mirl.engine.distributed.launch import Ranks
from mirl.engine.models import Execution
from mirl.engine.training.choices import choosing
from mirl.engine.training.choices import optimizer as optimizer_choice
from mirl.engine.training.choices.measuring import Deadline, measure
from mirl.engine.training.choices.optimizer import ONE_PASS, OPTIMIZER, PASSES, optimizer_places, use_of
from mirl.engine.training.choices.registry import CHOICES
from mirl.engine.training.choices.uses import Place
from tests.engine.models.helpers import make_model, tiny_config
from tests.engine.training.choices.support import CPU, slow

ONE = Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1, device=CPU)


@pytest.fixture(scope="module", autouse=True)
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    patches.forget_process_group_of_earlier_run()
    with pytest.MonkeyPatch.context() as environment:
        for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
            environment.setenv(name, value)
        yield
    torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MIRL_CACHE", str(tmp_path / "cache"))


def engine(*, clip: float = 1.0) -> TrainEngine:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 50), nn.Tanh(), nn.Linear(50, 30))
    settings = {
        "train_micro_batch_size_per_gpu": 4, "gradient_clipping": clip, "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, "bf16": {"enabled": True},
    }  # fmt: skip
    return TrainEngine(model, torch.optim.AdamW(model.parameters(), lr=1e-2), settings)


def with_slow(name: str) -> Place:
    """A place of an engine, in which the candidate ``name`` is slow."""
    made = engine()

    def candidates(use, device):
        return {key: slow(run) if key == name else run for key, run in OPTIMIZER.candidates(use, device).items()}

    return Place(dataclasses.replace(OPTIMIZER, candidates=candidates), use_of(made), (made,))


def choose(place: Place, **run) -> choosing.Chosen:
    model = make_model(tiny_config(depth=2, segments=1, objective="mae", did=False))
    model.set_execution(Execution())
    model.resolve_attention(CPU)
    return choosing.choose(model, ranks=ONE, run=RunConfig(**run), batch=2, compiled=False, choices=(), besides=[place])


def test_it_is_a_choice_of_every_run_on_a_gpu_and_of_none_on_a_cpu():
    made = engine()
    assert OPTIMIZER in CHOICES
    assert optimizer_places(made, CPU) == []
    (place,) = optimizer_places(made, torch.device("cuda"))
    assert place.choice is OPTIMIZER and place.modules == (made,) and place.default == PASSES
    assert place.use.key == "N 3580 clip yes weights bfloat16 bfloat16"
    assert use_of(engine(clip=0.0))["clip"] == "no"


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_both_candidates_take_the_same_steps(clip, dtype):
    use = dataclasses.replace(use_of(engine(clip=clip)), dtype=dtype)
    leaves = OPTIMIZER.inputs(use, CPU, torch.Generator().manual_seed(1))
    before = [leaf.clone() for leaf in leaves]
    both = OPTIMIZER.candidates(use, CPU)
    for _ in range(3):
        ours, theirs = (both[name](*leaves) for name in (ONE_PASS, PASSES))
        for one, other in zip(ours, theirs, strict=True):
            assert one.dtype == other.dtype
            assert (one.float() - other.float()).norm() <= 1e-4 * other.float().norm()
    assert all(torch.equal(leaf, kept) for leaf, kept in zip(leaves, before, strict=True)), "another would start later"
    assert (ours[0] - leaves[1]).abs().mean() > 0.05, "no step was taken"


def test_the_faster_one_is_taken_and_a_wrong_one_never(monkeypatch):
    for loser, winner in ((PASSES, ONE_PASS), (ONE_PASS, PASSES)):
        place = with_slow(loser)
        chosen = choose(place, choices="measure")
        finding = chosen.table.find("optimizer", place.use.key)
        assert finding is not None and finding.chosen == winner and set(finding.times_ms) == {PASSES, ONE_PASS}
        assert place.modules[0].steps_in_one_pass == (winner == ONE_PASS)
        assert any("optimizer" in line and winner in line for line in chosen.lines)
    real = optimizer_choice.Coefficients.of_step
    monkeypatch.setattr(
        optimizer_choice.Coefficients, "of_step",
        lambda number, **numbers: real(number, **(numbers | {"weight_decay": 0.0})),
    )  # fmt: skip
    finding = measure(with_slow(PASSES).choice, use_of(engine()), PASSES, CPU, Deadline())
    assert finding.chosen == PASSES and finding.excluded[ONE_PASS].startswith("wrong")


def test_by_default_nothing_changes_and_a_record_is_followed(tmp_path):
    place = with_slow(PASSES)
    choose(place, choices="default")
    assert not place.modules[0].steps_in_one_pass
    table = choose(with_slow(PASSES), choices="measure").table
    record = tmp_path / "choices.json"
    record.write_text(table.to_json())
    place = with_slow(ONE_PASS)
    choose(place, choices=str(record))
    assert place.modules[0].steps_in_one_pass
