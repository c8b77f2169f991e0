"""This is the Python face of the engine: Masked Image Residual Learning (MIRL).

    import mirl

    config = mirl.recipe("small_data", data="photographs/", steps=2000, out="runs/mine")
    run = mirl.pretrain(config)
    encoder = mirl.load_frozen_encoder(run)

Importing this package costs no torch: a name is imported when it is first used. `docs/python.md` shows the names at
work.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

_HERE = Path(__file__).resolve().parent
if not (_HERE / "engine").is_dir():
    # In a checkout engine/, kernels/, dataloaders/ and ds_configs/ stand beside this folder; a wheel has them inside.
    __path__.append(str(_HERE.parent))
    # The checkout goes behind everything else, so that `import kernels` still finds Hugging Face's package.
    sys.path.sort(key=lambda entry: os.path.realpath(entry or os.curdir) == str(_HERE.parent))

if TYPE_CHECKING:
    from mirl.dataloaders import build_eval_loader, build_train_loader, load_images
    from mirl.engine.analysis.features import extract_features, features, load_frozen_encoder
    from mirl.engine.checkpoints.pretrained import load_encoder, load_pretrained
    from mirl.engine.configuration.config import PretrainConfig
    from mirl.engine.models import MIRL, ModelConfig, mask_from_noise, model_config
    from mirl.engine.pretraining.pictures import reconstruct, save_grid
    from mirl.engine.pretraining.recipes import recipe
    from mirl.engine.pretraining.run import pretrain
    from mirl.engine.transfer.classification.config import FinetuneConfig
    from mirl.engine.transfer.classification.load import load_classifier
    from mirl.engine.transfer.classification.recipes import finetune_recipe
    from mirl.engine.transfer.classification.run import finetune
    from mirl.engine.transfer.detection.config import DetectConfig
    from mirl.engine.transfer.detection.load import load_detector
    from mirl.engine.transfer.detection.recipes import detect_recipe
    from mirl.engine.transfer.detection.run import detect
    from mirl.engine.transfer.segmentation.config import SegmentConfig
    from mirl.engine.transfer.segmentation.load import load_segmenter
    from mirl.engine.transfer.segmentation.recipes import segment_recipe
    from mirl.engine.transfer.segmentation.run import segment
    from mirl.engine.version import __version__
    from mirl.errors import UserError

# The module that defines each name of the face.
_HOMES = {
    "build_eval_loader": "dataloaders",
    "build_train_loader": "dataloaders",
    "load_images": "dataloaders",
    "extract_features": "engine.analysis.features",
    "features": "engine.analysis.features",
    "load_frozen_encoder": "engine.analysis.features",
    "load_encoder": "engine.checkpoints.pretrained",
    "load_pretrained": "engine.checkpoints.pretrained",
    "PretrainConfig": "engine.configuration.config",
    "MIRL": "engine.models",
    "ModelConfig": "engine.models",
    "mask_from_noise": "engine.models",
    "model_config": "engine.models",
    "reconstruct": "engine.pretraining.pictures",
    "save_grid": "engine.pretraining.pictures",
    "recipe": "engine.pretraining.recipes",
    "pretrain": "engine.pretraining.run",
    "FinetuneConfig": "engine.transfer.classification.config",
    "load_classifier": "engine.transfer.classification.load",
    "finetune_recipe": "engine.transfer.classification.recipes",
    "finetune": "engine.transfer.classification.run",
    "DetectConfig": "engine.transfer.detection.config",
    "load_detector": "engine.transfer.detection.load",
    "detect_recipe": "engine.transfer.detection.recipes",
    "detect": "engine.transfer.detection.run",
    "SegmentConfig": "engine.transfer.segmentation.config",
    "load_segmenter": "engine.transfer.segmentation.load",
    "segment_recipe": "engine.transfer.segmentation.recipes",
    "segment": "engine.transfer.segmentation.run",
    "__version__": "engine.version",
    "UserError": "errors",
}

__all__ = [
    "MIRL",
    "DetectConfig",
    "FinetuneConfig",
    "ModelConfig",
    "PretrainConfig",
    "SegmentConfig",
    "UserError",
    "__version__",
    "build_eval_loader",
    "build_train_loader",
    "detect",
    "detect_recipe",
    "extract_features",
    "features",
    "finetune",
    "finetune_recipe",
    "load_classifier",
    "load_detector",
    "load_encoder",
    "load_frozen_encoder",
    "load_images",
    "load_pretrained",
    "load_segmenter",
    "mask_from_noise",
    "model_config",
    "pretrain",
    "recipe",
    "reconstruct",
    "save_grid",
    "segment",
    "segment_recipe",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
