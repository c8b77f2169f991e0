"""Named runs. Each returns a `PretrainConfig`; every field can be overridden on the command line.

ImageNet-1K top-1 in per cent after pre-training and fine-tuning, from the table of results of the authors' release.
None of these recipes has been run to its end here: not measured.

| recipe     | 300 epochs | 800 epochs |
|------------|------------|------------|
| vit_b      | 83.5       | 84.1       |
| vit_s_54   | 84.4       | 84.8       |
| vit_b_24   | 84.7       |            |
| vit_b_48   | 85.3       | 86.2       |

vit_s and vit_l have no figure of MIRL's there. docs/systems.md has the commands of the paper's other systems.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from mirl.engine.configuration.config import DataConfig, LogConfig, OptimConfig, PretrainConfig, RunConfig
from mirl.engine.configuration.help_lines import nearest
from mirl.engine.configuration.overrides import override_by_keyword
from mirl.engine.models import ModelConfig, model_config
from mirl.errors import UserError

IMAGENET_MODELS = ("vit_s", "vit_b", "vit_l", "vit_s_54", "vit_b_24", "vit_b_48")
DEFAULT_RECIPE, DEFAULT_WITH_DATA = "demo", "tiny"


def demo() -> PretrainConfig:
    """A small, deep-for-its-width MIRL on the demo photographs, for some minutes on two CPU cores.

    It shows what the method does and learns its few photographs by heart: only so do edges and objects appear after
    600 steps (benchmarks/LOG.md, Muon on the demo). Hence Muon, narrow crops and no mirroring. On images of one's own
    `tiny` is the recipe of that size.

    Size: 64x64 pixels, batch 32; estimated memory: CPU with 16 GB 1.4 GiB at micro-batch 32, GPU of 8 GB 1.2
    GiB at micro-batch 32, GPU of 80 GB 1.2 GiB at micro-batch 32

    Command: ``mirl pretrain``
    """
    base = tiny()
    return dataclasses.replace(
        base,
        recipe="demo",
        data=dataclasses.replace(base.data, crop_scale=(0.9, 1.0), flip=False),
        optim=dataclasses.replace(base.optim, optimizer="muon", lr=4e-3),
        run=dataclasses.replace(base.run, out="runs/demo"),
    )


def tiny() -> PretrainConfig:
    """The demo's small model on images of one's own, for some minutes on two CPU cores: a first look at a data set.

    Raw pixels are the target: in so few steps they give recognisable pictures, which normalised ones do not.

    Size: 64x64 pixels, batch 32; estimated memory: CPU with 16 GB 1.4 GiB at micro-batch 32, GPU of 8 GB 1.2
    GiB at micro-batch 32, GPU of 80 GB 1.2 GiB at micro-batch 32

    Command: ``mirl pretrain --data FOLDER``
    """
    return PretrainConfig(
        recipe="tiny",
        model=ModelConfig(
            name="demo",
            depth=8,
            width=128,
            heads=4,
            segments=4,
            decoder_width=64,
            decoder_heads=4,
            patch_size=8,
            image_height=64,
            image_width=64,
            norm_pix=False,
        ),
        data=DataConfig(crop_scale=(0.8, 1.0)),
        optim=OptimConfig(batch_size=32, steps=600, warmup_steps=40, lr=2e-3, clip_grad=1.0),
        run=RunConfig(out="runs/tiny", checkpoint_every=200),
        log=LogConfig(picture_every=200),
    )


def small_data() -> PretrainConfig:
    """Some hundred to some hundred thousand images of one's own, on a laptop or one GPU: long training of a ViT-S with
    gentle crops.

    Size: 224x224 pixels, batch 512; estimated memory: CPU with 16 GB 5.4 GiB at micro-batch 64, GPU of 8 GB 4.4 GiB at
    micro-batch 128, GPU of 80 GB 12.9 GiB at micro-batch 512

    Command: ``mirl pretrain --recipe small_data --data FOLDER``
    """
    return PretrainConfig(
        recipe="small_data",
        model=model_config("vit_s"),
        data=DataConfig(crop_scale=(0.3, 1.0)),
        optim=OptimConfig(batch_size=512, epochs=800, warmup_epochs=40, clip_grad=1.0),
        run=RunConfig(out="runs/small_data"),
    )


def imagenet(model: str, epochs: int) -> PretrainConfig:
    """ImageNet-1K as in section 4.1 of the paper: batch 4096, 40 epochs of warm-up, mask ratio 0.75, cosine.

    For 1.28 million images, on several GPUs. What each model takes is in `recipe_sizes.SIZES`, in the recipe's
    ``--help`` and in docs/recipes.md.

    Command: ``deepspeed engine/pretrain.py --deepspeed_config ds_configs/zero2.json --recipe MODEL_EPOCHS --data
    train/`` Result here: not measured; the paper's is in the table above.
    """
    return PretrainConfig(
        recipe=f"{model}_{epochs}",
        model=model_config(model),
        data=DataConfig(),
        optim=OptimConfig(batch_size=4096, epochs=epochs, warmup_epochs=40),
        run=RunConfig(out=f"runs/{model}_{epochs}"),
    )


def fast() -> PretrainConfig:
    """NOT THE PAPER'S: images that grow and a short schedule, for a first model or an idea, in a part of the time.

    A ViT-B, or any size by --model. Crops have 128 pixels for half of the steps, 160 up to 85 % of them and 224 to the
    end, which takes half of the FLOPs that as many steps of 224 take. 100 epochs, with a tenth of warm-up, stand in the
    place of 300 or 800; of the paper's own recipes the shorter has 0.6 points less for a ViT-B (table of the release).
    Matrices are stepped by Muon, which ZeRO 3 refuses: give --optimizer adamw there.

    Source of the growing images: DailyMAE (arXiv:2404.00509), whose published code goes from 160 over 192 to 224 pixels
    in the first half of 800 epochs; EfficientNetV2 (arXiv:2104.00298) says that they often cost accuracy. Of Muon: Liu
    et al. (arXiv:2502.16982). Measured at a small scale alone (benchmarks/LOG.md, Images that grow): with half of the
    FLOPs the linear probe was 3.2 points above AdamW with one size, mostly by Muon; for equal FLOPs growing images
    alone were ahead within the spread of three seeds. On ImageNet: not measured.

    Command: ``mirl pretrain --recipe fast --data FOLDER``, with ``--model`` for any size of the paper
    """
    return PretrainConfig(
        recipe="fast",
        model=model_config("vit_b"),
        data=DataConfig(image_sizes=("128", "160@0.5", "224@0.85")),
        optim=OptimConfig(batch_size=4096, epochs=100, warmup_share=0.1, optimizer="muon"),
        run=RunConfig(out="runs/fast"),
    )


RECIPES: dict[str, Callable[[], PretrainConfig]] = {
    "demo": demo,
    "tiny": tiny,
    "small_data": small_data,
    "fast": fast,
} | {  # fmt: skip
    f"{model}_{epochs}": (lambda model=model, epochs=epochs: imagenet(model, epochs))
    for model in IMAGENET_MODELS
    for epochs in (300, 800)
}


def recipe(name: str, **changes: Any) -> PretrainConfig:
    """The recipe called ``name``, with single settings changed; they have the names of the flags.

    Raises:
        UserError: no such recipe or setting, or settings that do not fit together.

    >>> recipe("demo", steps=20, image_size=64).optim.steps
    20
    """
    if name not in RECIPES:
        raise UserError(f"recipe is {name!r}: {nearest(name, RECIPES)}choose one of {', '.join(RECIPES)}")
    return override_by_keyword(RECIPES[name](), changes)
