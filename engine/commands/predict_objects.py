"""`mirl predict` with a detector draws the objects that it finds on the images, and writes them as JSON."""

from __future__ import annotations

import argparse
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mirl.dataloaders.errors import one_line
from mirl.dataloaders.sources.patience import read_image
from mirl.engine.checkpoints.files import write_whole
from mirl.engine.checkpoints.kinds import Given
from mirl.engine.commands.device_flag import device_of_process
from mirl.engine.commands.image_inputs import open_images
from mirl.errors import UserError

DEFAULT_OUT = "detections"
FILE = "detections.json"


def run(found: Given, arguments: argparse.Namespace) -> int:
    """Write an overlay for each image and one JSON file into the folder --out; print a line for each image.

    Raises:
        UserError: --out is a file or is not empty, or an image does not exist.
    """
    out: Path = arguments.out or Path(DEFAULT_OUT)
    if out.suffix or out.is_file():
        raise UserError(f"out is {out}: a detector writes pictures and {FILE}, so give a folder")
    if out.is_dir() and any(out.iterdir()) and not arguments.overwrite:
        raise UserError(f"out is {out}, which is not empty: give another folder or --overwrite")
    if not 0 <= arguments.min_score <= 1:
        raise UserError(f"min_score is {arguments.min_score}: give a number from 0 to 1")
    source = open_images(arguments.images, index_dir=arguments.index_dir)
    print(f"checkpoint {found}", flush=True)
    device = device_of_process(arguments.device)
    # These import torch, so they come late: a wrong path should be told at once.
    import torch

    from mirl.engine.transfer.detection import pictures
    from mirl.engine.transfer.detection.evaluation import as_rows
    from mirl.engine.transfer.detection.load import load_detector
    from mirl.engine.transfer.detection.run import picture_batch

    model, config = load_detector(found.checkpoint, device=device)
    names, channels = config.classes, config.encoder.channels
    rows: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()
    for index in range(source.num_images):
        path = source.path(index)
        try:
            with Image.open(io.BytesIO(read_image(source, index))) as image:
                pixels = np.array(image.convert("RGB" if channels == 3 else "L"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            rows.append({"image": path, "error": one_line(error)})
            print(f"{path}  not read: {one_line(error)}", flush=True)
            continue
        pixels = pixels if channels == 3 else pixels[..., None]
        batch = picture_batch(config, pixels, device)
        with torch.no_grad():
            (result,) = model(batch.images, batch.sizes)
        kept = {name: value[result["scores"] >= arguments.min_score] for name, value in result.items()}
        size, original = batch.sizes[0], batch.originals[0]
        drawn = pictures.found_in(kept, size, original, least=0.0)
        objects = pictures.as_json(drawn, names, as_rows(kept, index, size, original, range(1, len(names) + 1)))
        overlay = f"{index:05d}-{Path(path).stem}.png"
        pictures.save(pictures.draw(pixels, drawn, names), out / overlay)
        rows.append(
            {"image": path, "height": original[0], "width": original[1], "overlay": overlay, "objects": objects}
        )
        here = Counter(item["class"] for item in objects)
        counts += here
        print(f"{path}  " + (", ".join(f"{count} {name}" for name, count in here.items()) or "nothing"), flush=True)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / FILE, json.dumps(rows, indent=1) + "\n")
    told = ", ".join(f"{name} {count}" for name, count in counts.most_common()) or "nothing found"
    print(
        f"{len(rows)} images: {told}\nwrote {out / FILE} and {len(rows) - sum('error' in row for row in rows)} pictures"
    )
    return 0
