"""Recipes are named detection runs; every field can be overridden on the command line.

The paper says of its runs "Mask R-CNN", "identical training configurations from mmdetection", "1x schedule" (12 epochs)
and gives Table 4, the source of the figures below. Every other setting is inherited; each docstring names its source.
None of these runs was measured here.

"CAE" below means Atten4Vis/CAE, downstream_tasks/detection, configs/mask_rcnn/vit_base_giou_4conv1f_coco_maskrcnn_1x:
blocks 3, 5, 7, 11 with BEiT's scales and an FPN of 256, global attention, short sides 480 - 800 by at most 1333, AdamW
with weight decay 0.05, batch 32, GIoU times 10 for boxes, 12 epochs with x0.1 at 9 and 11. The paper's figures for MIRL
ViT-B lie between CAE's own for MAE (48.4 / 42.6) and CAE (49.9 / 43.9), so CAE's set-up is taken for the paper's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mirl.engine.configuration.config import DataConfig, LogConfig, OptimConfig, RunConfig
from mirl.engine.configuration.help_lines import nearest
from mirl.engine.configuration.overrides import override_by_keyword
from mirl.engine.transfer.detection.config import DetectConfig, DetectSection
from mirl.errors import UserError

DEFAULT_RECIPE = "small_data"


def small_data() -> DetectConfig:
    """Train on some tens to some thousand pictures of one's own with COCO annotations, on one GPU or a CPU.

    Inherited: variant, losses and layer decay as vit_b. Chosen here: 640 pixels at most, 3,000 steps of 8 pictures, a
    cosine, clipping at 1, and a file with degenerate boxes refused instead of mended in silence.

    Command: ``mirl detect --checkpoint RUN --data DIR --annotations FILE``
    """
    return DetectConfig(
        recipe="small_data",
        detect=DetectSection(image_height=480, image_width=640, drop_path=0.1, box_loss="giou"),
        data=DataConfig(),
        optim=OptimConfig(
            batch_size=8, steps=3000, warmup_share=0.05, lr=2e-4, betas=(0.9, 0.999), clip_grad=1.0
        ),
        run=RunConfig(out="runs/detect"),
        log=LogConfig(),
    )  # fmt: skip


def demo() -> DetectConfig:
    """Train on composites of 96 x 96 pixels with the encoder of `mirl pretrain`, for some minutes on two CPU cores.

    Nothing is inherited: pyramid and heads have 48 channels in place of 256; 200 regions are proposed in a picture and
    32 sampled from them; pictures are neither mirrored nor scaled.

    Command: ``mirl detect --demo``, after ``mirl pretrain``
    """
    return DetectConfig(
        recipe="demo",
        detect=DetectSection(
            image_height=96, image_width=96, smallest=1.0, drop_path=0.0, channels=48, regions=32, proposals=200,
            eval_every=0.0, layer_decay=0.9,
        ),
        data=DataConfig(flip=False),
        optim=OptimConfig(
            batch_size=8, steps=400, warmup_steps=40, lr=2e-3, betas=(0.9, 0.999), clip_grad=5.0
        ),
        run=RunConfig(out="runs/detect_demo", checkpoint_every=200),
        log=LogConfig(picture_every=200),
    )  # fmt: skip


def _coco(name: str, *, lr: float, layer_decay: float, drop_path: float) -> DetectConfig:
    """Make a recipe for COCO with CAE's settings; see the top of this file.

    The warm-up has 1,000 steps: mmdetection's for CAE's and BEiT's runs is of this order; the paper is silent.
    """
    return DetectConfig(
        recipe=name,
        detect=DetectSection(
            variant="paper", image_height=800, image_width=1333, box_loss="giou", layer_decay=layer_decay,
            drop_path=drop_path, degenerate="drop",
        ),
        data=DataConfig(),
        optim=OptimConfig(
            batch_size=32, epochs=12, warmup_steps=1000, lr=lr, betas=(0.9, 0.999), weight_decay=0.05,
            schedule="step", step_at=(9 / 12, 11 / 12),
        ),
        run=RunConfig(out=f"runs/{name}_detect"),
        log=LogConfig(),
    )  # fmt: skip


def vit_b() -> DetectConfig:
    """Train ViT-B on COCO, 1x. The paper has box AP 49.3, mask AP 43.7 after 800 epochs of pre-training.

    Not measured here.

    Inherited: all from CAE's ViT-B: learning rate 3e-4, layer decay 0.75, drop path 0.2.

    Command: ``deepspeed engine/detect.py --recipe vit_b --checkpoint runs/vit_b_800 --data train2017 --annotations
    instances_train2017.json --val val2017 --val-annotations instances_val2017.json``
    """
    return _coco("vit_b", lr=3e-4, layer_decay=0.75, drop_path=0.2)


def vit_s_54() -> DetectConfig:
    """Train ViT-S-54 on COCO, 1x. The paper has no figure for it. Not measured here.

    Inherited: from CAE, learning rate 2e-4 and drop path 0.2 as for its ViT-L. Reckoned here: layer decay 0.91, by
    which the lowest of 54 blocks learns as slowly as that of 12 under 0.75.

    Command: as `vit_b`, with ``--recipe vit_s_54``
    """
    return _coco("vit_s_54", lr=2e-4, layer_decay=0.91, drop_path=0.2)


def vit_b_24() -> DetectConfig:
    """Train ViT-B-24 on COCO, 1x. The paper has no figure for it. Not measured here.

    Inherited: from CAE, learning rate 2e-4, layer decay 0.85 and drop path 0.2 as for its ViT-L, which has 24 blocks
    too.

    Command: as `vit_b`, with ``--recipe vit_b_24``
    """
    return _coco("vit_b_24", lr=2e-4, layer_decay=0.85, drop_path=0.2)


def vit_b_48() -> DetectConfig:
    """Train ViT-B-48 on COCO, 1x. The paper has mask AP 46.5 after 800 epochs of pre-training. Not measured here.

    Inherited: from CAE, learning rate 2e-4 as for its ViT-L; drop path 0.4 of ViTDet-L. Reckoned here: layer decay
    0.90, by which the lowest of 48 blocks learns as slowly as that of 12 under 0.75; MIRL's own fine-tuning has 0.88.

    Command: as `vit_b`, with ``--recipe vit_b_48``
    """
    return _coco("vit_b_48", lr=2e-4, layer_decay=0.90, drop_path=0.4)


def vitdet_b() -> DetectConfig:
    """Train ViT-B on COCO as in ViTDet, 100 epochs of large-scale jitter. This is not the paper's set-up.

    Not measured here.

    Inherited: detectron2 projects/ViTDet, configs/COCO/mask_rcnn_vitdet_b_100ep.py: last map, simple pyramid,
    LayerNorm, 1024 pixels, scales 0.1 - 2, AdamW, learning rate 1e-4, weight decay 0.1, layer decay 0.7, drop path 0.1,
    batch 64, warm-up of 250 steps, x0.1 at 88.9 % and 96.3 %, L1. Windows of 16 patches, which divide 64, are those of
    MAE's reproduction (hustvl/MIMDet); the 14 of ViTDet would need padding. There are no relative positions.

    Command: ``deepspeed engine/detect.py --recipe vitdet_b --checkpoint runs/vit_b_800 --data train2017 --annotations
    instances_train2017.json``
    """
    return DetectConfig(
        recipe="vitdet_b",
        detect=DetectSection(
            variant="vitdet", window=16, image_height=1024, image_width=1024, layer_decay=0.7, drop_path=0.1,
            degenerate="drop", eval_every=10.0,
        ),
        data=DataConfig(),
        optim=OptimConfig(
            batch_size=64, epochs=100, warmup_steps=250, lr=1e-4, betas=(0.9, 0.999), weight_decay=0.1,
            schedule="step", step_at=(0.889, 0.963),
        ),
        run=RunConfig(out="runs/vitdet_b"),
        log=LogConfig(),
    )  # fmt: skip


RECIPES: dict[str, Callable[[], DetectConfig]] = {
    "small_data": small_data, "demo": demo, "vit_b": vit_b, "vit_s_54": vit_s_54, "vit_b_24": vit_b_24,
    "vit_b_48": vit_b_48, "vitdet_b": vitdet_b,
}  # fmt: skip


def detect_recipe(name: str, **changes: Any) -> DetectConfig:
    """Return the recipe called ``name``, with single settings changed; they have the names of the flags.

    Raises:
        UserError: no such recipe or setting, or settings that do not fit together.
    """
    if name not in RECIPES:
        raise UserError(f"recipe is {name!r}: {nearest(name, RECIPES)}choose one of {', '.join(RECIPES)}")
    return override_by_keyword(RECIPES[name](), changes)
