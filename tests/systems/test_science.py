"""The experiment on Fashion-MNIST: its data, its equal compute, and the rule by which it is read."""

from __future__ import annotations

import dataclasses
import gzip

import numpy as np
import pytest
import torch

from benchmarks.science.experiment import FRESH, FULL, METHODS, REDUCED, run_unit
from benchmarks.science.fashion_mnist import balanced_subset, load, read_idx
from benchmarks.science.reading import by_setting, comparisons, difference, draw, table, verdict
from mirl.engine.accounting.flops import training_flops_per_image
from mirl.engine.analysis.in_memory import ShortFinetune
from mirl.engine.models import ExactSkips

TINY = dataclasses.replace(
    REDUCED, depth=6, width=16, heads=2, segments=2, decoder_width=16, decoder_heads=2, decoder_depth=1,
    pretrain_images=64, pretrain_batch=16, finetune=ShortFinetune(steps=2, batch_size=8), labels=(20,), test_images=30,
)  # fmt: skip


def write_idx(path, values, magic):
    header = magic.to_bytes(4, "big") + b"".join(size.to_bytes(4, "big") for size in values.shape)
    with gzip.open(path, "wb") as stream:
        stream.write(header + values.astype(np.uint8).tobytes())


@pytest.fixture
def folder(tmp_path):
    """Files of the right form with a few images of noise: the real ones are a package of 31 MB."""
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 60), ("t10k", 30)):
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte.gz", rng.integers(0, 256, (count, 28, 28)), 2051)
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", np.arange(count) % 10, 2049)
    return tmp_path


def test_files_are_read_and_wrong_ones_refused(folder, tmp_path):
    images, labels = load(folder)["train"]
    assert images.shape == (60, 28, 28, 1) and images.dtype == torch.uint8 and labels[:3].tolist() == [0, 1, 2]
    write_idx(tmp_path / "cut.gz", np.zeros((2, 3)), 2051)  # two dimensions under the magic number of three
    with pytest.raises(ValueError, match="is not the IDX file"):
        read_idx(tmp_path / "cut.gz", 2051)
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        load(tmp_path / "none")


def test_subsets_are_balanced_and_depend_on_the_seed():
    labels = torch.arange(200) % 10
    chosen = balanced_subset(labels, 50, seed=1)
    assert labels[chosen].bincount().tolist() == [5] * 10 and len(set(chosen.tolist())) == 50
    assert not torch.equal(chosen, balanced_subset(labels, 50, seed=2))


@pytest.mark.parametrize("scale", [REDUCED, FULL], ids=["reduced", "full"])
def test_every_method_gets_the_same_compute(scale):
    spent = [
        scale.pretrain_steps(method) * training_flops_per_image(scale.model(method), ExactSkips()) for method in METHODS
    ]
    assert max(spent) / min(spent) < 1.01  # to whole steps


def test_a_unit_repeats_to_the_bit(folder):
    records = run_unit(TINY, "mirl", 3, folder, "cpu")
    assert [(r["labels"], r["fresh_blocks"]) for r in records] == [(20, 0), (20, 2)]
    again = run_unit(TINY, "mirl", 3, folder, "cpu")
    assert [r["top1_percent"] for r in again] == [r["top1_percent"] for r in records]
    assert again[0]["last_loss"] == records[0]["last_loss"] > 0
    assert len(run_unit(TINY, FRESH, 3, folder, "cpu")) == 1


def record(method, seed, fresh, top1):
    return {"method": method, "seed": seed, "labels": 100, "fresh_blocks": fresh, "top1_percent": top1}


def test_reading_is_paired_and_does_not_overstate(tmp_path):
    records = [record("mae", seed, 0, 50 + 10 * seed) for seed in range(3)]
    records += [record("mae", seed, 8, 51 + 10 * seed + 0.1 * seed) for seed in range(3)]
    records += [record("mirl", seed, 0, top1) for seed, top1 in enumerate((58, 60, 65))]
    found = by_setting(records)
    # Between seeds 10 points, between the members of a pair 1: pairing tells.
    mean, error = difference(found, ("mae", 100, 8), ("mae", 100, 0))
    assert mean == pytest.approx(1.1) and error == pytest.approx(0.1 / 3**0.5)
    # Student's t with two degrees of freedom: 4.303 standard errors.
    assert verdict(mean, error, 3) == "higher" and verdict(-2.5, 0.6, 3) == "undecided"
    assert verdict(-2.6, 0.6, 3) == "lower" and verdict(-2.5, 0.6, 4) == "lower" and verdict(9.0, 0.1, 1) == "undecided"
    lines = comparisons(records)
    assert any("Fig. 2, mae" in line and line.endswith("higher") for line in lines)
    assert any("MIRL against MAE: +1.00" in line and line.endswith("undecided") for line in lines)
    assert comparisons([record("mirl", 0, 0, 1.0), record("mae", 0, 0, 9.0)])[0].endswith("undecided")  # one seed
    assert "| mae | 60.00 +- 10.00 | 61.10 +- 10.10 |" in table(records)
    draw(records, tmp_path / "science.png")
    assert (tmp_path / "science.png").stat().st_size > 5000
