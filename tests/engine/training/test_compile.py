"""Compiled regions: how many graphs, never more of them, equal results, and a fallback that says why.

The backend of these tests records and differentiates the graphs and runs them as they are ("aot_eager"): what they hold
is independent of the code generator, which takes minutes on a small machine. One slow test takes the real one.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor_config
from torch._dynamo.utils import counters

from mirl.engine.configuration.config import RunConfig
from mirl.engine.distributed.launch import Ranks
from mirl.engine.models import MIRL, Execution
from mirl.engine.models.resizing import at_image_size
from mirl.engine.training import compiling
from mirl.engine.training.compiling import (
    SEARCH,
    CompileChoice,
    choose_compile,
    compile_regions,
    expected_graphs,
    search_regions,
)
from mirl.engine.training.resumed_settings import differences
from mirl.kernels.triton_import import HAS_TRITON
from tests.engine.models.helpers import gradients, make_inputs, make_model, tiny_config

CPU = torch.device("cpu")
CONFIGS: dict[str, dict[str, Any]] = {
    "paper": {"depth": 8, "segments": 4},
    "release": {"variant": "release", "depth": 4, "segments": 2, "decoder_depth": 3},
    "MAE": {"objective": "mae", "segments": 1, "did": False, "decoder_depth": 3},
    "stochastic depth": {"depth": 6, "segments": 2, "drop_path": 0.2},
}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def step(model: MIRL, batch: int = 3, **arguments: Any) -> Any:
    images, noise = make_inputs(model.config, batch)
    return model(images, noise=noise, **arguments)


@pytest.mark.parametrize("overrides", CONFIGS.values(), ids=CONFIGS.keys())
def test_every_graph_is_made_in_the_trial_step_and_none_later(overrides: dict[str, Any]) -> None:
    model = make_model(tiny_config(**overrides), dtype=torch.float32)
    choice = compile_regions(model, 3, CPU, backend="aot_eager")
    assert choice.on, choice.reason
    assert graphs() == expected_graphs(model)
    assert not counters["graph_break"]
    for _ in range(2):
        step(model).loss.backward()
    # All of these run eagerly: a smaller batch, a picture, a probe.
    step(model, batch=2).loss.backward()
    model.eval()
    with torch.no_grad():
        step(model, full=True)
    model.train()
    step(model, full=True).loss.backward()
    step(model).loss.backward()
    assert graphs() == expected_graphs(model)
    assert not counters["recompiles"] and not counters["graph_break"]


@pytest.mark.parametrize(("name", "fused"), [("release", True), ("stochastic depth", False)])
def test_same_loss_and_gradients(name: str, fused: bool) -> None:
    config = tiny_config(**CONFIGS[name])
    model = make_model(config, dtype=torch.float32)
    model.set_execution(Execution(fused_norm=fused, fused_gelu=fused))
    torch.manual_seed(3)  # of stochastic depth
    expected = step(model).loss
    expected_gradients = gradients(model, expected)
    assert compile_regions(model, 3, CPU, backend="aot_eager").on
    torch.manual_seed(3)
    actual = step(model).loss
    # float32, the same operations decomposed: sums in another order
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)
    for name, gradient in gradients(model, actual).items():
        bound = 1e-4 * expected_gradients[name].abs().max().item()
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-3, atol=bound)


def kept_bytes(model: MIRL) -> int:
    """What a training step keeps for its backward pass, without the parameters."""
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = step(model).loss
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    loss.backward()
    return sum(size for place, size in kept.items() if place not in own)


def test_recomputation_holds_in_compiled_regions_too() -> None:
    """The partitioner is the real one; only its graphs run as they are."""
    kept = {}
    for recompute in (False, True):
        model = make_model(tiny_config(depth=4, segments=2), dtype=torch.float32)
        model.set_execution(Execution(recompute=recompute))
        kept["eager", recompute] = kept_bytes(model)
        torch._dynamo.reset()
        choice = compile_regions(model, 3, CPU, backend="aot_eager_decomp_partition")
        assert choice.on, choice.reason
        kept["regions", recompute] = kept_bytes(model)
    assert kept["eager", True] < 0.85 * kept["eager", False]
    for recompute in (False, True):
        assert kept["regions", recompute] == pytest.approx(kept["eager", recompute], rel=0.03)


def test_each_image_size_is_compiled_once_at_the_start_and_none_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "MOST_GRAPHS", 2)  # the blocks' own at one size
    config = tiny_config(depth=2, objective="mae", segments=1, did=False, decoder_depth=1)
    model = make_model(config, dtype=torch.float32)
    choice = compile_regions(model, 3, CPU, backend="aot_eager", sizes=[(8, 12), (16, 24)])
    assert (choice.on, choice.reason) == (True, "3 graphs for each of 2 image sizes, trial steps agree with eager")
    assert graphs() == 6 and model.config == config
    for size in ((8, 12), (16, 24)):
        with at_image_size(model, *size):
            step(model).loss.backward()
    assert graphs() == 6 and not counters["recompiles"]


def test_the_trial_step_leaves_no_trace() -> None:
    model = make_model(tiny_config(drop_path=0.2), dtype=torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    assert compile_regions(model, 2, CPU, backend="aot_eager").on
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_compiler_that_fails_is_named_and_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no C++ compiler found")

    model = make_model(tiny_config(), dtype=torch.float32)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    choice = compile_regions(model, 3, CPU)
    assert not choice.on and str(choice) == "off (FELL BACK TO EAGER: RuntimeError: no C++ compiler found)"
    step(model).loss.backward()


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed: pip install triton")
@pytest.mark.parametrize("failing", [True, False], ids=["where inlining fails", "only inlining"])
def test_kernels_of_ours_are_inlined_or_called(monkeypatch: pytest.MonkeyPatch, failing: bool) -> None:
    asked: list[bool] = []

    def compile_unless_inlined(method: Any, **options: Any) -> Any:
        def broken(*_: Any) -> Any:
            raise RuntimeError("no kernel in a graph")

        return broken if failing and asked[-1] else method

    def note(on: bool) -> bool:
        asked.append(on)
        return on

    monkeypatch.setattr("mirl.engine.training.compiling.set_inlined", note)
    monkeypatch.setattr(torch, "compile", compile_unless_inlined)
    model = make_model(tiny_config(), dtype=torch.float32)
    model.set_execution(Execution(norm_in_regions=True))
    choice = compile_regions(model, 3, CPU)
    assert choice.on and asked == ([True, False] if failing else [True])
    assert ("as operators of their own, for inlined: RuntimeError: no kernel in a graph" in choice.reason) == failing


@pytest.mark.parametrize("wrong", [1.5, float("nan")], ids=["another value", "NaN"])
def test_a_wrong_result_is_found_and_left_alone(monkeypatch: pytest.MonkeyPatch, wrong: float) -> None:
    model = make_model(tiny_config(), dtype=torch.float32)
    expected = step(model).loss

    def wrong_compile(method: Any, **_: Any) -> Any:
        def call(*arguments: Any) -> Any:
            result = method(*arguments)
            return (result[0], wrong * result[1]) if isinstance(result, tuple) else wrong * result

        return call

    monkeypatch.setattr(torch, "compile", wrong_compile)
    choice = compile_regions(model, 3, CPU)
    assert not choice.on and "a trial step differs from eager" in choice.reason
    assert torch.equal(step(model).loss, expected)


@pytest.mark.parametrize(
    ("requested", "device", "stage", "on", "reason"),
    [
        ("auto", "cpu", 2, False, "auto on a CPU"),
        ("auto", "cuda", 2, True, "auto on a GPU"),
        ("auto", "cuda", 3, False, "ZeRO-3"),
        ("on", "cpu", 1, True, "as asked"),
        ("on", "cpu", 3, False, "ZeRO-3"),
        ("off", "cuda", 2, False, "as asked"),
        ("max", "cuda", 2, True, "as asked"),
        ("max", "cuda", 3, False, "ZeRO-3"),
    ],
)
def test_choice(requested: str, device: str, stage: int, on: bool, reason: str) -> None:
    choice = choose_compile(requested, torch.device(device), stage)
    assert choice.on is on and reason in choice.reason
    assert choice.search is (on and requested == "max")


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(ValueError, match="compile is 'yes': choose one of auto, on, off, max"):
        choose_compile("yes", CPU, 2)


# --- the search of --compile max

SMALL: dict[str, Any] = {"objective": "mae", "segments": 1, "did": False, "depth": 2, "decoder_depth": 1}
ALONE = Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1, device=CPU)


class SeenSearch:
    """A backend that runs graphs as they are, and notes Inductor's settings as each is compiled."""

    def __init__(self, fault: str = "") -> None:
        self.seen: list[dict[str, Any]] = []
        self.fault = fault  # of the search

    def __call__(self, graph: Any, inputs: Any) -> Any:
        settings = {name: getattr(inductor_config, name) for name in SEARCH}
        self.seen.append(settings)
        run = torch._dynamo.lookup_backend("aot_eager")(graph, inputs)
        if self.fault and settings["max_autotune_gemm"]:
            if self.fault != "wrong":
                raise RuntimeError(self.fault)
            return lambda *arguments: [1.5 * result for result in run(*arguments)]
        return run


def test_the_search_reaches_inductor_and_its_time_is_told() -> None:
    model, backend = make_model(tiny_config(**SMALL), dtype=torch.float32), SeenSearch()
    assert compile_regions(model, 3, CPU, backend=backend).on  # type: ignore[arg-type]
    assert backend.seen and not any(settings["max_autotune_gemm"] for settings in backend.seen)
    torch._dynamo.reset()
    backend.seen.clear()
    choice = search_regions(model, 3, ALONE, backend=backend)  # type: ignore[arg-type]
    assert choice.on and choice.search and len(backend.seen) == expected_graphs(model)
    assert all(settings == SEARCH for settings in backend.seen)
    assert re.search(r"agrees with eager; products searched in \d+ s on rank 0$", choice.reason)
    assert not inductor_config.max_autotune_gemm, "the setting outlived the search"


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("no valid triton configs", "RuntimeError: no valid triton configs"),
        ("wrong", "a trial step differs from eager"),
    ],
)
def test_a_search_that_fails_leaves_plain_regions_and_says_so(fault: str, told: str) -> None:
    model, backend = make_model(tiny_config(**SMALL), dtype=torch.float32), SeenSearch(fault)
    expected = step(model).loss
    choice = search_regions(model, 3, ALONE, backend=backend)  # type: ignore[arg-type]
    assert choice.on and not choice.search
    assert f"WITHOUT THE SEARCH OF PRODUCTS, which failed on rank 0: {told}" in choice.reason
    assert [settings["max_autotune_gemm"] for settings in backend.seen].count(False) == expected_graphs(model)
    torch.testing.assert_close(step(model).loss, expected, rtol=1e-5, atol=0)


class TwoRanks(Ranks):
    """One of two ranks; ``sent`` is what rank 0 broadcasts, ``other`` what the other rank has to say."""

    sent: Any = None
    other: Any = None
    order: list[str]

    def broadcast(self, value: Any) -> Any:
        self.order.append("broadcast")
        return value if self.is_main else self.sent

    def gather(self, value: object) -> list:
        return [value, self.other] if self.is_main else [self.other, value]


def two_ranks(rank: int, **told: Any) -> TwoRanks:
    ranks = TwoRanks(rank=rank, world_size=2, local_rank=rank, local_world_size=2, device=CPU)
    for name, value in ({"order": []} | told).items():
        object.__setattr__(ranks, name, value)
    return ranks


def test_rank_0_searches_and_the_others_compile_from_its_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    good = CompileChoice(True, "5 graphs, a trial step agrees with eager", search=True)
    for rank in (0, 1):
        ranks = two_ranks(rank, sent=(good, b"cache", 71.6), other=good)
        monkeypatch.setattr(compiling, "saved_cache", lambda ranks=ranks: ranks.order.append("save") or b"cache")
        monkeypatch.setattr(
            torch.compiler, "load_cache_artifacts", lambda found, ranks=ranks: ranks.order.append(found)
        )
        monkeypatch.setattr(
            compiling, "compile_regions", lambda *_, search=False, ranks=ranks, **__: ranks.order.append(search) or good
        )
        choice = search_regions(make_model(tiny_config()), 3, ranks)
        assert ranks.order == ([True, "save", "broadcast"] if rank == 0 else ["broadcast", b"cache", True])
        assert choice.search and choice.reason.endswith("on rank 0, 1 others from its cache")


def test_a_search_that_fails_on_another_rank_ends_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = CompileChoice(True, "good", search=True), CompileChoice(False, "FELL BACK TO EAGER: out of memory")
    plain = CompileChoice(True, "plain")
    monkeypatch.setattr(compiling, "saved_cache", lambda: None)
    monkeypatch.setattr(compiling, "compile_regions", lambda *_, search=False, **__: good if search else plain)
    choice = search_regions(make_model(tiny_config()), 3, two_ranks(0, other=bad))
    wanted = "plain; WITHOUT THE SEARCH OF PRODUCTS, which failed on rank 1: out of memory"
    assert choice.on and not choice.search and choice.reason == wanted


def test_a_resumed_run_may_search_and_the_change_is_told() -> None:
    saved = dataclasses.asdict(RunConfig(compile="max"))
    assert differences("run", RunConfig, RunConfig(compile="max"), saved) == []
    (found,) = differences("run", RunConfig, RunConfig(), saved)
    assert (found.name, found.theirs, found.ours, found.free) == ("compile", "max", "auto", True)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_real_compiler(dtype: torch.dtype) -> None:
    model = make_model(tiny_config(), dtype=dtype)
    choice = compile_regions(model, 3, CPU)
    assert choice.on, choice.reason
    assert graphs() == expected_graphs(model)
