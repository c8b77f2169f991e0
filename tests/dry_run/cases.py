"""The steps that the dry run lists: both variants, and models of the paper at two blocks a segment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

from mirl.engine.accounting.fake_step import FLASH, OWN, FakeStep, fake_step
from mirl.engine.models import MIRL, ModelConfig, model_config

BATCH = 256


def shallow(name: str) -> ModelConfig:
    """A model of the paper with two blocks a segment: the first of a segment, and one like all others."""
    config = model_config(name)
    return replace(config, depth=2 * config.segments)


MODELS: dict[str, Callable[[], ModelConfig]] = {
    "vit_b": lambda: model_config("vit_b"),
    "vit_b, release": lambda: model_config("vit_b", variant="release"),
    "vit_b_48, two blocks a segment": lambda: shallow("vit_b_48"),
    "vit_s_54, two blocks a segment": lambda: shallow("vit_s_54"),
    "vit_s_54, two blocks a segment, our attention": lambda: shallow("vit_s_54"),
}


@cache
def step_of(name: str) -> FakeStep:
    """The whole step of one of `MODELS`, taken once in a run of the tests."""
    attention = OWN if name.endswith("our attention") else FLASH
    return fake_step(lambda: MIRL(MODELS[name]()), BATCH, attention=attention)
