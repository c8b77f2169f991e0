"""`mirl summary --task detect` shows FLOPs of a detector on each model, in windows and with global attention."""

from __future__ import annotations

import json
from typing import Any

from mirl.engine.accounting.detection import DetectorShape, detector_flops
from mirl.engine.models.config import MODEL_NAMES, model_config
from mirl.engine.transfer.detection.windows import global_blocks
from mirl.engine.transfer.encoder_model import encoder_config

SIDE, WINDOW, CHANNELS, REGIONS, CLASSES = 1024, 16, 256, 512, 80
NOTE = f"""\
billions of FLOPs of the forward pass of one image of {SIDE}x{SIDE} pixels, {SIDE * SIDE // 256} tokens, variant vitdet;
2 FLOPs are one multiply-add. in windows: of {WINDOW} x {WINDOW} patches, in all blocks but the four global ones.
pyramid and heads are the same for both ({CHANNELS} channels, {REGIONS} regions, {CLASSES} classes)"""


def detection_rows(name: str | None = None) -> list[dict[str, Any]]:
    """Return a row for each model, or for ``name`` alone. UserError on an unknown name."""
    rows = []
    for size in MODEL_NAMES if name is None else (name,):
        config = encoder_config(model_config(size, image_height=SIDE, image_width=SIDE))
        found = {
            kind: detector_flops(
                config,
                DetectorShape(
                    variant="vitdet", window=window, global_blocks=len(global_blocks(config.depth)), channels=CHANNELS,
                    regions=REGIONS, classes=CLASSES,
                ),
            )
            for kind, window in (("windows", WINDOW), ("global", 0))
        }  # fmt: skip
        row: dict[str, Any] = {"name": size, "linear_gflop": found["global"].linear / 1e9}
        for kind, flops in found.items():
            row |= {f"attention_{kind}_gflop": flops.attention / 1e9, f"encoder_{kind}_gflop": flops.encoder / 1e9}
        row |= {"rest_gflop": (found["global"].total - found["global"].encoder) / 1e9}
        row["global_over_windows"] = row["encoder_global_gflop"] / row["encoder_windows_gflop"]
        rows.append(row)
    return rows


def detection_summary(name: str | None = None, as_json: bool = False) -> str:
    """Return the text that the command prints."""
    rows = detection_rows(name)
    if as_json:
        return json.dumps(rows, indent=2)
    heads = ("model", "linear", "attention", "in windows", "encoder", "in windows", "saved", "pyramid and heads")
    lines = [
        (
            row["name"], f"{row['linear_gflop']:.0f}", f"{row['attention_global_gflop']:.0f}",
            f"{row['attention_windows_gflop']:.0f}", f"{row['encoder_global_gflop']:.0f}",
            f"{row['encoder_windows_gflop']:.0f}", f"{row['global_over_windows']:.2f}x", f"{row['rest_gflop']:.0f}",
        )
        for row in rows
    ]  # fmt: skip
    widths = [max(len(line[column]) for line in (heads, *lines)) for column in range(len(heads))]
    table = [
        "  ".join(cell.ljust(width) if not column else cell.rjust(width) for column, (cell, width) in enumerate(
            zip(line, widths, strict=True))).rstrip()
        for line in (heads, *lines)
    ]  # fmt: skip
    return "\n".join([*table, "", NOTE])
