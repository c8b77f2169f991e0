"""Whole runs: the table is told and kept, a resumed run repeats it to the bit, another run takes it."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.engine.conftest import write_classes
from tests.support.runs import TINY, losses


@pytest.fixture
def call(server, tmp_path):
    def called(entry, *arguments):
        cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
        done = server.start(tmp_path, *arguments, entry=entry, ranks=1, tiny=False, environment=cache)
        (code,) = done.end()
        return code, done.output()

    return called


def attention(path):
    return json.loads(path.read_text())["findings"]["attention"]


def test_choices_of_a_run_of_the_resumed_one_and_of_a_finetuning(call, photographs, tmp_path):
    flags = [
        *TINY,
        "--cpu-threads",
        "1",
        "--data",
        str(photographs),
        "--steps",
        "4",
        "--checkpoint-every",
        "2",
        "--choices",
        "measure",
    ]
    code, said = call("pretrain", *flags, "--out", "whole")
    assert code == 0, said[-3000:]
    assert "choices measured in " in said and said.count("  attention ") >= 3
    whole = tmp_path / "whole"
    measured = attention(whole / "choices.json")
    assert len(measured) >= 3 and all(found["times_ms"] for found in measured.values())

    # The first half of the run goes on in another folder.
    shutil.copytree(whole, tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "checkpoints" / "step-00000004")
    (tmp_path / "half" / "checkpoints" / "latest").write_text("step-00000002\n")
    code, said = call("pretrain", *flags, "--out", "half", "--resume", "auto")
    assert code == 0, said[-3000:]
    assert "the run's own record" in said and "choices measured" not in said
    assert (
        json.loads((tmp_path / "half/choices.json").read_text())["findings"]
        == json.loads((whole / "choices.json").read_text())["findings"]
    )
    again, before = losses(tmp_path / "half"), losses(whole)
    assert {step: again[step] for step in (3, 4)} == {step: before[step] for step in (3, 4)}

    # A classifier of it: other shapes, measured, and then taken as a table that no measurement would make.
    write_classes(tmp_path / "classes", {"a": 9, "b": 9})
    flags = [
        "--checkpoint", "whole", "--data", "classes", "--steps", "1", "--batch-size", "8", "--precision", "fp32",
        "--eval-every", "0", "--no-tensorboard", "--cpu-threads", "1", "--loader-threads", "1",
    ]  # fmt: skip
    code, said = call("finetune", *flags, "--out", "first", "--choices", "measure")
    assert code == 0 and "choices measured in " in said, said[-3000:]
    table = tmp_path / "first" / "choices.json"
    for name in ("math", "sdpa", "sdpa_cpu"):
        table.write_text(table.read_text().replace(f'"chosen": "{name}"', '"chosen": "sdpa_math"'))
    code, said = call("finetune", *flags, "--out", "second", "--choices", "first/choices.json")
    assert code == 0 and "attention self, head size 16: sdpa_math" in said, said[-3000:]
    kept = json.loads((tmp_path / "second/choices.json").read_text())
    assert kept["source"] == "first/choices.json"
    assert kept["findings"] == json.loads(table.read_text())["findings"]
