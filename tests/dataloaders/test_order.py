"""Order and division of the work: every image once an epoch, the same images at a step on any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest

from mirl.dataloaders.order import EpochOrder, StepPlan, epoch_permutation


def test_an_epoch_is_a_permutation_and_each_is_another():
    orders = {key: epoch_permutation(1000, *key) for key in ((0, 0), (0, 1), (1, 0))}
    for order in orders.values():
        assert sorted(order.tolist()) == list(range(1000))
    assert not np.array_equal(orders[0, 0], orders[0, 1])
    assert not np.array_equal(orders[0, 0], orders[1, 0])
    assert np.array_equal(orders[0, 0], epoch_permutation(1000, 0, 0))


def test_shuffling_reaches_over_the_whole_set():
    # A window of 1024 would move no image further than about 1024 places; a uniform shuffle moves it N / 3 on average.
    order = epoch_permutation(30_000, 5, 0)
    mean_shift = np.abs(order - np.arange(30_000)).mean()
    assert mean_shift == pytest.approx(10_000, rel=0.03)  # standard deviation of the mean is 0.5 %


@pytest.mark.parametrize(("micro_batch", "accumulation", "world_size"), [(16, 1, 1), (4, 2, 2), (2, 1, 8), (1, 16, 1)])
def test_a_step_covers_the_same_positions_however_it_is_divided(micro_batch, accumulation, world_size):
    for step in (0, 5, 6, 100):
        seen, epochs = [], set()
        for rank in range(world_size):
            plan = StepPlan(
                num_images=100, micro_batch=micro_batch, accumulation=accumulation, rank=rank, world_size=world_size
            )
            assert plan.steps_per_epoch == 6
            for part in range(accumulation):
                epoch, positions = plan.locate(step * accumulation + part)
                seen += positions.tolist()
                epochs.add(epoch)
        assert epochs == {step // 6}
        assert sorted(seen) == list(range(step % 6 * 16, step % 6 * 16 + 16))


def test_the_next_epoch_is_ready_and_old_ones_are_dropped():
    order = EpochOrder(500, seed=3)
    for epoch in (0, 1, 2, 7, 0):
        assert np.array_equal(order(epoch), epoch_permutation(500, 3, epoch))
        assert len(order._orders) == 2
    order.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"micro_batch": 0}, "micro_batch is 0, must be at least 1"),
        ({"rank": 2}, r"rank is 2, must be in 0..1 \(world_size 2\)"),
        ({"num_images": 15}, "has 15 images, fewer than one step of 16 .* lower the batch to at most 15"),
    ],
)
def test_impossible_plans_are_refused(change, message):
    settings = {"num_images": 100, "micro_batch": 4, "accumulation": 2, "rank": 0, "world_size": 2} | change
    with pytest.raises(ValueError, match=message):
        StepPlan(**settings)
