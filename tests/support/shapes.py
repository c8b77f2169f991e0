"""Pictures of discs and rectangles with label images, whose every pixel follows from a formula."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ("ground", "disc", "box")
COLOURS = np.array([(70, 110, 60), (210, 90, 60), (60, 90, 210)])
IGNORED = 255


def shapes(seed: int, size: tuple[int, int] = (48, 64)) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [h, w, 3] and raw label values uint8 [h, w]: 0 ground, 1 disc, 2 box, 255 along the upper edge."""
    rng = np.random.default_rng(seed)
    height, width = size
    rows, columns = np.mgrid[:height, :width]
    labels = np.zeros(size, np.uint8)
    for value in (1, 2):
        y, x = rng.uniform(0.25, 0.75, 2) * size
        radius = rng.uniform(0.15, 0.3) * height
        if value == 1:
            inside = (rows - y) ** 2 + (columns - x) ** 2 <= radius**2
        else:
            inside = (abs(rows - y) <= 0.8 * radius) & (abs(columns - x) <= 1.2 * radius)
        labels[inside] = value
    image = COLOURS[labels] + rng.normal(0, 25, (*size, 3))
    labels[:2] = IGNORED
    return image.clip(0, 255).astype(np.uint8), labels


def write_shapes(root: Path, count: int, *, first: int = 0, size: tuple[int, int] = (48, 64)) -> Path:
    """``root``/images/NN.png and ``root``/labels/NN.png, with the names of the classes in ``root``/label-map.txt."""
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
    for number in range(count):
        image, labels = shapes(first + number, size)
        Image.fromarray(image).save(root / "images" / f"{number:02d}.png")
        Image.fromarray(labels).save(root / "labels" / f"{number:02d}.png")
    lines = [f"{value} {name}" for value, name in enumerate(NAMES)]
    (root / "label-map.txt").write_text("\n".join([*lines, f"{IGNORED} ignore"]) + "\n")
    return root
