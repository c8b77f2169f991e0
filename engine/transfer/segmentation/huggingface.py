"""Write a segmenter as transformers' UperNetForSemanticSegmentation over BeitBackbone, with equal outputs.

| here                                   | files that every version of transformers reads                     |
|----------------------------------------|--------------------------------------------------------------------|
| encoder.*                              | backbone.*, as in `mirl.engine.models.interop.huggingface`         |
| encoder.blocks.i.attn.qkv, bias of k   | left out: it adds one number to all scores of a query              |
| pyramid.fpn1, fpn2                     | backbone.fpn1, fpn2                                                |
| decode_head, auxiliary_head: bn        | batch_norm; conv_seg: classifier                                   |

BeitBackbone takes fixed positions as its absolute ones, and has no relative ones and no layer scale here. If an image
is not of the size of the training crops, it resamples positions bicubically, and only to squares without a change of
proportions, but we stretch the formula. At the size of the crops both are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mirl.engine.models.interop.huggingface import hf_config, hf_state_dict
from mirl.engine.transfer.segmentation.segmenter import Segmenter
from mirl.engine.transfer.segmentation.upernet import AUXILIARY_CHANNELS, AUXILIARY_WEIGHT, POOLS
from mirl.errors import UserError

IGNORED = 255


def upernet_state_dict(model: Segmenter) -> dict[str, Tensor]:
    """Return model.safetensors of UperNetForSemanticSegmentation, float32.

    UserError for norms of groups, which that model lacks.
    """
    state = model.state_dict()
    if not model.kept_buffers():
        raise UserError(
            "norm is group and transformers' UperNet has batch norms: train with --norm batch, or export safetensors"
        )
    encoder = {key.removeprefix("encoder."): value for key, value in state.items() if key.startswith("encoder.")}
    like = encoder["cls_token"].float()
    patches_ND = model.positions(model.config.grid, like)
    encoder["pos_embed"] = torch.cat([like.new_zeros(1, patches_ND.shape[1]), patches_ND])
    renamed = {
        f"backbone.{key}": value
        for key, value in hf_state_dict(encoder, model.config).items()
        if not key.endswith("attention.key.bias")
    }
    for key, value in state.items():
        if key.startswith("encoder."):
            continue
        name = (
            key.replace("pyramid.", "backbone.").replace(".bn.", ".batch_norm.").replace(".conv_seg.", ".classifier.")
        )
        renamed[name] = value.detach().float().contiguous()
        if name.endswith("running_var"):
            renamed[name.replace("running_var", "num_batches_tracked")] = torch.tensor(0)
    return renamed


def upernet_config(model: Segmenter, classes: Sequence[str]) -> dict[str, Any]:
    """Return config.json of UperNetConfig. classes: names by label."""
    vit = hf_config(model.config)
    kept = (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "layer_norm_eps",
        "image_size", "patch_size", "num_channels", "hidden_dropout_prob", "attention_probs_dropout_prob",
    )  # fmt: skip
    backbone = {name: vit[name] for name in kept} | {
        "model_type": "beit",
        "use_absolute_position_embeddings": True,
        "use_relative_position_bias": False,
        "use_shared_relative_position_bias": False,
        "layer_scale_init_value": 0.0,
        "drop_path_rate": model.config.drop_path,
        "use_mean_pooling": True,  # so the backbone has no norm of its own
        "add_fpn": True,
        "reshape_hidden_states": True,
        "out_features": [f"stage{block + 1}" for block in model.taken],
        "out_indices": [block + 1 for block in model.taken],
    }
    return {
        "model_type": "upernet",
        "architectures": ["UperNetForSemanticSegmentation"],
        "backbone_config": backbone,
        "hidden_size": model.decode_head.conv_seg.in_channels,
        "pool_scales": list(POOLS),
        "use_auxiliary_head": True,
        "auxiliary_loss_weight": AUXILIARY_WEIGHT,
        "auxiliary_in_channels": model.config.width,
        "auxiliary_channels": AUXILIARY_CHANNELS,
        "auxiliary_num_convs": 1,
        "loss_ignore_index": IGNORED,
        "id2label": dict(enumerate(classes)),
        "label2id": {name: index for index, name in enumerate(classes)},
    }


def upernet_preprocessor(model: Segmenter) -> dict[str, Any]:
    """Return preprocessor_config.json, which squeezes an image into the size of the crops.

    transformers has no sliding window.
    """
    config = model.config
    return {
        "image_processor_type": "SegformerImageProcessor",
        "do_resize": True,
        "size": {"height": config.image_height, "width": config.image_width},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.mean),
        "image_std": list(config.std),
        "do_reduce_labels": False,
    }
