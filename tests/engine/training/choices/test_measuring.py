"""A slow candidate is not chosen; one that fails or is wrong is left out with its reason; the time is kept."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from mirl.engine.training.choices import measuring
from mirl.engine.training.choices.attention import APART, ATTENTION, PACKED, TOKENS_FIRST
from mirl.engine.training.choices.declaration import Compiled, Use
from mirl.engine.training.choices.measuring import Deadline, kept_bytes, measure, try_out
from mirl.engine.training.choices.pointwise import GELU, NORM
from mirl.kernels.attention import CANDIDATES
from tests.engine.training.choices.support import CPU, attention_use, failing, slow, with_candidates

POINTWISE = {
    "norm": (NORM, {"B": 2, "S": 9, "D": 16, "sum": "yes"}),
    "norm without a sum": (NORM, {"B": 1, "S": 9, "D": 16, "sum": "no"}),
    "gelu": (GELU, {"B": 2, "S": 9, "D": 16, "F": 64}),
}


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 1.01 * grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [PACKED, APART, TOKENS_FIRST])
def test_every_candidate_of_a_cpu_gives_the_result_of_the_reference(layout, dtype):
    sizes = {"S": 9, "T": 9} if layout == PACKED else {"S": 7, "T": 20}
    finding = measure(ATTENTION, attention_use(layout=layout, dtype=dtype, **sizes), "math", CPU, Deadline())
    # In bfloat16 torch's own form computes in float32, and keeps that.
    assert all(reason.startswith("it keeps") for reason in finding.excluded.values()) and finding.measured
    assert set(finding.excluded) == ({"sdpa_math"} if dtype == torch.bfloat16 else set())
    assert set(finding.times_ms) == set(CANDIDATES["cpu"]) - set(finding.excluded)
    fastest = min(finding.times_ms, key=finding.times_ms.get)
    assert finding.chosen in (fastest, "math")
    assert all(0 < milliseconds < 1000 for milliseconds in finding.times_ms.values())


@pytest.mark.parametrize("name", POINTWISE)
def test_norm_and_gelu_have_two_candidates(name):
    choice, sizes = POINTWISE[name]
    use = Use(sizes=tuple(sizes.items()), dtype=torch.float32, in_region=False)
    finding = measure(choice, use, "torch", CPU, Deadline())
    assert set(finding.times_ms) == {"torch", "ours"} and finding.excluded == {}


def test_kernels_of_a_gpu_are_left_out_on_a_cpu_with_what_torch_says():
    on_gpu = dataclasses.replace(
        ATTENTION, candidates=lambda use, device: ATTENTION.candidates(use, torch.device("cuda"))
    )
    finding = measure(on_gpu, attention_use(), "math", CPU, Deadline())
    assert set(finding.times_ms) == {"sdpa", "math"}
    assert set(finding.excluded) == set(CANDIDATES["cuda"]) - {"sdpa", "math"}
    assert "NotImplementedError" in finding.excluded["sdpa_cudnn"]
    assert all("\n" not in reason for reason in finding.excluded.values())


@pytest.mark.parametrize("default", ["plain", "slow"])
def test_a_slow_candidate_is_not_chosen_even_where_it_is_the_default(default):
    choice = with_candidates(lambda run: {"slow": slow(run), "plain": run})
    finding = measure(choice, attention_use(), default, CPU, Deadline())
    assert finding.chosen == "plain" and finding.default == default
    assert finding.times_ms["slow"] > 4 > finding.times_ms["plain"]
    if default == "slow":
        assert finding.reason.endswith("times as fast as slow")


@pytest.mark.parametrize(("other", "chosen"), [(0.99, "default"), (0.97, "other"), (1.5, "default"), (9.0, "default")])
def test_the_median_decides_and_the_default_stays_where_another_is_hardly_faster(other, chosen, monkeypatch):
    """One sample in seven is ten times too long or too short."""
    count = {"default": 0, "other": 0}

    def seconds(call, repeats, device):
        call()
        name = called.pop()
        count[name] += 1
        return {"default": 1.0, "other": other}[name] * {5: 10.0, 7: 0.1}.get(count[name], 1.0)

    called: list[str] = []

    def told(name, run):
        return lambda *leaves: called.append(name) or run(*leaves)

    monkeypatch.setattr(measuring, "_seconds", seconds)
    choice = with_candidates(lambda run: {name: told(name, run) for name in count})
    finding = measure(choice, attention_use(), "default", CPU, Deadline())
    assert finding.chosen == chosen
    assert finding.times_ms == pytest.approx({"default": 1000.0, "other": 1000.0 * other})
    assert count["other"] == (8 if other < 3 else 3), "a candidate far behind is timed no further"


def test_one_that_fails_or_is_wrong_is_left_out_with_its_reason():
    def shifted(run):
        return lambda *leaves: run(*leaves) + 0.01

    def not_finite(run):
        return lambda *leaves: run(*leaves) * float("nan")

    choice = with_candidates(
        lambda run: {
            "slow": slow(run),
            "failing": failing,
            "shifted": shifted(run),
            "nan": not_finite(run),
            "gradient": lambda *leaves: WrongGradient.apply(run(*leaves)),
            "shape": lambda *leaves: run(*leaves).flatten(1),
        }
    )
    finding = measure(choice, attention_use(), "failing", CPU, Deadline())
    assert finding.chosen == "slow" and finding.reason == "failing cannot be used here"
    assert set(finding.times_ms) == {"slow"}
    assert finding.excluded["failing"] == "NotImplementedError: no kernel image is available"
    for name in ("shifted", "nan", "gradient"):
        assert finding.excluded[name].startswith("wrong: it differs from the reference by "), name
    assert "shape" in finding.excluded["shape"]


def test_one_that_would_break_a_compiled_region_is_left_out_of_it():
    def breaking(run):
        def candidate(*leaves: Tensor) -> Tensor:
            out = run(*leaves)
            torch._dynamo.graph_break()
            return out

        return candidate

    choice = with_candidates(lambda run: {"plain": slow(run), "breaking": breaking(run)})
    assert measure(choice, attention_use(), "plain", CPU, Deadline()).chosen == "breaking"
    choice = with_candidates(lambda run: {"plain": run, "breaking": breaking(run)})
    inside = measure(choice, attention_use(in_region=True), "plain", CPU, Deadline())
    assert inside.chosen == "plain" and set(inside.excluded) == {"breaking"}


def test_one_that_keeps_more_memory_than_the_run_was_planned_for_is_left_out():
    """Two matrix products with a softmax between them keep all weights, B * H * S * T."""
    use = attention_use(S=64, T=64)
    leaves = ATTENTION.inputs(use, CPU, torch.Generator().manual_seed(0))
    kept = {name: kept_bytes(run, leaves) for name, run in ATTENTION.candidates(use, CPU).items()}
    weights = 2 * 2 * 64 * 64 * 4
    assert kept["math"] >= kept["sdpa_cpu"] + weights / 2
    assert leaves[0].nbytes <= kept["sdpa_cpu"] < leaves[0].nbytes + weights
    finding = measure(ATTENTION, use, "sdpa", CPU, Deadline())
    assert (
        finding.excluded["math"].startswith("it keeps ")
        and "for the backward pass, sdpa 0." in finding.excluded["math"]
    )
    assert "math" not in measure(ATTENTION, use, "math", CPU, Deadline()).excluded


def test_where_the_reference_fails_the_default_stays():
    choice = dataclasses.replace(ATTENTION, reference=lambda use: failing)
    finding = measure(choice, attention_use(), "sdpa", CPU, Deadline())
    assert (finding.chosen, finding.measured) == ("sdpa", False)
    assert finding.reason == "the reference failed: NotImplementedError: no kernel image is available"


class Clock:
    """Seconds that pass when a candidate says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def taking(self, run, seconds):
        def candidate(*leaves: Tensor) -> Tensor:
            self.now += seconds
            return run(*leaves)

        return candidate


def test_what_the_time_does_not_reach_keeps_its_default():
    clock = Clock()
    calls: list[str] = []

    def candidates(seconds: float):
        def made(run):
            def noted(name, inner):
                return lambda *leaves: calls.append(name) or inner(*leaves)

            return {"first": noted("first", run), "long": noted("long", clock.taking(run, seconds))} | {
                "late": noted("late", run)
            }

        return made

    not_reached = "not reached: 10 s were over"
    # What took long before is not begun where it would not end in time; the others are.
    deadline = Deadline(10.0, clock)
    finding = measure(with_candidates(candidates(0.5)), attention_use(), "first", CPU, deadline)
    assert finding.measured and set(finding.times_ms) == {"first", "long", "late"}
    clock.now += 9.3 - deadline.spent
    calls.clear()
    finding = measure(with_candidates(candidates(0.5)), attention_use(S=5, T=5), "first", CPU, deadline)
    assert finding.excluded == {"long": not_reached} and "long" not in calls
    assert set(finding.times_ms) == {"first", "late"} and not finding.measured
    # A default that was not reached is no reason to take another.
    finding = measure(with_candidates(candidates(0.5)), attention_use(S=5, T=5), "long", CPU, deadline)
    assert (finding.chosen, finding.reason, finding.measured) == ("long", not_reached, False)
    # Nothing is begun when the time is over.
    deadline = Deadline(10.0, clock)
    finding = measure(with_candidates(candidates(11.0)), attention_use(), "first", CPU, deadline)
    assert finding.excluded["late"] == not_reached and finding.chosen == "first" and not finding.measured
    calls.clear()
    second = measure(with_candidates(candidates(0.0)), attention_use(S=5, T=5), "late", CPU, deadline)
    assert (second.chosen, second.measured, second.reason) == ("late", False, not_reached)
    assert calls == []


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_candidates_of_a_gpu(device, dtype):
    use = attention_use(B=64, S=197, T=197, H=12, d=64, dtype=dtype)
    finding = measure(ATTENTION, use, "sdpa", torch.device(device), Deadline())
    assert set(finding.times_ms) | set(finding.excluded) == set(CANDIDATES["cuda"]) and finding.measured
    assert "sdpa" in finding.times_ms and "math" in finding.excluded
    if dtype == torch.bfloat16:
        assert not [name for name, reason in finding.excluded.items() if reason.startswith("wrong")]
        assert len(finding.times_ms) >= 2
    for choice, sizes in POINTWISE.values():
        sizes = sizes | {"B": 64, "S": 197}
        use = Use(sizes=tuple(sizes.items()), dtype=dtype, in_region=False)
        finding = measure(choice, use, "ours", torch.device(device), Deadline())
        assert set(finding.times_ms) == {"torch", "ours"}, finding.excluded


def test_what_one_compilation_took_is_expected_of_the_next(monkeypatch):
    """Of whatever choice."""
    clock = Clock()

    def compiled(run):
        made = Compiled.__new__(Compiled)
        made._function = clock.taking(run, 0.0)
        return made

    deadline = Deadline(10.0, clock)
    for choice, sizes in POINTWISE.values():
        use = Use(sizes=tuple(sizes.items()), dtype=torch.float32, in_region=True)
        one = with_candidates(lambda run: {"inductor": compiled(run)}, choice)
        assert set(measure(one, use, "inductor", CPU, deadline).times_ms) == {"inductor"}
        if choice is NORM:
            deadline.note("compiled", clock.now - 4.0)
            clock.now += 2.0
    assert clock.now == 4.0
    clock.now += 2.5
    finding = measure(one, use, "inductor", CPU, deadline)
    assert finding.excluded == {"inductor": "not reached: 10 s were over"} and not finding.measured


def test_on_a_gpu_the_device_waits_until_the_host_has_queued_a_round(monkeypatch):
    """The order of events and calls, which needs no GPU to be seen."""
    seen: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            seen.append("event")

        def synchronize(self) -> None:
            seen.append("synchronised")

        def elapsed_time(self, end: Event) -> float:
            return 6.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: seen.append("synchronised"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: seen.append("waits" if cycles > 1e6 else "too short"))
    call = slow(lambda: seen.append("call"), 1e-3)
    assert measuring._seconds(call, 3, torch.device("cuda")) == pytest.approx(2e-3)
    assert seen == ["synchronised", "call", "waits", "event", "call", "call", "call", "event", "synchronised"]


def test_the_limit_holds_for_candidates_that_take_long():
    choice = with_candidates(lambda run: {"one": slow(run, 0.15), "other": slow(run, 0.15)})
    deadline = Deadline(1.0)
    found = [measure(choice, attention_use(S=size, T=size), "one", CPU, deadline) for size in range(5, 9)]
    assert deadline.spent < 1.5
    assert found[-1].chosen == "one" and "not reached: 1 s were over" in found[-1].reason


def test_a_candidate_is_tried_out_on_two_images():
    assert try_out(ATTENTION, attention_use(B=512), "sdpa", CPU) is None
    reason = try_out(ATTENTION, attention_use(), "xformers", CPU)
    assert reason == "it is no candidate of attention here (math, sdpa, sdpa_cpu, sdpa_math)"
    seen = []
    choice = dataclasses.replace(
        ATTENTION, candidates=lambda use, device: {"failing": lambda x: seen.append(x.shape) or failing()}
    )
    assert "no kernel image" in try_out(choice, attention_use(B=512), "failing", CPU)
    assert seen == [(2, 9, 48)]
