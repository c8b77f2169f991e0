"""`engine/detect.py` offers this command line."""

from __future__ import annotations

from mirl.engine.configuration.flags import CommandLine
from mirl.engine.transfer.detection.config import DetectConfig
from mirl.engine.transfer.detection.recipe_sizes import SIZES
from mirl.engine.transfer.detection.recipes import DEFAULT_RECIPE, RECIPES

DETECT = CommandLine(
    kind=DetectConfig,
    recipes=RECIPES,
    default=DEFAULT_RECIPE,
    command="detect",
    module="mirl.engine.detect",
    arguments="--checkpoint RUN --data DIR --annotations FILE [--val DIR --val-annotations FILE] [flags]",
    description="Train a detector with masks, Mask R-CNN on a pre-trained encoder, end to end.\n"
    "--demo, short for --recipe demo, trains a small one on made-up pictures, in some minutes.",
    sizes=SIZES,
    texts={
        "data.data": "folder of the images that --annotations lists; needed",
        "data.flip": "mirror every other image, with its objects, at random",
        "run.out": "folder of this run: log, metrics, pictures, results, checkpoints",
        "run.seed": "seed of the heads, the order of images, sizes and crops: any whole number",
        "run.resume": "auto: go on from the newest good checkpoint in --out; or the path of a detector's checkpoint",
    },
)
