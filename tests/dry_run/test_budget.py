"""A step needs no more operators, launches and bytes than its budget says, and the budget says why."""

from __future__ import annotations

from collections import Counter

import pytest

from mirl.engine.accounting.flops import training_flops_per_image
from mirl.engine.accounting.operators import CLASSES
from mirl.engine.models import ExactSkips
from tests.dry_run.budget import FIGURES, figures, read
from tests.dry_run.cases import MODELS, step_of

WRITE = 'python -m tests.dry_run.budget --why "..."'


def over(now: dict[str, int], allowed: dict[str, int]) -> list[str]:
    """The figures that are past their budget, or so far below that the budget holds nothing any more."""
    found = []
    for key in FIGURES:
        if now[key] > allowed[key]:
            found.append(f"{key} {now[key]}, budget {allowed[key]}: if that has to be, {WRITE}")
        elif now[key] < 0.98 * allowed[key]:
            found.append(f"{key} {now[key]} of a budget of {allowed[key]}: take the gain down, {WRITE}")
    return found


@pytest.mark.parametrize("name", MODELS)
def test_a_step_keeps_its_budget(name):
    assert over(figures(step_of(name)), read()[name][-1]) == []


def test_the_budget_is_of_these_cases_and_every_entry_has_its_reason():
    entries = read()
    assert set(entries) == set(MODELS)
    for history in entries.values():
        assert all(set(entry) == {*FIGURES, "why"} and len(entry["why"].split()) >= 3 for entry in history)


def test_one_more_operator_or_byte_is_past_the_budget():
    allowed = read()["vit_b"][-1]
    for key in FIGURES:
        (line,) = over(allowed | {key: allowed[key] + 1}, allowed)
        assert line.startswith(f"{key} {allowed[key] + 1}, budget {allowed[key]}")
    assert over(allowed | {"launches": allowed["launches"] // 2}, allowed)


@pytest.mark.parametrize("name", MODELS)
def test_flops_of_the_operators_are_those_of_the_formulas(name):
    """The formulas count two products backward for each forward, the operators FlashAttention's further one, which
    makes the weights again, and the rows of the mask tokens' table, once a batch.
    """
    step = step_of(name)
    by_class: Counter[str] = Counter()
    for operator, count in step.operators.items():
        by_class[operator.kind] += count * operator.flops
    assert set(by_class) <= set(CLASSES)
    counted = (step.flops - by_class["attention"] / 7) / step.batch
    assert counted == pytest.approx(training_flops_per_image(MODELS[name](), ExactSkips()), rel=5e-3)
