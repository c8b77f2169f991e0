"""The head that begins as a linear probe, what it is fitted to, and the line that holds the result against it."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch.nn import functional as F

from mirl.engine.transfer.classification import head_probe
from mirl.engine.transfer.classification.classifier import Classifier
from mirl.engine.transfer.classification.head_probe import compare_with_start, recorded_start, set_head
from mirl.engine.transfer.classification.linear_probe import LabelledFeatures, train_linear_probe
from tests.engine.models.helpers import tiny_config

CLASSES = 3


def labelled(n: int, seed: int, noise: float = 1.0) -> LabelledFeatures:
    """Three clusters, off the origin and of unequal deviations, as features are."""
    generator = torch.Generator().manual_seed(seed)
    width = tiny_config().width
    centres = torch.randn(CLASSES, width, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(n) % CLASSES
    scale = torch.linspace(0.2, 3, width)
    features = 5 + scale * (centres[labels] + noise * torch.randn(n, width, generator=generator))
    return LabelledFeatures(features=features, labels=labels, classes=None)


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_the_head_gives_the_logits_of_the_probe(pool):
    train = labelled(120, 1)
    probe = train_linear_probe(train, num_classes=CLASSES, epochs=20, seed=0, by_loss=True)
    model = Classifier(tiny_config(), num_classes=CLASSES, pool=pool)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    set_head(model, probe)
    torch.testing.assert_close(model.head(train.features), probe(train.features), rtol=1e-4, atol=1e-4)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"head.weight", "head.bias"}


def test_the_rate_by_loss_is_the_better_start():
    # Hardly separable and few: the most right answers come with weights that are far too sure of themselves.
    train, fresh = labelled(90, 1, noise=6.0), labelled(600, 2, noise=6.0)
    losses = {}
    for by_loss in (False, True):
        probe = train_linear_probe(train, num_classes=CLASSES, epochs=200, seed=0, by_loss=by_loss)
        losses[by_loss] = (probe.rate, F.cross_entropy(probe(fresh.features), fresh.labels).item())
    assert losses[True][0] != losses[False][0] and losses[True][1] < losses[False][1]
    assert losses[True][0] == min(head_probe_rates(train), key=lambda item: item[1])[0]


def head_probe_rates(train: LabelledFeatures) -> list[tuple[float, float]]:
    """(rate, held-out loss) by a plain loop."""
    from mirl.engine.transfer.classification import linear_probe as module

    kept, held = module.hold_out(train.labels, 0)
    variance, mean = torch.var_mean(train.features, dim=0, correction=0)
    standard = (train.features - mean) / (variance + 1e-6).sqrt()
    data = LabelledFeatures(features=standard[kept], labels=train.labels[kept], classes=None)
    found = []
    for rate in module.RATES:
        weight, bias = module._train(data, CLASSES, (rate,), 200, 0)
        loss = F.cross_entropy(standard[held] @ weight[0].T + bias[0], train.labels[held])
        found.append((rate, round(loss.item(), 6)))
    return found


def test_no_probe_where_nothing_can_be_held_out_or_a_label_is_wrong():
    few = labelled(3, 1)
    probe, top1, problem = head_probe._fit(few, None, CLASSES, 0)
    assert probe is None and top1 is None and "no class has two training images" in problem
    wrong = dataclasses.replace(labelled(30, 1), labels=torch.full((30,), 7))
    assert "data has label 7 and num_classes is 3: give at least 8" in head_probe._fit(wrong, None, CLASSES, 0)[2]
    nothing = LabelledFeatures(features=torch.empty(0, 4), labels=torch.empty(0, dtype=torch.int64), classes=None)
    assert head_probe._fit(nothing, None, CLASSES, 0)[2]


def test_top_1_is_that_of_the_evaluation_set():
    train, val = labelled(300, 1, noise=0.5), labelled(30, 2, noise=0.5)
    assert head_probe._fit(train, val, CLASSES, 0)[1] > 90
    rotated = dataclasses.replace(val, labels=(val.labels + 1) % CLASSES)
    assert head_probe._fit(train, rotated, CLASSES, 0)[1] < 10


def test_one_line_holds_the_result_against_the_probe():
    assert compare_with_start(70.0, 71.25, "").startswith("BELOW THE PROBE: top-1 70.00%; ")
    assert "BELOW" not in compare_with_start(71.25, 71.25, "") and "71.25%" in compare_with_start(72.0, 71.25, "")
    assert compare_with_start(70.0, None, "too many images").endswith(": too many images")


def test_a_resumed_run_finds_what_was_recorded(tmp_path):
    assert recorded_start(tmp_path) is None
    lines = [{"step": 1, "loss": 2.0}, {"step": 2, head_probe.RECORDED: 61.5}, {"step": 3, "loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"cut sh')
    assert recorded_start(tmp_path) == 61.5
