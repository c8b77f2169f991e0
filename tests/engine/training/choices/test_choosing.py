"""What a run does about its choices: where it has any, whence they come, and that what is chosen is what computes."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from mirl.engine.configuration.config import RunConfig
from mirl.engine.distributed.launch import Ranks
from mirl.engine.models import Execution
from mirl.engine.models.layers import HeadedAttention, HiddenLinear, Mlp, ResidualNorm
from mirl.engine.training.choices import choosing, table
from mirl.engine.training.choices.attention import ATTENTION
from mirl.engine.training.choices.declaration import Choice, random_leaf
from mirl.engine.training.choices.measuring import Finding
from mirl.engine.training.choices.pointwise import GELU, NORM
from mirl.engine.training.choices.registry import CHOICES
from mirl.engine.training.choices.uses import find_places
from mirl.engine.training.compiling import compile_regions
from mirl.errors import UserError
from tests.engine.models.helpers import gradients, make_inputs, make_model, tiny_config
from tests.engine.training.choices.support import CPU, slow

ONE = Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1, device=CPU)
MEASURED = RunConfig(choices="measure")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.delenv("MIRL_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mirl" / "choices"


def model(**settings):
    made = make_model(tiny_config(**({"depth": 4, "segments": 2, "attention": "auto"} | settings)))
    made.set_execution(Execution())
    made.resolve_attention(CPU)
    return made


def choose(made, run=MEASURED, choices=CHOICES, **options):
    options = {"batch": 3, "compiled": False} | options
    return choosing.choose(made, ranks=ONE, run=run, choices=choices, **options)


def with_slow(*names: str, choice: Choice = ATTENTION) -> Choice:
    """``choice``, in which the candidates of these names are slow."""

    def candidates(use, device):
        found = choice.candidates(use, device)
        return {name: slow(run) if name in names else run for name, run in found.items()}

    return dataclasses.replace(choice, candidates=candidates)


ALL_BUT_SDPA = with_slow("math", "sdpa_cpu", "sdpa_math")
ALL_BUT_MATH = with_slow("sdpa", "sdpa_cpu", "sdpa_math")


def backends(made) -> set[str]:
    return {layer.backend.name for layer in made.modules() if isinstance(layer, HeadedAttention)}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("objective", [{}, {"objective": "mae", "segments": 1, "did": False}])
def test_every_module_that_a_choice_is_for_is_in_one_place_in_the_shapes_of_the_run(compiled, objective):
    made = model(**objective)
    before = made.regions
    state = torch.random.get_rng_state()
    places = find_places(made, CHOICES, RunConfig(), 7, CPU, compiled=compiled)
    assert torch.equal(torch.random.get_rng_state(), state) and made.regions is before
    for choice, kind in ((ATTENTION, HeadedAttention), (NORM, ResidualNorm), (GELU, Mlp)):
        found = [module for place in places if place.choice is choice for module in place.modules]
        assert sorted(map(id, found)) == sorted(id(module) for module in made.modules() if isinstance(module, kind))
    assert {place.use["B"] for place in places} <= {7, 1}
    inside = {module for place in places if place.use.in_region for module in place.modules}
    blocks = set(made.encoder.blocks.modules())
    if not compiled:
        assert not inside
    else:
        encoder = {module for module in blocks if isinstance(module, HeadedAttention | ResidualNorm | Mlp)}
        decoders = {block for decoder in made.decoders.values() for block in decoder.blocks}
        assert encoder <= inside and all(block.mlp in inside and block.attn not in inside for block in decoders)
    # The encoder sees the class token and a quarter of the patches.
    config = made.config
    kept = 1 + config.num_patches - int(config.num_patches * config.mask_ratio)
    encoder_places = [place for place in places if set(place.modules) & blocks and place.choice is ATTENTION]
    assert [place.use["S"] for place in encoder_places] == [kept]
    assert "attend" not in vars(made.encoder.blocks[0].attn), "the model is left as it was"


def test_what_a_user_asked_for_by_name_is_not_measured():
    def names(made, run):
        places = find_places(made, CHOICES, run, 3, CPU, compiled=True)
        return {(place.choice.name, place.use.in_region) for place in places}

    everything = {(name, where) for name in ("attention", "norm", "bias") for where in (False, True)} | {("gelu", True)}
    assert names(model(), RunConfig()) == everything
    assert names(model(), RunConfig(fused="on")) == {("attention", False), ("attention", True)}
    assert ("attention", True) not in names(model(attention="sdpa"), RunConfig())
    recomputing = model()
    recomputing.set_execution(Execution(recompute=True))
    assert names(recomputing, RunConfig()) == everything - {("norm", True), ("bias", True), ("gelu", True)}


def test_what_is_chosen_is_what_computes_and_gives_the_same():
    plain, made = model(), model()
    assert backends(made) == {"math"}
    chosen = choose(made, choices=(ALL_BUT_SDPA, with_slow("torch", choice=NORM), with_slow("torch", choice=GELU)))
    assert backends(made) == {"sdpa"} and set(b.name for b in made.attention_backends.values()) == {"sdpa"}
    assert all(m.execution.fused_norm for m in made.modules() if isinstance(m, ResidualNorm))
    assert all(m.execution.fused_gelu for m in made.modules() if isinstance(m, Mlp))
    images, noise = make_inputs(made.config, 3)
    expected, found = plain(images, noise=noise), made(images, noise=noise)
    assert backends(made) == {"sdpa"}, "the forward pass chose again"
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    wanted = gradients(plain, expected.loss)
    for name, gradient in gradients(made, found.loss).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-5)
    assert chosen.lines[0].startswith("choices measured in ") and any("sdpa" in line for line in chosen.lines)


def test_a_cpu_is_measured_only_where_that_is_asked_for(monkeypatch):
    monkeypatch.setattr(choosing, "find_places", None)
    for asked in ("auto", "default"):
        chosen = choose(model(), RunConfig(choices=asked))
        assert chosen.table.source == "default" and not chosen.table.findings
        assert chosen.lines == ["choices by rule (default)"]


def test_one_declaration_makes_a_choice_of_anything():
    ran = []

    def inputs(use, device, generator):
        shapes = ((use["N"], use["D"]), (use["F"], use["D"]))
        return [random_leaf(shape, use, device, generator) for shape in shapes]

    def watch(module, note):
        if not isinstance(module, HiddenLinear):
            return None
        return module.register_forward_pre_hook(
            lambda module, args: note(
                {"N": args[0].numel() // module.in_features, "D": module.in_features, "F": module.out_features},
                args[0].dtype,
            )
        ).remove

    linear = Choice(
        name="linear", left_open=lambda model, run, in_region: True, watch=watch, inputs=inputs,
        candidates=lambda use, device: {"slow": slow(F.linear), "product": lambda x, w: x @ w.t()},
        reference=lambda use: F.linear, tolerance={torch.float64: 1e-9}, current=lambda module, in_region: "slow",
        apply=lambda model, module, name, in_region: ran.append((type(module), name)),
    )  # fmt: skip
    made = model()
    chosen = choose(made, choices=(*CHOICES, linear))
    assert set(ran) == {(HiddenLinear, "product")}
    assert all(finding.chosen == "product" for finding in chosen.table.findings["linear"].values())
    chosen = choose(made, choices=(dataclasses.replace(linear, tolerance={}),))
    reasons = {finding.reason for finding in chosen.table.findings["linear"].values()}
    assert reasons == {"linear declares no tolerance for torch.float64"}


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """``auto`` measures."""
    monkeypatch.setattr(choosing, "measures_unasked", lambda device: True)


def never(*arguments):
    raise AssertionError("measured again")


def test_a_later_run_takes_the_cache_and_measures_what_it_lacks(as_on_a_gpu, cache, monkeypatch):
    first = choose(model(), RunConfig(), choices=(ALL_BUT_SDPA,))
    (path,) = cache.iterdir()
    assert table.Table.from_json(path.read_text()).findings == first.table.findings
    assert json.loads(path.read_text())["environment"]["torch"] == torch.__version__
    made = model()
    with monkeypatch.context() as patched:
        patched.setattr(choosing, "measure", never)
        second = choose(made, RunConfig(), choices=(ALL_BUT_MATH,))
    assert second.table.findings == first.table.findings and backends(made) == {"sdpa"}
    assert "cache" in second.lines[0]
    # Another batch is another shape; both are kept.
    other = model()
    choose(other, RunConfig(), choices=(ALL_BUT_MATH,), batch=5)
    assert backends(other) == {"math"}
    kept = table.Table.from_json(path.read_text()).findings["attention"]
    assert len(kept) == 2 * len(first.table.findings["attention"])
    # Other candidates, as a later version has them, are measured.
    fewer = dataclasses.replace(ALL_BUT_MATH, candidates=lambda use, device: {
        name: run for name, run in ALL_BUT_MATH.candidates(use, device).items() if name != "sdpa_math"
    })  # fmt: skip
    made = model()
    choose(made, RunConfig(), choices=(fewer,))
    assert backends(made) == {"math"}


def test_a_damaged_cache_is_left_out_with_one_warning_and_written_anew(as_on_a_gpu, cache, monkeypatch):
    """What is measured is said here, so that no other program has a part in it."""

    def says(name: str) -> None:
        def measure(choice, use, default, device, deadline):
            return Finding(chosen=name, default=default, reason="for a test", times_ms={name: 1.0})

        monkeypatch.setattr(choosing, "measure", measure)

    says("sdpa")
    choose(model(), RunConfig(), choices=(ATTENTION,))
    (path,) = cache.iterdir()
    says("math")
    for content in (b"{", b"[]", b'{"format": 99}', b'{"format": 1, "source": 1}', b"\xff"):
        path.write_bytes(content)
        made = model()
        chosen = choose(made, RunConfig(), choices=(ATTENTION,))
        assert [line for line in chosen.lines if "WARNING" in line] == [chosen.lines[0]], content
        assert f"{path} is damaged and is not used" in chosen.lines[0], content
        assert backends(made) == {"math"}, content
        assert table.Table.from_json(path.read_text()).findings == chosen.table.findings, content


def test_a_cache_of_other_libraries_is_another_file(as_on_a_gpu, cache, monkeypatch):
    choose(model(), RunConfig(), choices=(ALL_BUT_SDPA,))
    monkeypatch.setattr(table, "__version__", "99")
    made = model()
    choose(made, RunConfig(), choices=(ALL_BUT_MATH,))
    assert backends(made) == {"math"} and len(list(cache.iterdir())) == 2


def test_a_cache_that_cannot_be_written_is_said_and_no_reason_to_stop(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    chosen = choose(model(), choices=(ATTENTION,))
    assert sum("are not kept for later runs" in line for line in chosen.lines) == 1


def record_of(tmp_path, choices=(ALL_BUT_SDPA,)):
    path = tmp_path / table.NAME
    path.write_text(choose(model(), choices=choices).table.to_json())
    return path


def test_a_table_of_another_run_is_taken_and_what_it_lacks_is_by_rule(tmp_path, monkeypatch):
    path = record_of(tmp_path)
    monkeypatch.setattr(choosing, "measure", never)
    made = model()
    chosen = choose(made, RunConfig(choices=str(path)))
    assert backends(made) == {"sdpa"} and chosen.table.source == str(path)
    norms = chosen.table.findings["norm"].values()
    assert {(finding.chosen, finding.reason) for finding in norms} == {("torch", f"not in {path}")}
    made = model()
    choose(made, RunConfig(choices=str(path)), batch=4)
    assert backends(made) == {"math"}


@pytest.mark.parametrize("asked", ["auto", "measure", "/nowhere/choices.json"])
def test_a_resumed_run_takes_its_record_whatever_is_faster_now(asked, tmp_path, monkeypatch):
    path = record_of(tmp_path)
    monkeypatch.setattr(choosing, "measure", never)
    made = model()
    chosen = choose(made, RunConfig(choices=asked), record=path, choices=(ALL_BUT_MATH,))
    assert backends(made) == {"sdpa"} and "the run's own record" in chosen.lines[0]
    assert chosen.table.findings == table.read_table(path, mend="").findings


def test_a_run_that_computed_by_rule_goes_on_by_rule(as_on_a_gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(choosing, "find_places", never)
    path = tmp_path / table.NAME
    path.write_text(choose(model(), RunConfig(choices="default")).table.to_json())
    assert choose(model(), RunConfig(), record=path).lines == ["choices by rule (default)"]
    # So does one of a version that had no choices.
    lines = choose(model(), RunConfig(), record=tmp_path / "none" / table.NAME).lines
    assert len(lines) == 2 and "goes on by rule" in lines[1]


def rewritten(path, chosen):
    values = json.loads(path.read_text())
    for finding in values["findings"]["attention"].values():
        finding["chosen"] = chosen
    path.write_text(json.dumps(values))
    return path


@pytest.mark.parametrize("name", ["xformers", "gone"])
def test_a_recorded_choice_that_is_not_there_any_more_is_refused_with_the_mend(name, tmp_path):
    path = rewritten(record_of(tmp_path), name)
    with pytest.raises(UserError, match=rf"^choices says {name} for attention of B 3 .*give --change choices") as told:
        choose(model(), RunConfig(), record=path)
    assert "\n" not in str(told.value)
    with pytest.raises(UserError, match=rf"^choices says {name} .*: give --choices auto, measure, default, or"):
        choose(model(), RunConfig(choices=str(path)))


@pytest.mark.parametrize("text", [None, "{", '{"format": 2}'])
def test_a_table_that_cannot_be_read_is_named_with_the_mend(text, tmp_path):
    path = tmp_path / table.NAME
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=rf"^choices is {path}, which .*: give --choices auto, measure, default, or"):
        choose(model(), RunConfig(choices=str(path)))
    if text is not None:
        with pytest.raises(UserError, match=rf"^choices is {path}, .*or give --change choices"):
            choose(model(), RunConfig(), record=path)


@pytest.mark.parametrize("change", [(), ("choices",)])
def test_a_change_on_purpose_chooses_anew(change, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(choosing, "choose", lambda model, **options: asked.append(options["record"]))
    run = RunConfig(resume="auto", change=change)
    plan = SimpleNamespace(
        config=SimpleNamespace(run=run), ranks=ONE, micro_batch=3,
        resumed_from=SimpleNamespace(path=tmp_path / "checkpoints" / "step-00000002"),
    )  # fmt: skip
    choosing.choose_for_run(plan, None, compiled=False)
    assert asked == [None if change else tmp_path / "choices.json"]


def test_our_kernels_stand_in_compiled_regions_where_they_are_chosen():
    torch._dynamo.reset()
    made = model()
    for module in made.modules():
        if isinstance(module, ResidualNorm | Mlp):
            module.execution = Execution(norm_in_regions=True, gelu_in_regions=True)
    choice = compile_regions(made, 3, CPU, backend="aot_eager")
    assert choice.on, choice.reason
    torch._dynamo.reset()


def test_norm_and_gelu_of_regions_are_chosen_between_ours_and_the_compiler(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr("mirl.engine.training.choices.declaration.REGION_BACKEND", "aot_eager")
    made = model()
    norm, gelu = (with_slow("inductor", choice=choice) for choice in (NORM, GELU))
    chosen = choose(made, choices=(norm, gelu), compiled=True, limit_s=120)
    inside = [
        (use, finding) for uses in chosen.table.findings.values() for use, finding in uses.items() if "region" in use
    ]
    assert len(inside) >= 4
    for use, finding in inside:
        assert set(finding.times_ms) == {"inductor", "ours"}, (use, finding.excluded)
        assert finding.chosen == "ours"
    block = made.encoder.blocks[0]
    assert block.norm1.execution.norm_in_regions and block.mlp.execution.gelu_in_regions
    assert not block.norm1.execution.fused_norm
    torch._dynamo.reset()
