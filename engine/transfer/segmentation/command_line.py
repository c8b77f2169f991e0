"""`engine/segment.py` offers this command line."""

from __future__ import annotations

from mirl.engine.configuration.flags import CommandLine
from mirl.engine.transfer.segmentation.config import SegmentConfig
from mirl.engine.transfer.segmentation.recipe_sizes import SIZES
from mirl.engine.transfer.segmentation.recipes import DEFAULT_RECIPE, RECIPES

SEGMENT = CommandLine(
    kind=SegmentConfig,
    recipes=RECIPES,
    default=DEFAULT_RECIPE,
    command="segment",
    module="mirl.engine.segment",
    arguments="--checkpoint RUN --data PATH ... [--labels DIR ...] [--val PATH ...] [--recipe NAME] [flags]",
    description="Train a segmenter, UperNet on a pre-trained encoder, end to end: a class for every pixel.\n"
    "--demo trains a small one on made-up pictures, in some minutes, and compares it with a fresh encoder.",
    sizes=SIZES,
    texts={
        "data.data": "images: folder(s) beside --labels, a list of lines image<TAB>label image, or a data set laid out "
        "as ADE20K, Cityscapes or VOC; needed",
        "data.flip": "mirror every other crop, with its labels, at random",
        "run.out": "folder of this run: log, metrics, pictures, checkpoints",
        "run.seed": "seed of the heads, the order of images, crops and colours: any whole number",
        "run.resume": "auto: go on from the newest good checkpoint in --out; or the path of a segmenter's checkpoint",
    },
)
