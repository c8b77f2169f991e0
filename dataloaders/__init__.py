"""Images for training: listing, order, augmentation, decoding with DALI, and the tools that prepare a data set.

Needs nvidia-dali only when pictures are decoded; importing this package does not.
"""

from mirl.dataloaders.errors import BadImage, ImageError, StorageLost, TooManyBadImages
from mirl.dataloaders.eval_loader import EvalLoader, build_eval_loader
from mirl.dataloaders.few_images import load_images
from mirl.dataloaders.sources.base import SubsetSource
from mirl.dataloaders.sources.opening import open_source
from mirl.dataloaders.stream import Batch
from mirl.dataloaders.tools.demo import prepare_demo
from mirl.dataloaders.train_loader import TrainLoader, build_train_loader
from mirl.dataloaders.typical import typical_image_bytes

__all__ = [
    "BadImage",
    "Batch",
    "EvalLoader",
    "ImageError",
    "StorageLost",
    "SubsetSource",
    "TooManyBadImages",
    "TrainLoader",
    "build_eval_loader",
    "build_train_loader",
    "load_images",
    "open_source",
    "prepare_demo",
    "typical_image_bytes",
]
