"""metrics.jsonl is JSON whatever a run measures."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from mirl.engine.training.run_log import RunLog, to_json


def strictly(text: str):
    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, np.float64("nan")])
def test_a_number_that_is_not_finite_is_null_wherever_it_stands(number, tmp_path):
    values = {"step": 3, "loss": number, "terms": {"a": number, "b": [1.5, number, (number, 2)]}, "text": "nan"}
    assert strictly(to_json(values)) == {
        "step": 3, "loss": None, "terms": {"a": None, "b": [1.5, None, [None, 2]]}, "text": "nan",
    }  # fmt: skip
    log = RunLog(tmp_path, is_main=True)
    log.open(total_steps=5, start_step=0, tensorboard=False)
    log.metrics(values, "a line")
    log.event("skipped_step", 3, loss=number, shares=[number])
    log.close()
    first, second = map(strictly, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert first["loss"] is None and second["loss"] is None and second["shares"] == [None]


def test_finite_numbers_keep_all_their_digits():
    assert strictly(to_json({"loss": 0.1 + 0.2, "step": 2**60, "flag": True})) == {
        "loss": 0.1 + 0.2, "step": 2**60, "flag": True,
    }  # fmt: skip
