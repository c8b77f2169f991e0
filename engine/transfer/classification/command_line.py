"""`engine/finetune.py` offers this command line."""

from __future__ import annotations

from mirl.engine.configuration.flags import CommandLine
from mirl.engine.transfer.classification.config import FinetuneConfig
from mirl.engine.transfer.classification.recipe_sizes import SIZES
from mirl.engine.transfer.classification.recipes import DEFAULT_RECIPE, RECIPES

FINETUNE = CommandLine(
    kind=FinetuneConfig,
    recipes=RECIPES,
    default=DEFAULT_RECIPE,
    command="finetune",
    module="mirl.engine.finetune",
    arguments="--checkpoint RUN --data PATH ... [--val PATH ...] [--recipe NAME] [flags]",
    description="Fine-tune a pre-trained encoder as a classifier, end to end.",
    sizes=SIZES,
    texts={
        "data.data": "labelled images: folder(s) with a sub-folder for each class, text list(s) or shard(s); needed",
        "run.out": "folder of this run: log, metrics, checkpoints",
        "run.seed": "seed of the head, the order of images, crops, augmentation and mixtures: any whole number",
        "run.resume": "auto: go on from the newest good checkpoint in --out; or the path of a fine-tuning checkpoint",
    },
)
