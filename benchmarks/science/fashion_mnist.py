"""Fashion-MNIST (Zalando, MIT licence) from the files of Debian's package dataset-fashion-mnist, or copies of them."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DEFAULT_FOLDER = Path("/usr/share/datasets/fashion-mnist")
IMAGES, LABELS = 2051, 2049  # magic numbers of the IDX format for uint8 in three dimensions and in one
CLASSES = 10
# Over the 60,000 training images, of values in [0, 1].
MEAN, STD = (0.286,), (0.353,)


def load(folder: Path = DEFAULT_FOLDER) -> dict[str, tuple[Tensor, Tensor]]:
    """{"train": 60,000, "test": 10,000}: images uint8 [n, 28, 28, 1] and labels int64 [n].

    Raises:
        FileNotFoundError: the files are not there; names the package that has them.
        ValueError: a file is no IDX file of the right kind.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} does not exist: apt-get install dataset-fashion-mnist, or give --data FOLDER"
        )
    found = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz", IMAGES)[..., None]
        labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", LABELS)
        found[split] = torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))
    return found


def read_idx(path: Path, magic: int) -> np.ndarray:
    """A gzipped IDX file of uint8; ValueError unless its magic number and its size are right."""
    with gzip.open(path) as stream:
        content = stream.read()
    found = int.from_bytes(content[:4], "big")
    shape = tuple(np.frombuffer(content, ">i4", count=magic & 0xFF, offset=4))
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape))
    if found != magic or values.size != np.prod(shape):
        raise ValueError(f"{path} is not the IDX file it is named for (magic {found}, {values.size} values, {shape})")
    return values.reshape(shape).copy()


def balanced_subset(labels: Tensor, count: int, seed: int) -> Tensor:
    """Numbers of ``count`` images, equally many of each class, drawn by ``seed``."""
    if count % CLASSES:
        raise ValueError(f"count is {count}: give a multiple of {CLASSES}")
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label in range(CLASSES):
        members = (labels == label).nonzero()[:, 0]
        chosen.append(members[torch.randperm(len(members), generator=generator)[: count // CLASSES]])
    return torch.cat(chosen)
