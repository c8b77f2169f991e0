"""This package gives images to training: listing, order, augmentation, decoding with DALI, tools that prepare data.

It needs nvidia-dali only when pictures are decoded, not when it is imported. Names are resolved on first use, so that
data can be listed and its classes compared without importing torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mirl.dataloaders.errors import BadImage, ImageError, StorageLost, TooManyBadImages
    from mirl.dataloaders.eval_loader import EvalLoader, build_eval_loader
    from mirl.dataloaders.few_images import load_images
    from mirl.dataloaders.sources.base import SubsetSource
    from mirl.dataloaders.sources.opening import open_source
    from mirl.dataloaders.stream import Batch
    from mirl.dataloaders.tools.demo import prepare_demo
    from mirl.dataloaders.train_loader import TrainLoader, build_train_loader
    from mirl.dataloaders.typical import typical_image_bytes

_HOMES = {
    "BadImage": "errors",
    "ImageError": "errors",
    "StorageLost": "errors",
    "TooManyBadImages": "errors",
    "EvalLoader": "eval_loader",
    "build_eval_loader": "eval_loader",
    "load_images": "few_images",
    "SubsetSource": "sources.base",
    "open_source": "sources.opening",
    "Batch": "stream",
    "prepare_demo": "tools.demo",
    "TrainLoader": "train_loader",
    "build_train_loader": "train_loader",
    "typical_image_bytes": "typical",
}

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


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
