"""Write the encoder, or a classifier, as timm's VisionTransformer: its state dict and its constructor's arguments.

Our keys are timm's already. Only the positions are added, which timm keeps as a parameter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mirl.dataloaders.decoding.crops import evaluation_crop
from mirl.engine.models.config import ModelConfig
from mirl.engine.models.layers import NORM_EPS
from mirl.engine.models.positions import resample_positions, sincos_positions
from mirl.errors import UserError

# Any entry of timm that makes a VisionTransformer: the arguments below replace all that it sets.
ARCHITECTURE = "vit_base_patch16_224"


def timm_state_dict(
    encoder: Mapping[str, Tensor],
    config: ModelConfig,
    *,
    image_size: tuple[int, int] | None = None,
    head: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return the state dict, float32, that ``VisionTransformer(**timm_arguments(...))`` loads with strict=True.

    encoder: keys as `mirl.engine.checkpoints.pretrained.load_encoder` returns them, with ``pos_embed`` [1 + N, D] where
    positions were trained. image_size: the (height, width) to which positions are resampled; None: that of ``config``.
    head: ``head.weight``, ``head.bias`` and, where the norm comes after the pooling, ``fc_norm.*``; None, or
    ``fc_norm.*`` alone, makes an encoder. UserError if ``image_size`` is not made of whole patches.
    """
    tensors = {key: value for key, value in (*encoder.items(), *(head or {}).items()) if key != "pos_embed"}
    if _norm_after_pool(head):
        tensors = {key: value for key, value in tensors.items() if not key.startswith("norm.")}
    table = encoder.get("pos_embed", sincos_positions(config.grid, config.width))
    table_ND = table.reshape(-1, config.width)
    tensors["pos_embed"] = resample_positions(table_ND, config.grid, grid_of(config, image_size))[None]
    return {key: value.detach().float().contiguous() for key, value in tensors.items()}


def timm_arguments(
    config: ModelConfig,
    *,
    image_size: tuple[int, int] | None = None,
    pool: str = "avg",
    head: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Return the arguments of the constructor of timm's VisionTransformer, as JSON values.

    pool: "avg", the mean of the patch tokens, or "token", the class token.
    """
    return {
        "img_size": list(image_size or (config.image_height, config.image_width)),
        "patch_size": config.patch_size,
        "in_chans": config.channels,
        "num_classes": len((head or {}).get("head.weight", ())),
        "global_pool": pool,
        "embed_dim": config.width,
        "depth": config.built_depth,
        "num_heads": config.heads,
        "mlp_ratio": config.mlp_ratio,
        "qkv_bias": True,
        "class_token": True,
        "no_embed_class": False,
        "fc_norm": _norm_after_pool(head),
        "norm_layer": "layernorm",  # timm's own, whose eps is 1e-6
        "act_layer": "gelu",
    }


def timm_config(
    config: ModelConfig,
    *,
    image_size: tuple[int, int] | None = None,
    pool: str = "avg",
    head: Mapping[str, Tensor] | None = None,
    classes: Sequence[str] = (),
) -> dict[str, Any]:
    """Return config.json of a folder that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` takes.

    ``model_args`` are those of `timm_arguments`; ``mean`` and ``std`` are of values in [0, 1]; the crop is that of our
    evaluation. classes: names by label; without them the file has no label names.
    """
    arguments = timm_arguments(config, image_size=image_size, pool=pool, head=head)
    return ({"label_names": list(classes)} if classes else {}) | {
        "architecture": ARCHITECTURE,
        "num_classes": arguments["num_classes"],
        "num_features": config.width,
        "norm_eps": NORM_EPS,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [config.channels, *arguments["img_size"]],
            "fixed_input_size": True,
            "num_classes": arguments["num_classes"],
            "interpolation": "bicubic",
            "crop_pct": evaluation_crop((arguments["img_size"][0], arguments["img_size"][1])).share,
            "crop_mode": "center",
            "mean": list(config.mean),
            "std": list(config.std),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def grid_of(config: ModelConfig, image_size: tuple[int, int] | None) -> tuple[int, int]:
    """Return the numbers of patches down and across in images of this size."""
    height, width = image_size or (config.image_height, config.image_width)
    side = config.patch_size
    if min(height, width) < side or height % side or width % side:
        raise UserError(f"image_size is {height}x{width} and patch_size is {side}: give multiples of patch_size")
    return height // side, width // side


def _norm_after_pool(head: Mapping[str, Tensor] | None) -> bool:
    return head is not None and "fc_norm.weight" in head
