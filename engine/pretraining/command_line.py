"""What `engine/pretrain.py` offers on its command line."""

from __future__ import annotations

from collections.abc import Sequence

from mirl.engine.configuration.config import PretrainConfig
from mirl.engine.configuration.flags import CommandLine, parse
from mirl.engine.pretraining.recipe_sizes import SIZES
from mirl.engine.pretraining.recipes import DEFAULT_RECIPE, DEFAULT_WITH_DATA, RECIPES

PRETRAIN = CommandLine(
    kind=PretrainConfig,
    recipes=RECIPES,
    default=DEFAULT_RECIPE,
    default_with_data=DEFAULT_WITH_DATA,
    command="pretrain",
    module="mirl.engine.pretrain",
    arguments="[--recipe NAME] [--data PATH ...] [flags]",
    description="Pre-train a Vision Transformer by Masked Image Residual Learning.",
    sizes=SIZES,
)


def parse_pretrain(argv: Sequence[str]) -> PretrainConfig:
    """The pre-training configuration that ``argv`` asks for; see `parse`."""
    return parse(PRETRAIN, argv)
