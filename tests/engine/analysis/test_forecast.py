"""What a depth report says of its time, under a clock that is not real and of work that is."""

from __future__ import annotations

import re

import pytest
import torch

from mirl.engine.analysis import depth
from mirl.engine.analysis.depth_forecast import FEATURES, FINETUNINGS, GRADIENTS, PROBES, forecast
from mirl.engine.analysis.forecast import Forecast, Part, minutes
from mirl.engine.analysis.in_memory import ShortFinetune
from mirl.engine.transfer.classification.classifier import Classifier, encoder_config
from tests.engine.models.helpers import make_model, tiny_config


class Clock:
    now = 50.0

    def __call__(self) -> float:
        return self.now


def test_what_is_left_follows_what_was_measured():
    clock, lines = Clock(), []
    plan = Forecast(
        [Part(name="one", unit="image", units=40, seconds=1.0), Part(name="two", unit="step", units=10, seconds=6.0)],
        say=lines.append,
        clock=clock,
    )
    assert str(plan) == "about 1:40: one 0:40, two 1:00"
    advance = plan.begin("one")
    for _ in range(20):  # it takes half as long again as the guess
        clock.now += 3.0
        advance(2)
    assert plan.seconds == pytest.approx(60.0)
    advance = plan.begin("two")
    clock.now += 12.0
    advance(1)
    assert plan.seconds == pytest.approx(9 * 12.0)
    # One line in ten seconds at most: after 12 s, 24 s, 36 s ...
    assert lines[:2] == ["  image 8 of 40, left 1:48", "  image 16 of 40, left 1:36"] and len(lines) == 6
    assert lines[-1] == "  step 1 of 10, left 1:48"


def test_nothing_is_said_of_work_that_is_over():
    clock, lines = Clock(), []
    plan = Forecast([Part(name="one", unit="image", units=1, seconds=1.0)], say=lines.append, clock=clock)
    clock.now += 100
    plan.begin("one")(1)
    assert lines == [] and plan.seconds == 0


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (3599.7, "1:00:00"), (7265, "2:01:05")])
def test_minutes(seconds, text):
    assert minutes(seconds) == text


def test_a_forecast_leaves_what_is_measured_as_it_was():
    config = tiny_config(segments=2, image_height=16, image_width=16)
    model = make_model(config, dtype=torch.float32)
    state = model.encoder.state_dict()
    weights = {name: value for name, value in state.items() if not name.startswith("segment_norms.")}
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 16, 16, 3), generator=generator, dtype=torch.uint8)
    data = depth.LabelledImages(images=images, labels=torch.arange(40) % 2, classes=["a", "b"])
    recipe = ShortFinetune(steps=4, batch_size=8)
    encoder = Classifier(encoder_config(config), num_classes=2).eval()

    def measure():
        norms = depth.gradient_norms(model, images, seed=1)
        features = depth.features_by_block(encoder, data)
        probes = depth.probe_accuracies(features, features, epochs=2, seed=1)
        return norms, probes, depth.reinit_accuracies(config, weights, data, data, cuts=2, recipe=recipe, seed=1)

    before = measure()
    lines: list[str] = []
    plan = forecast(
        say=lines.append, model=model, gradient_images=images, encoder=encoder, train=data, val=data, probe_epochs=2,
        source=config, weights=weights, cuts=2, recipe=recipe, seed=1,
    )  # fmt: skip
    assert measure() == before
    units = {part.name: part.units for part in plan.parts}
    assert units == {GRADIENTS: 40, FEATURES: 80, PROBES: config.depth, FINETUNINGS: 3 * recipe.steps}
    assert all(part.seconds > 0 for part in plan.parts)
    assert re.fullmatch(r"about \d+:\d\d: .*", str(plan)) and lines == []

    told: dict[str, int] = dict.fromkeys(units, 0)

    def counting(name):
        return lambda number: told.update({name: told[name] + number})

    depth.gradient_norms(model, images, seed=1, advance=counting(GRADIENTS))
    features = [depth.features_by_block(encoder, data, advance=counting(FEATURES)) for _ in range(2)]
    depth.probe_accuracies(*features, epochs=2, seed=1, advance=counting(PROBES))
    depth.reinit_accuracies(config, weights, data, data, cuts=2, recipe=recipe, seed=1, advance=counting(FINETUNINGS))
    assert told == units
