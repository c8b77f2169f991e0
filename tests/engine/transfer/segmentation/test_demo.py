"""The demo finds its checkpoint and says honestly how it ended; its composites are a data set of eight classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mirl.dataloaders.label_scan import scan_labels
from mirl.dataloaders.sources.label_map import read_label_map
from mirl.dataloaders.sources.label_pairs import has_split, open_pairs
from mirl.dataloaders.tools.composite_labels import prepare_label_composites
from mirl.engine.checkpoints.best import Best, write_best
from mirl.engine.transfer.segmentation.demo import as_fresh, comparison, with_checkpoint
from mirl.engine.transfer.segmentation.recipes import RECIPES, segment_recipe
from mirl.errors import UserError


def test_it_takes_the_newest_run_of_mirl_pretrain(tmp_path):
    config, runs = segment_recipe("demo"), tmp_path / "demo"
    with pytest.raises(UserError, match="make one by mirl pretrain"):
        with_checkpoint(config, runs)
    for name in ("demo", "demo-2"):
        (tmp_path / name / "checkpoints" / "step-00000001").mkdir(parents=True)
    (tmp_path / "demo-3").mkdir()
    assert with_checkpoint(config, runs).segment.checkpoint == str(tmp_path / "demo-2")
    given = segment_recipe("demo", checkpoint="mine")
    assert with_checkpoint(given, runs).segment.checkpoint == "mine"
    other = as_fresh(given, Path("runs/x"))
    assert other.segment.fresh and other.run.out == "runs/x_fresh" and other.optim == given.optim


def test_it_says_which_encoder_was_better(tmp_path):
    def best(name: str, score: float) -> Path:
        (tmp_path / name / "checkpoints").mkdir(parents=True, exist_ok=True)
        made = Best(step=1, epoch=1.0, weights="last", score_percent=score, images=8, metric="mIoU")
        write_best(tmp_path / name / "checkpoints", made)
        return tmp_path / name

    assert "12.0 points more than from a fresh encoder" in comparison(best("a", 62), best("b", 50))[0]
    assert "NO BETTER than from a fresh encoder (-2.0 points)" in comparison(best("a", 48), best("b", 50))[0]
    assert "nothing to compare" in comparison(best("a", 48), tmp_path / "none")[0]


def test_its_composites_are_pairs_with_a_label_map(tmp_path):
    folder = prepare_label_composites(tmp_path, train=3, val=2, side=48)
    assert prepare_label_composites(tmp_path, train=3, val=2, side=48) == folder
    train, val = open_pairs([folder], []), open_pairs([folder], [], split="val")
    assert (train.num_images, val.num_images, has_split(folder, "val")) == (3, 2, True)
    known = read_label_map(str(train.map_file))
    assert len(known.names) == 8 and known.names[-1] == "object"
    counts = scan_labels(train, known, threads=1)
    assert counts.sum() == 3 * 48 * 48 and counts[8:].sum() > 0
    assert np.array(Image.open(train.label_path(0))).max() > 7


def test_every_recipe_can_be_made_and_names_where_it_comes_from():
    for name, recipe in RECIPES.items():
        config = segment_recipe(name)
        assert config.recipe == name and recipe.__doc__ is not None
        if name.startswith("vit"):
            assert "Not measured here" in recipe.__doc__ and "BEiT" in recipe.__doc__
            assert config.optim.steps == 160_000 and config.optim.schedule == "poly"
            depth = {"vit_b": 12, "vit_b_24": 24, "vit_b_48": 48, "vit_s_54": 54}[name]
            # The lowest layer learns about as slowly as that of ViT-B.
            lowest = config.segment.layer_decay ** (depth + 1)
            assert lowest == pytest.approx(0.65**13, rel=0.2)
    with pytest.raises(UserError, match="did you mean 'vit_b_48'"):
        segment_recipe("vit_b48")
