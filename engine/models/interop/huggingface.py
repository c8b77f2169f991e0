"""Write the encoder, or a classifier, as transformers' ViTModel or ViTForImageClassification.

| timm, and here                    | transformers                                         |
|-----------------------------------|------------------------------------------------------|
| cls_token, pos_embed              | embeddings.cls_token, .position_embeddings           |
| patch_embed.proj                  | embeddings.patch_embeddings.projection               |
| blocks.i.norm1, norm2             | encoder.layer.i.layernorm_before, layernorm_after    |
| blocks.i.attn.qkv                 | encoder.layer.i.attention.attention.query, key, value|
| blocks.i.attn.proj                | encoder.layer.i.attention.output.dense               |
| blocks.i.mlp.fc1, fc2             | encoder.layer.i.intermediate.dense, output.dense     |
| norm (or fc_norm), head           | layernorm, classifier                                |

These are the names of the files on the Hub, which every version of transformers reads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mirl.dataloaders.decoding.crops import evaluation_crop
from mirl.engine.models.config import ModelConfig
from mirl.engine.models.interop.timm_keys import timm_state_dict
from mirl.engine.models.layers import NORM_EPS
from mirl.errors import UserError

BICUBIC = 3  # PIL's number of the resampling filter

_RULES: tuple[tuple[str, str], ...] = (
    (r"cls_token", "embeddings.cls_token"),
    (r"pos_embed", "embeddings.position_embeddings"),
    (r"patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"blocks\.(\d+)\.norm1\.", r"encoder.layer.\1.layernorm_before."),
    (r"blocks\.(\d+)\.norm2\.", r"encoder.layer.\1.layernorm_after."),
    (r"blocks\.(\d+)\.attn\.proj\.", r"encoder.layer.\1.attention.output.dense."),
    (r"blocks\.(\d+)\.mlp\.fc1\.", r"encoder.layer.\1.intermediate.dense."),
    (r"blocks\.(\d+)\.mlp\.fc2\.", r"encoder.layer.\1.output.dense."),
    (r"(?:fc_)?norm\.", "layernorm."),
    (r"head\.", "classifier."),
)


def hf_state_dict(
    encoder: Mapping[str, Tensor],
    config: ModelConfig,
    *,
    image_size: tuple[int, int] | None = None,
    pool: str = "token",
    head: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return model.safetensors of ViTModel without its pooler, or with ``head`` that of ViTForImageClassification.

    Arguments are those of `mirl.engine.models.interop.timm_keys.timm_state_dict`.
    UserError for a head on mean-pooled tokens: transformers' classifier reads the class token. UserError for an
    encoder whose norm comes after the pooling: ViTModel's comes before it.
    """
    if head is not None and "head.weight" not in head:
        raise UserError(
            f"pool is {pool!r}: this encoder was fine-tuned with its norm after the pooling, and ViTModel needs one "
            "before it; export it to timm"
        )
    if head is not None and pool != "token":
        raise UserError(
            f"pool is {pool!r}: ViTForImageClassification reads the class token; export this classifier to timm"
        )
    renamed: dict[str, Tensor] = {}
    for key, value in timm_state_dict(encoder, config, image_size=image_size, head=head).items():
        if match := re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", key):
            base = f"encoder.layer.{match[1]}.attention.attention"
            parts = zip(("query", "key", "value"), value.chunk(3), strict=True)
            renamed |= {f"{base}.{name}.{match[2]}": part.contiguous() for name, part in parts}
        else:
            renamed[_rename(key)] = value
    if head is None:
        return renamed
    return {key if key.startswith("classifier.") else f"vit.{key}": value for key, value in renamed.items()}


def hf_config(
    config: ModelConfig,
    *,
    image_size: tuple[int, int] | None = None,
    head: Mapping[str, Tensor] | None = None,
    classes: Sequence[str] = (),
) -> dict[str, Any]:
    """Return config.json of transformers' ViTConfig.

    classes: names by label; a label without a name becomes LABEL_i.
    """
    height, width = image_size or (config.image_height, config.image_width)
    values = {
        "model_type": "vit",
        "architectures": ["ViTModel" if head is None else "ViTForImageClassification"],
        "hidden_size": config.width,
        "num_hidden_layers": config.built_depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_width,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": NORM_EPS,
        "image_size": height if height == width else [height, width],
        "patch_size": config.patch_size,
        "num_channels": config.channels,
        "qkv_bias": True,
    }
    if head is None:
        return values
    unnamed = [f"LABEL_{index}" for index in range(len(head["head.weight"]))]
    labels = dict(enumerate([*classes, *unnamed[len(classes) :]]))
    return values | {"id2label": labels, "label2id": {name: index for index, name in labels.items()}}


def hf_preprocessor(config: ModelConfig, *, image_size: tuple[int, int] | None = None) -> dict[str, Any]:
    """Return preprocessor_config.json for evaluation's own crop: images resized by the short side, centre cropped.

    ViTImageProcessor cannot crop, so the file names BitImageProcessor. BitImageProcessor cannot make a crop that is not
    square: then the file names ViTImageProcessor, which takes the whole image with its proportions changed (see
    `crops_as_evaluation`).
    """
    height, width = image_size or (config.image_height, config.image_width)
    if crops_as_evaluation((height, width)):
        geometry: dict[str, Any] = {
            "image_processor_type": "BitImageProcessor",
            "size": {"shortest_edge": min(evaluation_crop((height, width)).resized)},
            "do_center_crop": True,
            "crop_size": {"height": height, "width": width},
            "do_convert_rgb": config.channels == 3,
        }
    else:
        geometry = {"image_processor_type": "ViTImageProcessor", "size": {"height": height, "width": width}}
    return geometry | {
        "do_resize": True,
        "resample": BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.mean),
        "image_std": list(config.std),
    }


def crops_as_evaluation(image_size: tuple[int, int]) -> bool:
    """Say whether transformers' processor of images of this size takes the crop of our evaluation."""
    return image_size[0] == image_size[1]


def _rename(key: str) -> str:
    for pattern, theirs in _RULES:
        if match := re.match(pattern, key):
            return match.expand(theirs) + key[match.end() :]
    raise AssertionError(f"{key} has no name in transformers")
