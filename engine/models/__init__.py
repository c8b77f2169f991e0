"""This room holds the network of Masked Image Residual Learning: the encoder, decoders with densely connected inputs
(DID), and the residual objective.

    from mirl.engine.models import MIRL, model_config

    model = MIRL(model_config("vit_b_48"))
    output = model(images, noise=torch.rand(len(images), model.config.num_patches))
    output.loss.backward()

Names are resolved on first use, so that a configuration can be read and checked without importing torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "MODEL_NAMES": "config",
    "ModelConfig": "config",
    "model_config": "config",
    "PatchMask": "masking",
    "mask_from_noise": "masking",
    "Execution": "execution",
    "ExactSkips": "skips",
    "MIRL": "mirl",
    "MIRLOutput": "mirl",
    "read_release_checkpoint": "interop.release",
    "release_to_state_dict": "interop.release",
    "load_release": "interop.release",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
