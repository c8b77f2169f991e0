"""What `engine/finetune.py` offers on its command line."""

from __future__ import annotations

from mirl.engine.configuration.flags import CommandLine
from mirl.engine.transfer.classification.config import FinetuneConfig
from mirl.engine.transfer.classification.recipes import DEFAULT_RECIPE, RECIPES

FINETUNE = CommandLine(
    kind=FinetuneConfig,
    recipes=RECIPES,
    default=DEFAULT_RECIPE,
    prog="engine/finetune.py",
    usage="deepspeed engine/finetune.py --checkpoint RUN --data PATH ... [--val PATH ...] [--recipe NAME] [flags]",
    description="Fine-tune a pre-trained encoder as a classifier, end to end.",
)
