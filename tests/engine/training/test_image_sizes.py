"""Which size a step has, what it costs, and that loader, masks and the time left go by it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mirl.engine.accounting.flops import training_flops_per_image
from mirl.engine.models.skips import ExactSkips
from mirl.engine.pretraining.recipes import recipe
from mirl.engine.training import step_log
from mirl.engine.training.image_sizes import StepSizes
from mirl.engine.training.noise import NoiseAhead, mask_noise
from mirl.engine.training.run_folder import Progress
from mirl.engine.transfer.classification.recipes import RECIPES as FINETUNING
from tests.engine.training.test_time_left import simulate


def sizes(*texts: str, steps: int) -> StepSizes:
    return StepSizes.of(recipe("tiny", image_sizes=texts, steps=steps), steps)


@pytest.mark.parametrize(
    ("texts", "steps", "expected"),
    [
        (("32", "48@0.5", "64@0.8"), 10, [32] * 5 + [48] * 3 + [64] * 2),
        (("32", "48@0.28", "64@0.8"), 25, [32] * 7 + [48] * 13 + [64] * 5),  # 7.000000000000001 in floats
        (("32", "48@0.5", "64@0.85"), 7, [32] * 4 + [48] * 2 + [64]),  # the first step past half of the run
        (("64", "48@0.25", "64@0.75"), 4, [64, 48, 48, 64]),
        (("32", "48@0.5", "64@0.9"), 2, [32, 64]),  # no step is left for 48
        (("32", "48@0.5", "64@0.9"), 1, [64]),
    ],
)
def test_a_size_begins_with_the_first_step_that_has_its_share_behind_it(texts, steps, expected):
    found = sizes(*texts, steps=steps)
    seen = [found.size_at(step) for step in range(steps)] if found else [(64, 64)] * steps
    assert seen == [(side, side) for side in expected]
    assert found.sizes_from(0) == (list(dict.fromkeys(seen)) if found else [])
    assert found.sizes_from(steps - 1) == ([(64, 64)] if found else [])


def test_costs_are_flops_beside_those_of_the_whole_size():
    found = sizes("32", "48@0.5", "64@0.8", steps=10)
    config = recipe("tiny").model
    small = recipe("tiny", image_size=32).model
    for plain, skips in ((False, (ExactSkips(),)), (True, ())):
        wanted = training_flops_per_image(small, *skips) / training_flops_per_image(config, *skips)
        assert found.cost(0, plain=plain) == pytest.approx(wanted, rel=1e-12) and wanted < 0.3
        assert found.cost(9, plain=plain) == 1
    for first, last in ((0, 10), (3, 9), (5, 5), (8, 10), (0, 1)):
        by_step = sum(found.cost(step) for step in range(first, last))
        assert found.cost_between(first, last) == pytest.approx(by_step, rel=1e-12)
    assert found.mean_cost == found.cost_between(0, 10) / 10
    assert sum(share for _, share in found.shares()) == pytest.approx(1)
    assert str(found) == "32x32 in steps 1 to 5, 48x48 in steps 6 to 8, 64x64 in steps 9 to 10"


def test_a_run_of_one_size_and_one_of_another_kind_cost_one_a_step():
    for found in (sizes("64", steps=10), sizes(steps=10), StepSizes.of(FINETUNING["small_data"](), 10)):
        assert not found and found.cost(3) == found.mean_cost == 1 and found.cost_between(3, 10) == 7


def test_the_noise_of_a_step_has_the_patches_of_its_size():
    found = sizes("32", "48@0.5", "64@0.8", steps=10)
    ahead = NoiseAhead(3, lambda step: found.model_at(step).num_patches, torch.device("cpu"))
    for step in (3, 4, 5, 6, 7, 8, 9, 2):  # as in a run, and after a step back
        patches = {32: 16, 48: 36, 64: 64}[found.size_at(step)[0]]
        assert torch.equal(ahead.take(step, 4, 2), mask_noise(3, step, 4, 2, patches))


def test_the_time_left_knows_that_later_steps_cost_more():
    found = sizes("32", "48@0.5", "64@0.8", steps=200)

    def cost(number: int) -> float:
        return found.cost(number - 1)

    told = simulate(
        200, step=lambda number: 0.5 * cost(number), cost=cost, left=lambda step: found.cost_between(step, 200)
    )
    assert all(seconds == pytest.approx(true, rel=1e-6) for _, seconds, true in told[3:-1])


class CostsLeft:
    """In the place of the clock of a log: what it was told of steps, and the cost of those to come as their seconds."""

    def __init__(self) -> None:
        self.ended: list[float] = []

    def step_ended(self, cost: float) -> None:
        self.ended.append(cost)

    def seconds(self, *, steps: float, **_: object) -> float:
        return steps


def test_the_log_goes_by_the_sizes_that_were_trained_and_those_to_come(monkeypatch):
    """Arithmetic alone: a run of ten steps, two micro-batches each, a record after steps 4, 6, 8, 9 and 10."""
    monkeypatch.setattr(step_log, "peak_flops", lambda device: 1e12)
    clock = CostsLeft()
    monkeypatch.setattr(step_log, "TimeLeft", lambda: clock)
    found, progress, records = sizes("32", "48@0.5", "64@0.8", steps=10), Progress(), []
    ranks = SimpleNamespace(device=torch.device("cpu"), world_size=1)
    log = step_log.StepLog(
        ranks=ranks, engine=SimpleNamespace(gradient_norm=lambda: 1.0), progress=progress, accumulation=2,
        task=SimpleNamespace(
            term_names=("a",), gflops_per_image=2.0, plain_gflops_per_image=3.0, report_images=0,
            reports_after=lambda step, total: 0,
        ),
        loader=SimpleNamespace(wait_seconds=0.0, bad_images=[], num_images=8), batch_size=8, sizes=found,
        durations=SimpleNamespace(total_steps=10), schedule=SimpleNamespace(lr=lambda step: 0.1),
        log=SimpleNamespace(metrics=lambda values, line: records.append(values)),
    )  # fmt: skip
    for step in range(10):
        for _ in range(2):
            log.add(torch.ones(()), torch.ones(1), 4)
        progress.step = progress.applied_steps = step + 1
        log.step_ended()
        if step + 1 in (4, 6, 8, 9, 10):
            log.write()
    for values, steps in zip(records, ([0, 1, 2, 3], [4, 5], [6, 7], [8], [9]), strict=True):
        for key, gflops, plain in (("mfu_percent", 2.0, False), ("plain_mfu_percent", 3.0, True)):
            mean = sum(found.cost(step, plain=plain) for step in steps) / len(steps)
            wanted = 100 * values["images_per_s"] * gflops * 1e9 * mean / 1e12
            assert values[key] == pytest.approx(wanted, rel=1e-9)
    assert clock.ended == [found.cost(step) for step in range(10)]
    assert [values["seconds_left"] for values in records] == [
        found.cost_between(step, 10) for step in (4, 6, 8, 9, 10)
    ]  # fmt: skip
    # What a run's prediction is compared with is a step of the whole size.
    assert [line["step_ms"] for line in log.measured.lines] == [values["step_ms"] for values in records[3:]]
