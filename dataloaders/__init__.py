"""Images for training: listing, order, augmentation, decoding with DALI, and the tools that prepare a data set.

Needs nvidia-dali only when pictures are decoded; importing this package does not.
"""

from dataloaders.demo import prepare_demo
from dataloaders.errors import BadImage, ImageError, TooManyBadImages
from dataloaders.eval_loader import EvalLoader, build_eval_loader
from dataloaders.few_images import load_images
from dataloaders.opening import open_source
from dataloaders.sources import SubsetSource
from dataloaders.stream import Batch
from dataloaders.train_loader import TrainLoader, build_train_loader

__all__ = [
    "BadImage",
    "Batch",
    "EvalLoader",
    "ImageError",
    "SubsetSource",
    "TooManyBadImages",
    "TrainLoader",
    "build_eval_loader",
    "build_train_loader",
    "load_images",
    "open_source",
    "prepare_demo",
]
