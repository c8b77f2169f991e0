"""Recipes are named fine-tuning runs; every field can be overridden on the command line.

Figures of the paper are ImageNet-1K top-1 after fine-tuning, from its authors' release. None of them was measured here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mirl.engine.configuration.config import DataConfig, LogConfig, OptimConfig, RunConfig
from mirl.engine.configuration.help_lines import nearest
from mirl.engine.configuration.overrides import override_by_keyword
from mirl.engine.transfer.classification.config import FinetuneConfig, FinetuneSection
from mirl.errors import UserError

DEFAULT_RECIPE = "small_data"


def small_data() -> FinetuneConfig:
    """Fine-tune on a labelled folder of one's own, some hundreds to some ten thousand images, on one GPU or a CPU.

    Size: pixels of pre-training, batch 32; estimated memory for vit_s at 224x224: CPU with 16 GB 5.0 GiB at micro-batch
    32, GPU of 8 GB 2.6 GiB at micro-batch 32, GPU of 80 GB 2.6 GiB at micro-batch 32

    Command: ``mirl finetune --checkpoint RUN --data train/ --val val/``
    """
    return FinetuneConfig(
        recipe="small_data",
        finetune=FinetuneSection(
            layer_decay=0.75,
            head_init="probe",
            drop_path=None,
            rand_augment=None,
            random_erase=None,
            mixup=None,
            cutmix=None,
            label_smoothing=None,
        ),
        data=DataConfig(crop_scale=None, centre_crops=None),
        optim=OptimConfig(
            batch_size=32, epochs=100, warmup_share=0.05, lr=1e-3, betas=(0.9, 0.999), min_lr=1e-6, clip_grad=1.0
        ),
        run=RunConfig(out="runs/finetune"),
        log=LogConfig(),
    )


def _imagenet(name: str, epochs: int, warmup_epochs: int, drop_path: float) -> FinetuneConfig:
    return FinetuneConfig(
        recipe=name,
        finetune=FinetuneSection(layer_decay=0.88, drop_path=drop_path),
        data=DataConfig(crop_scale=(0.08, 1.0)),
        optim=OptimConfig(
            batch_size=2048, epochs=epochs, warmup_epochs=warmup_epochs, base_lr=7.5e-4, betas=(0.9, 0.999), min_lr=1e-6
        ),
        run=RunConfig(out=f"runs/{name}_finetune"),
        log=LogConfig(),
    )


def vit_b_48() -> FinetuneConfig:
    """Fine-tune ViT-B-48 on ImageNet-1K. The paper has 85.3 % after 300 epochs of pre-training, 86.2 % after 800.

    Not measured here.

    Size: pixels of pre-training, batch 2048; estimated memory for vit_b_48 at 224x224: CPU with 16 GB too small, 16.4
    GiB at micro-batch 2, GPU of 8 GB too small, 9.9 GiB at micro-batch 2, GPU of 80 GB 40.8 GiB at micro-batch 128

    Command: ``deepspeed engine/finetune.py --recipe vit_b_48 --checkpoint runs/vit_b_48_800 --data train/ --val val/``
    """
    return _imagenet("vit_b_48", epochs=60, warmup_epochs=30, drop_path=0.0)


def vit_s_54() -> FinetuneConfig:
    """Fine-tune ViT-S-54 on ImageNet-1K. The paper has 84.4 % after 300 epochs of pre-training, 84.8 % after 800.

    Not measured here.

    Size: pixels of pre-training, batch 2048; estimated memory for vit_s_54 at 224x224: CPU with 16 GB 6.8 GiB at
    micro-batch 4, GPU of 8 GB 5.6 GiB at micro-batch 16, GPU of 80 GB 39.2 GiB at micro-batch 256

    Command: ``deepspeed engine/finetune.py --recipe vit_s_54 --checkpoint runs/vit_s_54_800 --data train/ --val val/``
    """
    return _imagenet("vit_s_54", epochs=100, warmup_epochs=20, drop_path=0.1)


RECIPES: dict[str, Callable[[], FinetuneConfig]] = {
    "small_data": small_data, "vit_b_48": vit_b_48, "vit_s_54": vit_s_54,
}  # fmt: skip


def finetune_recipe(name: str, **changes: Any) -> FinetuneConfig:
    """Return the recipe called ``name``, with single settings changed; they have the names of the flags.

    Raises:
        UserError: no such recipe or setting, or settings that do not fit together.
    """
    if name not in RECIPES:
        raise UserError(f"recipe is {name!r}: {nearest(name, RECIPES)}choose one of {', '.join(RECIPES)}")
    return override_by_keyword(RECIPES[name](), changes)
