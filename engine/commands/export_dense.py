"""`mirl export` writes for detection and segmentation: a segmenter whole, or an encoder for other people's code.

| --to        | of a segmenter                              | of any other checkpoint                       |
|-------------|---------------------------------------------|-----------------------------------------------|
| hf          | a folder for UperNetForSemanticSegmentation | `mirl.engine.commands.export_formats`         |
| safetensors | one file with our names                     | the same                                      |
| mmseg       | a .pth for load_from                        | a .pth of the encoder for pretrained=         |
| mae         | a .pth of its encoder                       | a .pth of the encoder                         |

mae is {"model": ...} with the names of MAE's files, which detectron2's and mmdet's ViTDet and the segmentation code of
BEiT, CAE and MAE's reproductions read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mirl.engine.checkpoints.files import aside, save_tensors, write_json
from mirl.engine.checkpoints.kinds import SEGMENTER, Given
from mirl.engine.checkpoints.pretrained import load_encoder
from mirl.engine.commands.export_formats import HEADER, WEIGHTS
from mirl.engine.models.config import ModelConfig
from mirl.engine.models.interop.mmseg import mmseg_state_dict
from mirl.engine.models.interop.timm_keys import timm_state_dict
from mirl.engine.models.positions import sincos_positions
from mirl.engine.transfer.dense.feature_maps import taken_blocks
from mirl.engine.transfer.segmentation.huggingface import upernet_config, upernet_preprocessor, upernet_state_dict
from mirl.engine.transfer.segmentation.load import load_segmenter, view_of
from mirl.errors import UserError

FORMATS = ("mae", "mmseg")


def export_dense(found: Given, to: str, out: Path, image_size: tuple[int, int] | None) -> list[str]:
    """Write ``out`` and return the lines that say what it is and how it is loaded.

    Raises:
        UserError: this checkpoint has no such format, or ``out`` exists or has the wrong suffix.
    """
    if to in FORMATS and out.suffix != ".pth":
        raise UserError(f"out is {out}: give a file name that ends in .pth")
    if found.kind == SEGMENTER and to != "mae":
        if image_size is not None:
            raise UserError("image_size is given and a segmenter takes images of any size: leave it out")
        return _segmenter(found, to, out)
    config, encoder = load_encoder(found.checkpoint)
    state = _encoder(config, encoder, image_size)
    size = image_size or (config.image_height, config.image_width)
    if to == "mae":
        _save_pth({"model": state}, out)
        return [_wrote(out, state, config), *_lines_of_mae(config, size, out)]
    if to == "mmseg":
        _save_pth({"state_dict": mmseg_state_dict(state)}, out)
        return [_wrote(out, state, config), *_lines_of_mmseg(config, size, f"pretrained='{out}'", None)]
    raise UserError(f"to is {to!r} and {found.asked} is a segmenter: give hf, mmseg, mae or safetensors")


def _segmenter(found: Given, to: str, out: Path) -> list[str]:
    model, run = load_segmenter(found.checkpoint)
    config, names = model.config, run.classes
    size = (config.image_height, config.image_width)
    if to == "hf":
        state = upernet_state_dict(model)
        with aside(out) as folder:
            folder.mkdir()
            save_tensors(state, folder / WEIGHTS, metadata=HEADER)
            write_json(folder / "config.json", upernet_config(model, names))
            write_json(folder / "preprocessor_config.json", upernet_preprocessor(model))
        return [
            f"wrote {out}: segmenter of {len(names)} classes, {len(state)} weights",
            f"outputs are equal for images of {size[0]}x{size[1]}; transformers has no sliding window (here: "
            f"{view_of(run)})",
            f'load it: transformers.UperNetForSemanticSegmentation.from_pretrained("{out}")',
        ]
    if to == "safetensors":
        state = {key: value.detach().float().contiguous() for key, value in model.state_dict().items()}
        described = {"classes": names, "labels": run.label_map.meanings(), "model": run.to_dict()["model"]}
        with aside(out) as file:
            save_tensors(state, file, metadata=HEADER | {name: json.dumps(value) for name, value in described.items()})
        return [f"wrote {out}: segmenter of {len(names)} classes, {len(state)} weights under our names"]
    if to != "mmseg":
        raise UserError(f"to is {to!r} and {found.asked} is a segmenter: give hf, mmseg, mae or safetensors")
    if not model.kept_buffers():
        raise UserError("norm is group and mmsegmentation's heads have batch norms: export it to safetensors")
    encoder = {key.removeprefix("encoder."): value for key, value in model.state_dict().items() if "encoder." in key}
    like = encoder["cls_token"]
    encoder["pos_embed"] = torch.cat([like, model.positions(config.grid, like)[None]], dim=1)
    encoder["pos_embed"][:, 0] = 0
    state = {f"backbone.{key}": value for key, value in mmseg_state_dict(encoder).items()}
    for key, value in model.state_dict().items():
        if not key.startswith("encoder."):
            name = key.replace("pyramid.fpn1.", "neck.upsample_4x.").replace("pyramid.fpn2.", "neck.upsample_2x.")
            state[name] = value.detach().float()
    _save_pth({"state_dict": state, "meta": {"dataset_meta": {"classes": list(names)}}}, out)
    return [
        f"wrote {out}: segmenter of {len(names)} classes, {len(state)} weights",
        *_lines_of_mmseg(config, size, f"load_from = '{out}'", (len(names), model.decode_head.conv_seg.in_channels)),
    ]


def _encoder(config: ModelConfig, encoder: dict[str, Tensor], image_size: tuple[int, int] | None) -> dict[str, Tensor]:
    """Return the encoder by MAE's names. Its positions are computed for the grid of ``image_size``."""
    state = timm_state_dict({key: value for key, value in encoder.items() if key != "pos_embed"}, config)
    if image_size is not None:
        side = config.patch_size
        if image_size[0] % side or image_size[1] % side:
            raise UserError(f"image_size is {image_size[0]}x{image_size[1]}: give multiples of the patch side, {side}")
        grid = (image_size[0] // side, image_size[1] // side)
        state["pos_embed"] = sincos_positions(grid, config.width, config.grid)[None]
    return state


def _save_pth(values: dict[str, Any], out: Path) -> None:
    with aside(out) as file:
        torch.save(values, file)


def _wrote(out: Path, state: dict[str, Tensor], config: ModelConfig) -> str:
    return f"wrote {out}: encoder of {config.label}, {len(state)} weights, depth {config.built_depth}"


def _lines_of_mae(config: ModelConfig, size: tuple[int, int], out: Path) -> list[str]:
    depth, taken = config.built_depth, list(taken_blocks(config.built_depth))
    windowed = [block for block in range(depth) if block not in taken]
    return [
        f"pixels: RGB, (value / 255 - mean) / std with mean {list(config.mean)} and std {list(config.std)}",
        "detectron2, projects/ViTDet:",
        f"  model.backbone.net.embed_dim, .depth, .num_heads = {config.width}, {depth}, {config.heads}",
        f"  model.backbone.net.patch_size, .pretrain_img_size = {config.patch_size}, {size[0]}",
        f"  model.backbone.net.window_block_indexes = {windowed}",
        f'  train.init_checkpoint = "{out}"; get_vit_lr_decay_rate(num_layers={depth})',
        "segmentation of BEiT, CAE and MAE's reproductions:",
        f"  backbone=dict(embed_dim={config.width}, depth={depth}, num_heads={config.heads}, out_indices={taken}, "
        "use_abs_pos_emb=True, use_rel_pos_bias=False, init_values=None)",
        f"  decode_head=dict(in_channels={[config.width] * 4}, channels={config.width}), "
        f"auxiliary_head=dict(in_channels={config.width})",
    ]


def _lines_of_mmseg(
    config: ModelConfig, size: tuple[int, int], loading: str, head: tuple[int, int] | None
) -> list[str]:
    """Return the lines of an mmsegmentation configuration. head: a segmenter's classes and decode head's channels."""
    width, depth = config.width, config.built_depth
    classes = f"num_classes={head[0]}, " if head else ""
    return [
        "mmsegmentation 1.2, over configs/_base_/models/upernet_mae.py:",
        f"  {loading}",
        f"  backbone=dict(type='MAE', img_size={size}, patch_size={config.patch_size}, in_channels={config.channels}, "
        f"embed_dims={width}, num_layers={depth}, num_heads={config.heads}, mlp_ratio={config.mlp_ratio:g}, "
        f"init_values=1.0, out_indices={list(taken_blocks(depth))})",
        f"  neck=dict(embed_dim={width}, rescales=[4, 2, 1, 0.5])",
        f"  decode_head=dict({classes}in_channels={[width] * 4}, channels={head[1] if head else width})",
        f"  auxiliary_head=dict({classes}in_channels={width})",
        f"  data_preprocessor=dict(mean={[round(255 * value, 3) for value in config.mean]}, "
        f"std={[round(255 * value, 3) for value in config.std]}, bgr_to_rgb=True)",
        f"  paramwise_cfg=dict(num_layers={depth}, layer_decay_rate=...)",
    ]
