"""What a run does about its choices: takes a record, or measures on rank 0, and all ranks follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mirl.engine.configuration.config import RunConfig
from mirl.engine.distributed.launch import Ranks
from mirl.engine.training.choices.declaration import Choice
from mirl.engine.training.choices.measuring import LIMIT_S, Deadline, Finding, measure, try_out, warm_up_compiler
from mirl.engine.training.choices.registry import CHOICES
from mirl.engine.training.choices.table import (
    DEFAULT,
    MEASURED,
    NAME,
    Table,
    environment_of,
    read_cache,
    read_table,
    write_cache,
)
from mirl.engine.training.choices.uses import Place, find_places
from mirl.engine.training.plan import RunPlan, agree_on_main
from mirl.errors import UserError

AUTO, MEASURE = "auto", "measure"
MEND = "give --choices auto, measure, default, or choices.json of another run"
ANEW = "give --change choices to choose anew"


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What all ranks use, and lines for the log: the table, or a word that everything is by rule."""

    table: Table
    lines: list[str]


@dataclass(frozen=True, kw_only=True)
class _Start:
    """What is known before anything is measured, whether the rest is measured, and what a missing candidate means."""

    known: Table
    measuring: bool
    from_cache: bool = False
    mend: str = MEND
    lines: tuple[str, ...] = ()


def choose_for_run(plan: RunPlan[Any], model: Any, *, compiled: bool, besides: Sequence[Place] = ()) -> Chosen:
    """`choose` for the run of ``plan``; ``compiled``: its regions will be."""
    run, resumed = plan.config.run, plan.resumed_from
    kept = resumed.path.parents[1] / NAME if resumed is not None and "choices" not in run.change else None
    return choose(
        model, ranks=plan.ranks, run=run, batch=plan.micro_batch, compiled=compiled, record=kept, besides=besides
    )


def choose(
    model: Any, *, ranks: Ranks, run: RunConfig, batch: int, compiled: bool, record: Path | None = None,
    choices: Sequence[Choice] = CHOICES, limit_s: float = LIMIT_S, besides: Sequence[Place] = (),
) -> Chosen:  # fmt: skip
    """Choose for steps of ``batch`` images and set ``model`` so, alike on all ranks.

    record: choices.json of the run that is resumed, which decides over ``run.choices``; None for a new run. besides:
    places that are no module's of ``model``; they come first.

    Raises:
        UserError: a table cannot be read, or names a candidate that some rank cannot run.
    """
    start = agree_on_main(ranks, lambda: _start(run, ranks.device, record))
    if not start.measuring and not start.known.findings:
        return Chosen(table=replace(start.known, source=DEFAULT), lines=["choices by rule (default)", *start.lines])
    places = [*besides, *find_places(model, choices, run, batch, ranks.device, compiled=compiled)]
    table, lines = agree_on_main(ranks, lambda: _fill(places, start, ranks.device, limit_s))
    _require_everywhere(places, table, ranks, start.mend)
    for place, finding in _pairs(places, table):
        for module in place.modules:
            place.choice.apply(model, module, finding.chosen, place.use.in_region)
    if ranks.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(ranks.device)
    return Chosen(table=table, lines=[*start.lines, *lines, *describe(places, table)])


def measures_unasked(device: torch.device) -> bool:
    """Whether "auto" measures on ``device``: a CPU would lose more time than it gains."""
    return device.type == "cuda"


def _start(run: RunConfig, device: torch.device, record: Path | None) -> _Start:
    environment = environment_of(device)
    nothing = Table(source=DEFAULT, environment=environment)
    unasked, asked = measures_unasked(device), run.choices
    if record is not None:
        if not record.exists():
            # Of a version without choices, or moved: it has computed by rule, or none knows how.
            told = (f"no {record}: the resumed run goes on by rule",) if unasked else ()
            return _Start(known=nothing, measuring=False, lines=told)
        known = read_table(record, mend=f"bring it back, or {ANEW}")
        known = replace(known, source=f"the run's own record, {record}")
        # What it lacks has another shape than before, in which no step of this run was computed.
        measuring = bool(known.findings) and (asked == MEASURE or (asked == AUTO and unasked))
        return _Start(known=known, measuring=measuring, mend=ANEW)
    if asked == DEFAULT or (asked == AUTO and not unasked):
        return _Start(known=nothing, measuring=False)
    if asked == MEASURE:
        return _Start(known=replace(nothing, source=MEASURED), measuring=True)
    if asked == AUTO:
        known, lines = read_cache(environment)
        return _Start(known=known, measuring=True, from_cache=True, lines=tuple(lines))
    known = read_table(Path(asked), mend=MEND)
    return _Start(known=replace(known, source=asked), measuring=False, mend=MEND)


def _fill(places: Sequence[Place], start: _Start, device: torch.device, limit_s: float) -> tuple[Table, list[str]]:
    """A finding for each of ``places``: the known one, a measured one, or the default. What was measured goes into the
    user's cache, and a line comes back where it cannot.
    """
    if start.measuring and any(place.use.in_region for place in places):
        warm_up_compiler(device)
    deadline = Deadline(limit_s)
    findings: dict[str, dict[str, Finding]] = {}
    fresh: dict[str, dict[str, Finding]] = {}
    for place in places:
        finding = start.known.find(place.choice.name, place.use.key)
        if finding is not None and start.from_cache and not _still_holds(place, finding, device):
            finding = None
        if finding is None and start.measuring:
            finding = measure(place.choice, place.use, place.default, device, deadline)
            fresh.setdefault(place.choice.name, {})[place.use.key] = finding
        elif finding is None:
            reason = f"not in {start.known.source}"
            finding = Finding(chosen=place.default, default=place.default, reason=reason, measured=False)
        findings.setdefault(place.choice.name, {})[place.use.key] = finding
    if not fresh:
        return replace(start.known, findings=findings, seconds=0.0), []
    here = environment_of(device)
    table = Table(source=MEASURED, environment=here, seconds=deadline.spent, findings=findings)
    return table, write_cache(replace(table, findings=fresh))


def _still_holds(place: Place, finding: Finding, device: torch.device) -> bool:
    """Whether a cached finding is of the candidates and the default of today."""
    candidates = set(place.choice.candidates(place.use, device))
    told = set(finding.times_ms) | set(finding.excluded)
    return told == candidates and finding.default == place.default and finding.chosen in candidates


def _pairs(places: Sequence[Place], table: Table) -> list[tuple[Place, Finding]]:
    """Each place with what the table says; the same on all ranks, which have the same places."""
    found = []
    for place in places:
        finding = table.find(place.choice.name, place.use.key)
        assert finding is not None, f"rank 0 has no {place.choice.name} of {place.use.key}"
        found.append((place, finding))
    return found


def _require_everywhere(places: Sequence[Place], table: Table, ranks: Ranks, mend: str) -> None:
    problem = None
    for place, finding in _pairs(places, table):
        if finding.chosen == place.default:
            continue
        failure = try_out(place.choice, place.use, finding.chosen, ranks.device)
        if failure is not None:
            problem = f"choices says {finding.chosen} for {place.choice.name} of {place.use.key}, which cannot run"
            problem += f" on rank {ranks.rank} ({failure}): {mend}"
            break
    problems = [text for text in ranks.gather(problem) if text]
    if problems:
        raise UserError(problems[0])


def describe(places: Sequence[Place], table: Table) -> list[str]:
    """The table as lines for the log."""
    where = f"measured in {table.seconds:.1f} s on rank 0" if table.seconds else f"from {table.source}"
    if table.source == MEASURED and not table.seconds:
        where = "measured before (the user's cache)"
    lines = [f"choices {where}; forward and backward, ms:"]
    for place, finding in sorted(_pairs(places, table), key=lambda pair: pair[0].choice.name):
        times = sorted(finding.times_ms.items(), key=lambda item: item[1])
        shown = ", ".join(f"{name} {milliseconds:.3f}" for name, milliseconds in times)
        modules = f"{len(place.modules)} x " if len(place.modules) > 1 else ""
        lines.append(
            f"  {place.choice.name:<9} {modules}{place.use.key}: {finding.chosen} ({finding.reason})"
            + (f"; {shown}" if shown else "")
        )
        lines += [f"    without {name}: {reason}" for name, reason in finding.excluded.items()]
    return lines
