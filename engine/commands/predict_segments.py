"""`mirl predict SEGMENTER IMAGE ... --out DIR` writes the class of every pixel, as pictures and as numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mirl.dataloaders.sources.label_map import LabelMap
from mirl.engine.checkpoints.files import write_whole
from mirl.engine.checkpoints.kinds import Given
from mirl.engine.commands.device_flag import device_of_process
from mirl.errors import UserError

if TYPE_CHECKING:
    from mirl.dataloaders.sources.base import Source

FILE = "predictions.json"


def check_out(out: Path | None) -> None:
    """Raise UserError unless ``out`` is the name of a folder that can be made."""
    if out is None or out.suffix:
        raise UserError(f"out is {out or 'not given'}: a segmenter writes pictures, give the name of a folder for them")
    if out.exists():
        raise UserError(f"out is {out}, which exists: give another folder")


def predict_segments(found: Given, source: Source, out: Path, *, device: str) -> int:
    """Write an overlay, a label image of raw values and the classes' shares of each image to ``out``.

    The files are DIR/overlays/NAME.png, DIR/labels/NAME.png and DIR/predictions.json: [{"image", "overlay", "labels",
    "classes": [{"class", "label", "pixels", "share"}]}], the largest class first; {"image", "error"} for an unreadable
    image. Returns the exit code.
    """
    torch_device = device_of_process(device)
    # These import torch, so they come late: a wrong path should be told at once.
    from mirl.dataloaders.decoding.headers import decode_with_pillow
    from mirl.dataloaders.errors import ImageError
    from mirl.engine.transfer.segmentation.inference import predict
    from mirl.engine.transfer.segmentation.load import load_segmenter, view_of
    from mirl.engine.transfer.segmentation.pictures import palette

    model, config = load_segmenter(found.checkpoint, device=torch_device)
    view, colours, raw = view_of(config), palette(len(config.classes)), raw_values(config.label_map)
    print(f"{len(config.classes)} classes; images {source.ledger}; {view}", flush=True)
    rows: list[dict[str, Any]] = []
    taken: set[str] = set()
    for index in range(source.num_images):
        path = source.path(index)
        try:
            image = decode_with_pillow(source.read(index), model.config.channels)
        except ImageError as error:
            rows.append({"image": path, "error": str(error)})
            print(f"{path}  not read: {error}", flush=True)
            continue
        classes_hw = predict(model, image, view, torch_device).argmax(dim=0).cpu().numpy()
        name = _free_name(Path(path.split("::")[-1]).stem, taken)
        rows.append({"image": path} | _written(out, name, image, classes_hw, raw, colours, config.classes))
        shares = "  ".join(f"{item['class']} {item['share']:.3f}" for item in rows[-1]["classes"][:4])
        print(f"{path}  {shares}", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / FILE, json.dumps(rows, indent=1) + "\n")
    print(f"wrote {len(taken)} overlays, label images and {FILE} to {out}")
    return 0


def raw_values(known: LabelMap) -> list[int]:
    """Return the value that each class has in a label image; the first of several."""
    return [known.values[known.classes.index(index)] for index in range(len(known.names))]


def _written(
    out: Path, name: str, image: Any, classes_hw: Any, raw: Sequence[int], colours: Any, names: Sequence[str]
) -> dict[str, Any]:
    """Write the pictures of one image, and return its entry of the JSON file."""
    import numpy as np
    from PIL import Image

    from mirl.engine.transfer.segmentation.pictures import grid, overlay, save

    counts = np.bincount(classes_hw.ravel(), minlength=len(names))
    order = [int(index) for index in np.argsort(-counts, kind="stable") if counts[index]]
    covered = overlay(image, classes_hw, colours)
    picture = grid([[image, covered]], ("input", "prediction"), names, colours, order)
    values = np.asarray(raw)[classes_hw].astype(np.uint8 if max(raw) < 256 else np.uint16)
    paths = {"overlay": out / "overlays" / f"{name}.png", "labels": out / "labels" / f"{name}.png"}
    save(picture, paths["overlay"])
    save(Image.fromarray(values), paths["labels"])
    found = [
        {"class": names[index], "label": raw[index], "pixels": int(counts[index]),
         "share": float(counts[index] / counts.sum())}
        for index in order
    ]  # fmt: skip
    return {kind: str(path) for kind, path in paths.items()} | {"classes": found}


def _free_name(stem: str, taken: set[str]) -> str:
    """Return ``stem``, with a number if images of several folders have the same name."""
    name, number = stem, 2
    while name in taken:
        name, number = f"{stem}-{number}", number + 1
    taken.add(name)
    return name
