"""Draw detections on images: masks in colour, boxes, names and scores; and put such pictures into grids."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from mirl.engine.transfer.detection.annotations import CocoSet
from mirl.engine.transfer.detection.evaluation import paste_mask

OPACITY = 0.5
LEAST_SCORE = 0.5  # detections below it are not drawn
GAP, LINE = 4, 14
CELL = 256  # the shorter side of a picture in a grid is at least this long
COLUMNS = ("input", "truth", "prediction")


@dataclass(frozen=True)
class Drawn:
    """An object is drawn by its box, x1 y1 x2 y2, and its mask, the part of the picture at ``place`` (top, left)."""

    box: tuple[float, ...]
    mask: np.ndarray
    place: tuple[int, int]
    label: int
    score: float | None = None


def colour_of(label: int) -> tuple[int, int, int]:
    """Return a colour for class ``label``, from 1: hues by the golden ratio, so that neighbours differ."""
    red, green, blue = colorsys.hsv_to_rgb(label * 0.61803398875 % 1, 0.75, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def truth_of(data: CocoSet, index: int) -> list[Drawn]:
    """Return the objects of a picture; crowds are not drawn."""
    found = data.objects(index)
    return [
        Drawn(box=tuple(box), mask=mask.astype(bool), place=(0, 0), label=int(label))
        for box, label, mask in zip(found.boxes.tolist(), found.labels, found.masks, strict=True)
    ]


def found_in(
    result: dict[str, Tensor], size: tuple[int, int], original: tuple[int, int], *, least: float = LEAST_SCORE
) -> list[Drawn]:
    """Return detections of at least score ``least`` in an image of ``size``, in the pixels of the ``original``."""
    scale = torch.tensor([original[1] / size[1], original[0] / size[0]] * 2)
    drawn = []
    for box, label, score, mask in zip(
        (result["boxes"].float().cpu() * scale).tolist(), result["labels"].tolist(), result["scores"].tolist(),
        result["masks"].float().cpu(), strict=True,
    ):  # fmt: skip
        if score >= least:
            part, place = paste_mask(mask[0], box, original)
            drawn.append(Drawn(box=tuple(box), mask=part, place=place, label=label, score=score))
    return drawn


def draw(pixels: np.ndarray, objects: Sequence[Drawn], names: Sequence[str]) -> Image.Image:
    """Draw the ``objects`` on ``pixels``, uint8 [H, W, C]; small pictures are enlarged by a whole factor."""
    canvas = np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels
    canvas = canvas.astype(np.float32)
    for item in objects:
        top, left = item.place
        window = canvas[top : top + item.mask.shape[0], left : left + item.mask.shape[1]]
        window[item.mask] = (1 - OPACITY) * window[item.mask] + OPACITY * np.array(colour_of(item.label))
    factor = max(1, -(-CELL // min(canvas.shape[:2])))
    picture = Image.fromarray(np.rint(canvas).astype(np.uint8))
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(picture)
    for item in objects:
        corners = [factor * value for value in item.box]
        pen.rectangle(corners, outline=colour_of(item.label), width=2)
        text = names[item.label - 1] + ("" if item.score is None else f" {item.score:.2f}")
        place = (max(0, corners[0]), max(0, corners[1] - LINE))
        pen.rectangle(pen.textbbox(place, text), fill=colour_of(item.label))
        pen.text(place, text, fill="black")
    return picture


def grid(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Lay out rows of input, truth and prediction with titles above the columns."""
    widths = [max(row[column].width for row in rows) for column in range(len(COLUMNS))]
    heights = [max(picture.height for picture in row) for row in rows]
    canvas = Image.new("RGB", (sum(widths) + GAP * 4, LINE + GAP + sum(heights) + GAP * len(rows)), "white")
    pen = ImageDraw.Draw(canvas)
    for column, title in enumerate(COLUMNS):
        left = GAP + sum(widths[:column]) + GAP * column
        pen.text((left, 1), title, fill="black")
        for number, row in enumerate(rows):
            canvas.paste(row[column], (left, LINE + GAP + sum(heights[:number]) + GAP * number))
    return canvas


def save(picture: Image.Image, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp.png")
    try:
        picture.save(aside)
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def as_json(drawn: Sequence[Drawn], names: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return detections for a file of predictions: name, score, box as x1 y1 x2 y2, and the run lengths of the mask."""
    return [
        {
            "class": names[item.label - 1], "label": item.label, "score": row["score"],
            "box": [round(value, 3) for value in item.box], "mask": row["segmentation"],
        }
        for item, row in zip(drawn, rows, strict=True)
    ]  # fmt: skip
