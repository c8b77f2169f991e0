"""A small run of bench_deepspeed.py, to see that it works; its figure on a shared machine is only printed."""

from __future__ import annotations

import pytest

from benchmarks.bench_deepspeed import run


@pytest.mark.parametrize("world_size", [1, 2])
def test_deepspeed_beside_a_bare_loop(world_size: int, capsys: pytest.CaptureFixture) -> None:
    figures = run(world_size, "--steps", "3", "--batch", "8")
    with capsys.disabled():
        print(f"\nDeepSpeed over a bare loop, {world_size} ranks: {figures['ratio']:.3f}")
    # No bound: machines that run tests are shared, and three steps are few.
    assert figures["ratio"] > 0
