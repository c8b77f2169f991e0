"""`mirl summary --task segment` tells the size and cost of a segmenter of a model of the paper, without building it."""

from __future__ import annotations

import json
from typing import Any

from mirl.engine.accounting.flops import encoder_parameters, segmenter_flops, segmenter_parameters
from mirl.engine.accounting.memory import GIB
from mirl.engine.accounting.run_memory import Placement, run_bytes, segmenter_footprint
from mirl.engine.models.config import MODEL_NAMES, ModelConfig, model_config
from mirl.engine.transfer.encoder_model import encoder_config

MICRO_BATCHES = (2, 4, 8, 16)
RANKS = 8
LEGEND = f"""\
params_m      millions of parameters: encoder + pyramid and both heads of UperNet
forward_gmac  billions of multiply-adds of one crop: encoder + pyramid and heads
memory_gib    of one GPU: bfloat16, AdamW, fused attention, ZeRO-2 over {RANKS} ranks; an estimate"""


def summarise_segmenter(
    model: ModelConfig, *, classes: int = 150, head_channels: int = 0, ranks: int = RANKS
) -> dict[str, Any]:
    """Return the row of a model at its image size, as plain values with units in their keys."""
    config = encoder_config(model)
    flops = segmenter_flops(config, classes, head_channels)
    total = segmenter_parameters(config, classes, head_channels)
    encoder = encoder_parameters(config) - 2 * config.width  # without the last norm
    place = Placement(zero_stage=2, ranks=ranks, precision="bf16", on_gpu=True)

    def memory(checkpointing: str) -> dict[str, float]:
        footprint = segmenter_footprint(
            config, classes, head_channels, "bf16", on_gpu=True, checkpointing=checkpointing
        )
        return {str(micro): run_bytes(footprint, place, micro) / GIB for micro in MICRO_BATCHES}

    return {
        "name": config.label, "image_height": config.image_height, "image_width": config.image_width,
        "classes": classes, "encoder_m": encoder / 1e6, "heads_m": (total - encoder) / 1e6,
        "forward_encoder_gmac": (flops.encoder + flops.patch_projection) / 2e9,
        "forward_heads_gmac": (flops.decoders + flops.heads) / 2e9, "train_gflop": flops.training / 1e9,
        "memory_gib": {mode: memory(mode) for mode in ("none", "every")},
    }  # fmt: skip


def segment_summary(name: str | None, *, image_size: tuple[int, int], classes: int, as_json: bool) -> str:
    """Return the text that the command prints, for one size or for all.

    UserError on an unknown name, or a size of no whole patches.
    """
    rows = [
        summarise_segmenter(
            model_config(size, image_height=image_size[0], image_width=image_size[1]),
            classes=classes,
        )
        for size in (MODEL_NAMES if name is None else (name,))
    ]
    if as_json:
        return json.dumps(rows, indent=2)
    lines = [
        f"crops of {image_size[0]}x{image_size[1]}, {classes} classes",
        f"{'model':<10}  {'params_m':>15}  {'forward_gmac':>17}  "
        + "  ".join(f"{'batch ' + str(micro):>9}" for micro in MICRO_BATCHES)
        + "  with recomputation",
    ]
    for row in rows:
        kept, made_again = row["memory_gib"]["none"], row["memory_gib"]["every"]
        parameters = f"{row['encoder_m']:.1f} + {row['heads_m']:.1f}"
        macs = f"{row['forward_encoder_gmac']:.1f} + {row['forward_heads_gmac']:.1f}"
        sizes = "  ".join(f"{value:>9.1f}" for value in kept.values())
        lines.append(
            f"{row['name']:<10}  {parameters:>15}  {macs:>17}  {sizes}  "
            + "  ".join(f"{value:.1f}" for value in made_again.values())
        )
    return "\n".join([*lines, "", LEGEND])
