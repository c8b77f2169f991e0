"""The benchmark of long runs: real runs, kept between calls, and differences that it would show."""

from __future__ import annotations

import json

import pytest

from benchmarks import bench_drift


def test_runs_that_compute_alike_agree_and_are_kept(tmp_path):
    arguments = ["--steps", "8", "--seeds", "1", "--cases", "fp32 DeepSpeed gradients", "--model", "tiny"]
    arguments += ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")]
    bench_drift.main(arguments)
    (written,) = (tmp_path / "results").glob("*_drift.json")
    reference, other = json.loads(written.read_text())["rows"]
    assert (reference["case"], other["against"]) == ("fp32", "fp32")
    assert other["first_steps_difference"] < 1e-5 and 0 < reference["final_loss"][0] < 10
    assert written.with_suffix(".png").stat().st_size > 10_000 and "| fp32 |" in written.with_suffix(".md").read_text()

    logs = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").glob("*/metrics.jsonl")}
    assert len(logs) == 2
    bench_drift.main(arguments)
    assert logs == {path: path.stat().st_mtime_ns for path in logs}, "a run was made again"


def test_a_drift_is_told_from_the_spread_of_seeds():
    reference = [[1.0] * 50 + [0.50] * 50, [1.0] * 50 + [0.52] * 50]
    drifted = [[1.0] * 50 + [0.53] * 50, [1.0] * 50 + [0.55] * 50]
    first, second = bench_drift.compare({"fp32": reference, "fp32 regions": drifted})
    assert first["spread_of_seeds"] == pytest.approx(0.0141, abs=1e-4) and "against" not in first
    assert second["differences"] == pytest.approx([0.03, 0.03]) and second["first_steps_difference"] == 0
    assert "+0.03000" in bench_drift.table([first, second])


def test_a_run_that_fails_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(bench_drift.MODELS, "tiny", ["--depth", "7"])
    with pytest.raises(RuntimeError, match="fp32, seed 0: exit code 2"):
        bench_drift.losses("fp32", 0, model="tiny", steps=2, work=tmp_path)
