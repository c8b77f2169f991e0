"""`mirl summary` shows parameters, FLOPs and memory of the models of the paper, computed without building them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from mirl.engine.accounting.flops import (
    classifier_macs,
    classifier_parameters,
    decoder_parameters,
    encoder_parameters,
    forward_flops,
    training_flops_per_image,
)
from mirl.engine.accounting.memory import GIB, activation_bytes, state_bytes, step_gib
from mirl.engine.models.config import MODEL_NAMES, VARIANTS, ModelConfig, model_config
from mirl.engine.models.skips import ExactSkips

MICRO_BATCHES = (32, 64, 128, 256)
RANKS = 8
CHECKPOINTING = ("none", "every")

LEGEND = f"""\
params_m         millions of parameters as a classifier with 1000 classes (the paper's Table 1)
classifier_gmac  billions of multiply-adds of its weights at 197 tokens (the paper's "FLOPs")
pretrain_m       millions of parameters while pre-training: encoder + decoders
train_gflop      billions of FLOPs of one pre-training image, forward + backward: all work of the plain form, and
                 what is left of it after the engine's exact skips; 2 FLOPs are one multiply-add
memory_gib       of one GPU: bfloat16, AdamW, fused attention, ZeRO over {RANKS} ranks; an estimate,
                 5 to 10 % come on top"""


def summarise(
    name: str | None = None, *, micro_batches: Sequence[int] = MICRO_BATCHES, ranks: int = RANKS
) -> list[dict[str, Any]]:
    """Return one row for each size and variant; ``name``: one size only. UserError on an unknown name.

    Rows have plain values, and keys with units; see `LEGEND`. ``memory_gib`` maps "zero{stage}", then the form of
    activation checkpointing, then the micro-batch (as text) to GiB.
    """
    names = MODEL_NAMES if name is None else (name,)
    return [
        summarise_config(model_config(size, variant=variant), micro_batches=micro_batches, ranks=ranks)
        for size in names
        for variant in VARIANTS
    ]


def summarise_config(
    config: ModelConfig, *, micro_batches: Sequence[int] = MICRO_BATCHES, ranks: int = RANKS
) -> dict[str, Any]:
    """Return the row of `summarise` for any configuration."""
    forward = forward_flops(config)
    return {
        "name": config.label,
        "variant": config.variant,
        "depth": config.depth,
        "width": config.width,
        "segments": config.segments,
        "decoder_depth": config.decoder_depth,
        "params_m": classifier_parameters(config) / 1e6,
        "classifier_gmac": classifier_macs(config) / 1e9,
        "pretrain_encoder_m": encoder_parameters(config) / 1e6,
        "pretrain_decoders_m": decoder_parameters(config) / 1e6,
        "forward_encoder_gflop": forward.encoder / 1e9,
        "forward_decoders_gflop": forward.decoders / 1e9,
        "forward_rest_gflop": (forward.total - forward.encoder - forward.decoders) / 1e9,
        "train_gflop": forward.training / 1e9,
        "train_after_skips_gflop": training_flops_per_image(config, ExactSkips()) / 1e9,
        "states_gib": {f"zero{stage}": state_bytes(config, stage, ranks) / GIB for stage in (1, 2, 3)},
        "activations_mib_per_image": {mode: activation_bytes(config, 1, mode) / 2**20 for mode in CHECKPOINTING},
        "memory_gib": {
            f"zero{stage}": {
                mode: {
                    str(batch): step_gib(config, batch, zero_stage=stage, ranks=ranks, checkpointing=mode)
                    for batch in micro_batches
                }
                for mode in CHECKPOINTING
            }
            for stage in (1, 2, 3)
        },
    }


def run_summary(model: str | None = None, as_json: bool = False) -> str:
    """Return what `mirl summary [--model NAME] [--json]` prints: all sizes, or one in more detail.

    UserError on an unknown name.
    """
    rows = summarise(model)
    if as_json:
        return json.dumps(rows, indent=2)
    parts = [_sizes_table(rows)]
    parts += [_memory_table(row) for row in rows] if model is not None else [_memory_overview(rows)]
    return "\n\n".join([*parts, LEGEND])


def _sizes_table(rows: Sequence[dict[str, Any]]) -> str:
    header = ["model", "variant", "params_m", "classifier_gmac", "pretrain_m", "train_gflop", "after skips"]
    lines = [
        [
            row["name"], row["variant"], f"{row['params_m']:.1f}", f"{row['classifier_gmac']:.1f}",
            f"{row['pretrain_encoder_m']:.1f} + {row['pretrain_decoders_m']:.1f}",
            f"{row['train_gflop']:.1f}", f"{row['train_after_skips_gflop']:.1f}",
        ]
        for row in rows
    ]  # fmt: skip
    return _align([header, *lines])


def _memory_overview(rows: Sequence[dict[str, Any]]) -> str:
    batches = list(rows[0]["memory_gib"]["zero2"]["none"])
    header = ["memory_gib, ZeRO-2", "variant", *(f"batch {batch}" for batch in batches)]
    lines = [
        [row["name"], row["variant"], *(f"{row['memory_gib']['zero2']['none'][batch]:.1f}" for batch in batches)]
        for row in rows
    ]
    return _align([header, *lines])


def _memory_table(row: dict[str, Any]) -> str:
    batches = list(row["memory_gib"]["zero1"]["none"])
    header = [f"memory_gib, {row['variant']}", "recompute", "states", *(f"batch {batch}" for batch in batches)]
    lines = [
        [stage, mode, f"{row['states_gib'][stage]:.1f}", *(f"{values[batch]:.1f}" for batch in batches)]
        for stage, modes in row["memory_gib"].items()
        for mode, values in modes.items()
    ]
    return _align([header, *lines])


def _align(table: Sequence[Sequence[str]]) -> str:
    """Align columns of equal width: the first two to the left, numbers to the right."""
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    )
