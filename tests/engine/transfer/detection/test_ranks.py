"""On two ranks: every ZeRO stage trains the same detector, a rank without objects does not stop the other, and the
gathered detections are those of one process.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mirl.engine.distributed.launch import Ranks
from tests.engine.transfer.detection import ranks_worker
from tests.support.ranks import run_ranks

CASES = {
    "zero1": {"stage": "zero1"},
    "zero2": {"stage": "zero2"},
    "zero3": {"stage": "zero3", "zero": {"stage3_param_persistence_threshold": 100}, "evaluate": True},
    "zero3_bf16": {"stage": "zero3", "bf16": True, "zero": {"stage3_param_persistence_threshold": 100}},
    "empty": {"stage": "zero2", "empty": True},
}
ONE = Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def found(tmp_path_factory, composites) -> list[dict]:
    """Of both ranks."""
    out = tmp_path_factory.mktemp("ranks") / "result"
    run_ranks(ranks_worker.__name__, 2, {"out": str(out), "data": str(composites), "cases": CASES})
    return [torch.load(f"{out}-{rank}.pt") for rank in range(2)]


def whole(pieces: list) -> torch.Tensor:
    return torch.cat([tensor.float() for _, tensor in sorted(pieces, key=lambda piece: piece[0])])


@pytest.mark.slow
@pytest.mark.parametrize(("one", "other"), [("zero1", "zero2"), ("zero1", "zero3")])
def test_every_stage_trains_the_same_detector(one, other, found):
    first, second = found[0][one], found[0][other]
    assert second["losses"] == pytest.approx(first["losses"], rel=1e-3)
    assert second["losses"][0] == pytest.approx(first["losses"][0], rel=1e-5)
    start = dict(ranks_worker.make_detector().named_parameters())
    assert first["weights"].keys() == second["weights"].keys() == start.keys()
    for name, pieces in first["weights"].items():
        weights, theirs = whole(pieces), whole(second["weights"][name])
        moved = (weights - start[name].detach().flatten()).abs().mean()
        # AdamW's steps have the size of the rate wherever a gradient is not 0, and the sign of one near 0 is chance.
        assert (weights - theirs).abs().mean() <= 0.05 * moved + 1e-9, name


@pytest.mark.slow
def test_bfloat16_under_zero_3_is_near_float32(found):
    # The maps are rounded to eight bits, so that other regions are proposed and sampled.
    assert found[0]["zero3_bf16"]["losses"][0] == pytest.approx(found[0]["zero2"]["losses"][0], rel=0.2)


@pytest.mark.slow
def test_a_rank_without_objects_goes_on_with_the_other(found):
    for rank in found:
        assert all(loss == loss for loss in rank["empty"]["losses"])
    assert found[1]["empty"]["losses"][0] < found[0]["empty"]["losses"][0]


@pytest.mark.slow
def test_two_ranks_find_what_one_finds(found, composites: Path):
    rows = ranks_worker.rows_of(ranks_worker.make_detector(), ONE, composites)
    assert len(rows) > 10 and len({row["image_id"] for row in rows}) > 3
    for rank in found:
        theirs = rank["evaluated"]["rows"]
        assert [row["image_id"] for row in theirs] == [row["image_id"] for row in rows]
        assert theirs == rows
    assert found[0]["evaluated"]["box"] == found[1]["evaluated"]["box"]
    # Under ZeRO-3 every rank takes part in each pass of the other, and images of a padded last batch count once.
    assert found[0]["zero3"]["rows"] == found[1]["zero3"]["rows"]
    assert len({row["image_id"] for row in found[0]["zero3"]["rows"]}) > 3
