"""A small COCO set of composites, with every edge case, and a tiny pre-trained encoder."""

from __future__ import annotations

from pathlib import Path

import pytest

from mirl.dataloaders.tools.composite_sets import write_coco
from mirl.dataloaders.tools.composites import CASES, Composer


@pytest.fixture(scope="session")
def composites(tmp_path_factory) -> Path:
    """A folder with train/, train.json (12 pictures, every edge case) and val/, val.json (5 pictures)."""
    root, composer = tmp_path_factory.mktemp("composites"), Composer(size=(64, 64), seed=1, fashion=None)
    write_coco(root, "train", 12, composer, cases=CASES)
    write_coco(root, "val", 5, composer, cases=("crowd", "empty", "wide"))
    return root
