"""Write the features of every image of a data set in parts, so that an interrupted command goes on where it stopped.

The data set is cut into parts of `PART` images by their numbers. A part is the same whichever rank makes it, and a
whole part is not made again. `Parts` reads them back in the order of the data set.

Letters: n images, D features.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from mirl.dataloaders import SubsetSource, build_eval_loader
from mirl.dataloaders.errors import BadImage
from mirl.dataloaders.sources.base import Source
from mirl.engine.checkpoints.files import write_whole
from mirl.engine.distributed.launch import Ranks
from mirl.engine.transfer.classification.classifier import Classifier
from mirl.errors import UserError

PART = 2048


@dataclass(frozen=True)
class Parts:
    """The parts of an embedding are in ``folder``.

    ``plan`` says what was embedded, and must equal that of an earlier start.
    """

    folder: Path
    images: int
    plan: dict[str, Any]

    def __len__(self) -> int:
        return -(-self.images // PART)

    def path(self, part: int) -> Path:
        return self.folder / f"part-{part:06d}.safetensors"

    def begin(self) -> int:
        """Make the folder, or take that of an earlier start; return how many parts are there already.

        Raises:
            UserError: the folder holds parts of another checkpoint, data set or kind of features.
        """
        plan_file = self.folder / "plan.json"
        if plan_file.is_file():
            other = json.loads(plan_file.read_text())
            for name, value in self.plan.items():
                if other.get(name) != value:
                    raise UserError(
                        f"{self.folder} holds parts of an earlier start with {name} {other.get(name)}, now it is "
                        f"{value}: give the same, or remove that folder"
                    )
            return sum(self.path(part).is_file() for part in range(len(self)))
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(plan_file, json.dumps(self.plan) + "\n")
        return 0

    def missing(self) -> list[int]:
        return [part for part in range(len(self)) if not self.path(part).is_file()]

    def numbers(self, part: int) -> range:
        """Return the numbers of the images of a part."""
        return range(part * PART, min((part + 1) * PART, self.images))

    def write(self, part: int, features_nD: np.ndarray, index_n: np.ndarray) -> None:
        partial = self.path(part).with_suffix(".partial")
        save_file({"features": features_nD, "index": index_n}, partial)
        os.replace(partial, self.path(part))

    def read(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (features float32 [n, D], index int64 [n]) of each part, in order."""
        for part in range(len(self)):
            tensors = load_file(self.path(part))
            yield tensors["features"], tensors["index"]

    def remove(self) -> None:
        shutil.rmtree(self.folder)


@torch.no_grad()
def embed_parts(
    parts: Parts, missing: list[int], model: Classifier, source: Source, function: Callable[[Tensor], Tensor], *,
    ranks: Ranks, batch_size: int, threads: int, advance: Callable[[int], None],
) -> list[BadImage]:  # fmt: skip
    """Make this rank's share of the ``missing`` parts; return the broken images, which have no row.

    function: maps a batch of images, as the model takes them, to features float32 [B, D]. advance: is told how many
    images of this rank were done.
    """
    mine = missing[ranks.rank :: ranks.world_size]
    if not mine:
        return []
    config = model.config
    wanted = [number for part in mine for number in parts.numbers(part)]
    rows: list[np.ndarray] = []
    numbers: list[np.ndarray] = []
    device = ranks.device
    done = iter(mine)
    part, seen = next(done), 0
    with build_eval_loader(
        SubsetSource(source, wanted), image_size=(config.image_height, config.image_width), batch_size=batch_size,
        device_id=device.index or 0 if device.type == "cuda" else None, threads=threads, labels=False,
        channels=config.channels, mean=config.mean, std=config.std,
    ) as loader:  # fmt: skip
        for batch in loader:
            assert batch.valid is not None
            features_BD = function(batch.images).float().cpu().numpy()
            inside = batch.positions < len(wanted)
            index_B = np.array([wanted[position] for position in batch.positions[inside]], dtype=np.int64)
            features_BD, valid_B = features_BD[inside], batch.valid[inside]
            # A batch may end one part and begin the next.
            while len(index_B):
                here = int(np.searchsorted(index_B, parts.numbers(part).stop))
                keep = valid_B[:here]
                rows.append(features_BD[:here][keep])
                numbers.append(index_B[:here][keep])
                seen += here
                index_B, features_BD, valid_B = index_B[here:], features_BD[here:], valid_B[here:]
                if seen == len(parts.numbers(part)):
                    parts.write(part, np.concatenate(rows), np.concatenate(numbers))
                    rows, numbers, seen = [], [], 0
                    part = next(done, part)
            advance(int(inside.sum()))
        return list(loader.bad_images)
