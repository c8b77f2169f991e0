"""What is computed is what was recorded: streams to the bit, runs to the bit on the machine that wrote them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.golden.runs import SYSTEMS, machine, record_runs
from tests.golden.streams import record_streams

HERE = Path(__file__).resolve().parent
STREAMS = json.loads((HERE / "streams.json").read_text())
RUNS = json.loads((HERE / "runs.json").read_text())
# Another processor sums in another order: README.md says how far that was seen to go.
ELSEWHERE = 1e-5
MEND = "if that is meant, run `python -m tests.golden.write` and say why in the commit"


def test_the_record_has_every_run():
    assert set(RUNS["runs"]) == {"demo", "two_ranks_zero2", "finetune", *SYSTEMS}


def test_streams():
    found = record_streams()
    assert found.keys() == STREAMS["streams"].keys()
    for name, recorded in STREAMS["streams"].items():
        assert found[name] == recorded, f"the stream {name} gives other numbers than at {STREAMS['commit']}: {MEND}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return record_runs(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("name", RUNS["runs"])
def test_run(name, runs):
    tolerance = 0.0 if machine() == RUNS["machine"] else ELSEWHERE
    for recorded, found in zip(RUNS["runs"][name], runs[name], strict=True):
        assert recorded.keys() == found.keys(), f"{name} tells of other figures than at {RUNS['commit']}: {MEND}"
    for step, (recorded, found) in enumerate(zip(RUNS["runs"][name], runs[name], strict=True), start=1):
        for key, value in recorded.items():
            assert math.isclose(found[key], value, rel_tol=tolerance, abs_tol=0.0), (
                f"{name}, step {step}, {key}: {found[key]!r} where {RUNS['commit'][:7]} had {value!r}, relative "
                f"difference {abs(found[key] - value) / abs(value):.1e} (allowed {tolerance:g}); {MEND}"
            )
