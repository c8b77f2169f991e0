"""The one real set of instances that a package carries: a tiny Mask R-CNN learns 125 nuclei of one micrograph by heart.

The picture is stardist's (BSD-3, from the Data Science Bowl 2018), read from the files of its wheel: ``pip install
--no-deps stardist``, or MIRL_NUCLEI names a folder with img2d.tif and mask2d.tif. stardist itself is not imported.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from mirl.dataloaders.tools.composite_sets import encode
from mirl.engine.transfer.detection.recipes import detect_recipe
from mirl.engine.transfer.detection.run import detect
from tests.engine.conftest import checkpoint  # noqa: F401 - a fixture
from tests.engine.models.helpers import tiny_config

SIDE, LEAST_PIXELS = 128, 20


def folder() -> Path | None:
    if "MIRL_NUCLEI" in os.environ:
        return Path(os.environ["MIRL_NUCLEI"])
    try:
        files = importlib.metadata.files("stardist") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = [file for file in files if file.name == "img2d.tif"]
    return Path(str(found[0].locate())).parent if found else None


def write_tiles(root: Path, source: Path) -> tuple[Path, int]:
    """Sixteen tiles of 128 pixels and their COCO file; how many nuclei they hold."""
    picture, labels = tifffile.imread(source / "img2d.tif"), tifffile.imread(source / "mask2d.tif")
    low, high = np.percentile(picture, (1, 99.8))
    grey = ((picture.astype(np.float32) - low) / (high - low) * 255).clip(0, 255).astype(np.uint8)
    images, annotations = [], []
    (root / "tiles").mkdir()
    for number in range(16):
        top, left = (SIDE * place for place in divmod(number, 4))
        window = slice(top, top + SIDE), slice(left, left + SIDE)
        Image.fromarray(grey[window]).save(root / "tiles" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": SIDE, "width": SIDE})
        for label in np.unique(labels[window])[1:]:
            mask = labels[window] == label
            if mask.sum() < LEAST_PIXELS:
                continue
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            box = [columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]]
            annotations.append(
                {
                    "id": len(annotations) + 1, "image_id": number, "category_id": 1, "bbox": [int(x) for x in box],
                    "area": int(mask.sum()), "iscrowd": 0, "segmentation": encode(mask, "compressed"),
                }
            )  # fmt: skip
    path = root / "tiles.json"
    categories = [{"id": 1, "name": "nucleus"}]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path, len(annotations)


@pytest.mark.slow
@pytest.mark.skipif(folder() is None, reason="needs stardist's files: pip install --no-deps stardist, or MIRL_NUCLEI")
def test_nuclei_are_learned_by_heart(tmp_path, checkpoint):  # noqa: F811
    source = folder()
    assert source is not None
    annotations, nuclei = write_tiles(tmp_path, source)
    assert nuclei > 125, "those on a border count in two tiles"
    config = tiny_config(depth=6, width=64, heads=2, segments=2, patch_size=8, image_height=SIDE, image_width=SIDE)
    out = detect(
        detect_recipe(
            "demo", checkpoint=str(checkpoint(config)), data=str(tmp_path / "tiles"), annotations=str(annotations),
            val=str(tmp_path / "tiles"), val_annotations=str(annotations), image_size=SIDE, out=str(tmp_path / "run"),
            steps=int(os.environ.get("MIRL_NUCLEI_STEPS", "120")), warmup_steps=10, batch_size=8, channels=32,
            tensorboard=False, device="cpu", precision="fp32", picture_every=1000, flip=True, checkpoint_every=1000,
        )
    )  # fmt: skip
    found = json.loads((out / "evaluation" / "evaluation.json").read_text())
    # Guesses of one size at random places have an AP50 near 0.
    assert found["box"]["AP50"] > 50 and found["mask"]["AP50"] > 50, found
