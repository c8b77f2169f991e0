"""Draw what a segmenter does: the image, the truth and the prediction side by side, with a legend of colours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

GAP = 4
LINE = 14
HEIGHT = 192  # a row is so high
OPACITY = 0.6
IGNORED_COLOUR = (0, 0, 0)
MOST_NAMED = 24  # a legend names so many classes


def palette(classes: int) -> np.ndarray:
    """Return a colour of each class, uint8 [K, 3], easy to tell apart: hues by the golden ratio, in three shades."""
    index = np.arange(classes)
    hue = (index * 0.61803398875 + 0.08) % 1.0
    shades = np.array([(0.85, 0.95), (0.6, 0.75), (0.95, 0.6)])[index // 7 % 3]
    hsv = np.stack([hue, shades[:, 0], shades[:, 1]], axis=1)
    pixels = Image.fromarray(np.rint(255 * hsv).astype(np.uint8)[None], mode="HSV").convert("RGB")
    return np.asarray(pixels)[0]


def overlay(image_hwC: np.ndarray, classes_hw: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Draw the image in grey under the colours of its classes, uint8 [h, w, 3]; -1, ignored, is black."""
    grey = image_hwC.astype(np.float32).mean(axis=2, keepdims=True)
    table = np.concatenate([np.array([IGNORED_COLOUR], np.uint8), colours])
    coloured = table[classes_hw.astype(np.int64) + 1]
    return np.rint((1 - OPACITY) * grey + OPACITY * coloured).astype(np.uint8)


def grid(
    rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str], names: Sequence[str], colours: np.ndarray,
    shown: Sequence[int],
) -> Image.Image:  # fmt: skip
    """Lay out rows of pictures [h, w, C] of one size each, with titles above the columns.

    The colours of the classes ``shown`` stand below.
    """
    cells = [[_cell(picture) for picture in row] for row in rows]
    widths = [max(row[column].width for row in cells) for column in range(len(titles))]
    legend = _legend(sum(widths) + GAP * (len(widths) + 1), names, colours, shown)
    height = LINE + GAP + len(cells) * (HEIGHT + GAP) + legend.height
    canvas = Image.new("RGB", (legend.width, height), "white")
    pen = ImageDraw.Draw(canvas)
    left = GAP
    for column, (title, width) in enumerate(zip(titles, widths, strict=True)):
        pen.text((left, 1), title, fill="black")
        for row, pictures in enumerate(cells):
            canvas.paste(pictures[column], (left, LINE + GAP + row * (HEIGHT + GAP)))
        left += width + GAP
    canvas.paste(legend, (0, height - legend.height))
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


def _cell(picture: np.ndarray) -> Image.Image:
    pixels = np.repeat(picture, 3, axis=2) if picture.shape[2] == 1 else picture
    height, width = pixels.shape[:2]
    size = (max(1, round(width * HEIGHT / height)), HEIGHT)
    larger = height < HEIGHT / 2
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST if larger else Image.Resampling.BILINEAR)


def _legend(width: int, names: Sequence[str], colours: np.ndarray, shown: Sequence[int]) -> Image.Image:
    """Draw a coloured square and the name of each class, in as many lines as it takes."""
    canvas = Image.new("RGB", (width, 1))
    measure = ImageDraw.Draw(canvas)
    places: list[tuple[int, int, int]] = []
    left, top = GAP, 0
    for index in shown[:MOST_NAMED]:
        wide = LINE + int(measure.textlength(names[index])) + 2 * GAP
        if left + wide > width and left > GAP:
            left, top = GAP, top + LINE + 2
        places.append((index, left, top))
        left += wide
    canvas = Image.new("RGB", (width, top + LINE + GAP if places else GAP), "white")
    pen = ImageDraw.Draw(canvas)
    for index, left, top in places:
        pen.rectangle((left, top + 2, left + LINE - 4, top + LINE - 2), fill=tuple(map(int, colours[index])))
        pen.text((left + LINE, top + 1), names[index], fill="black")
    return canvas
