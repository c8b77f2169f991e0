"""Frozen features: nearest neighbours by brute force, a linear probe that learns, and the command around them."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch

from mirl.dataloaders import load_images
from mirl.engine.analysis.features import count_classes, extract_features, load_frozen_encoder
from mirl.engine.analysis.nearest_neighbours import knn_votes
from mirl.engine.checkpoints.pretrained import load_pretrained
from mirl.engine.commands.probe import main
from mirl.engine.transfer.classification.classifier import all_visible, pool_tokens
from mirl.engine.transfer.classification.linear_probe import LabelledFeatures, hold_out, train_linear_probe
from mirl.errors import UserError
from tests.engine.conftest import write_classes
from tests.engine.models.helpers import tiny_config

CPU = torch.device("cpu")
CONFIG = tiny_config()


def labelled(count: int, classes: int = 3, spread: float = 1.0, seed: int = 0) -> LabelledFeatures:
    """Clouds around one point a class, on a scale and at a place that a probe has to put right."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    centres = torch.randn(classes, 6, generator=torch.Generator().manual_seed(9))
    features = centres[labels] + spread * torch.randn(count, 6, generator=generator)
    return LabelledFeatures(features=1e3 + 50 * features, labels=labels, classes=None)


def test_knn_equals_brute_force():
    generator = torch.Generator().manual_seed(1)
    train = LabelledFeatures(
        features=torch.randn(40, 5, generator=generator),
        labels=torch.randint(4, (40,), generator=generator),
        classes=None,
    )
    queries = torch.randn(300, 5, generator=generator)  # more than are compared at a time
    votes = knn_votes(train, queries, num_classes=4, k=7, temperature=0.1)
    for query, found in zip(queries.tolist(), votes, strict=True):
        norm = math.hypot(*query)
        similarity = [
            sum(a * b for a, b in zip(query, key, strict=True)) / norm / math.hypot(*key)
            for key in train.features.tolist()
        ]
        nearest = sorted(range(40), key=lambda i: -similarity[i])[:7]
        expected = [0.0] * 4
        for i in nearest:
            expected[int(train.labels[i])] += math.exp((similarity[i] - similarity[nearest[0]]) / 0.1)
        assert found.tolist() == pytest.approx(expected, rel=1e-4)  # float32 similarities, divided by 0.1


def test_knn_refuses_more_neighbours_than_images():
    for k in (0, 41):
        with pytest.raises(UserError, match=f"knn_k is {k} and there are 40 training images: give 1 to 40"):
            knn_votes(labelled(40), torch.zeros(1, 6), num_classes=3, k=k, temperature=0.1)


def test_the_linear_probe_learns_and_repeats():
    train, val = labelled(300), labelled(90, seed=1)
    probe = train_linear_probe(train, num_classes=3, epochs=20, seed=0)
    correct = (probe(val.features).argmax(dim=1) == val.labels).float().mean().item()
    # The nearest centre, which is the best that can be done with equal round clouds, gets this share right.
    centres = torch.stack([train.features[train.labels == label].mean(dim=0) for label in range(3)])
    best = (torch.cdist(val.features, centres).argmin(dim=1) == val.labels).float().mean().item()
    assert 0.7 < best < 0.99 and correct == pytest.approx(best, abs=0.05)
    again = train_linear_probe(train, num_classes=3, epochs=20, seed=0)
    assert torch.equal(again.weight, probe.weight) and again.rate == probe.rate
    assert not torch.equal(train_linear_probe(train, num_classes=3, epochs=20, seed=1).weight, probe.weight)
    unlearnable = LabelledFeatures(features=torch.ones(30, 6), labels=train.labels[:30], classes=None)
    assert train_linear_probe(unlearnable, num_classes=3, epochs=2, seed=0)(torch.ones(1, 6)).isfinite().all()


def test_held_out_images_are_of_every_class_that_has_two():
    labels = torch.tensor([0] * 40 + [1] * 3 + [2])
    kept, held = hold_out(labels, seed=0)
    assert sorted(kept.tolist() + held.tolist()) == list(range(44))
    assert labels[held].bincount(minlength=3).tolist() == [4, 1, 0]
    assert hold_out(labels, seed=1)[1].tolist() != held.tolist()
    with pytest.raises(UserError, match="no class has two training images"):
        train_linear_probe(labelled(3), num_classes=3, epochs=1, seed=0)


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_features_are_those_of_the_pretrained_encoder(pool, checkpoint, tmp_path):
    path = checkpoint(CONFIG)
    data = write_classes(tmp_path / "train", {"a": 5, "b": 4}, size=(16, 24))
    (data / "a" / "02.png").write_bytes(b"broken")
    model = load_frozen_encoder(path, CPU)
    found = extract_features(model, data, pool=pool, device=CPU, batch_size=2, threads=1)
    assert found.features.shape == (8, 24) and found.labels.tolist() == [0] * 4 + [1] * 4
    assert found.classes == ["a", "b"] and found.skipped == 1
    source = load_pretrained(path)
    images = load_images([data / "b" / "00.png"], image_size=(16, 24), resize_short=18)  # 16 * 256 / 224
    tokens = source.encoder(images, all_visible(1, CONFIG.num_patches, CPU))[-1]
    # the blocks of two segments there, of one here, in batches of another size
    torch.testing.assert_close(found.features[4:5], pool_tokens(tokens, pool), atol=1e-5, rtol=1e-5)
    again = extract_features(model, data, pool=pool, device=CPU, batch_size=9, threads=1)
    torch.testing.assert_close(again.features, found.features, atol=1e-5, rtol=1e-5)  # batches of another size


def test_a_truncated_encoder_is_probed_at_the_depth_it_has(checkpoint):
    path = checkpoint(tiny_config(objective="truncated", truncated_depth=3, segments=1, did=False))
    assert len(load_frozen_encoder(path, CPU).encoder.blocks) == 3


def test_labels_without_names_are_compared_by_number():
    train, val = labelled(6), labelled(8, classes=4)
    assert count_classes(train, labelled(4, classes=2), names=("T", "V")) == 3
    with pytest.raises(UserError, match="V has label 3 and the labels of T end at 2"):
        count_classes(train, val, names=("T", "V"))


def test_the_command(checkpoint, tmp_path, capsys):
    path = checkpoint(CONFIG)
    train = write_classes(tmp_path / "train", {"a": 12, "b": 12, "c": 12})
    val = write_classes(tmp_path / "validation", {"a": 5, "b": 5, "c": 5})
    out = tmp_path / "probe.json"
    command = [
        str(path), "--data", str(train), "--val", str(val), "--json", str(out), "--knn-k", "5", "--epochs", "30",
        "--threads", "1",
    ]  # fmt: skip
    assert main(command) == 0
    results = json.loads(out.read_text())
    printed = capsys.readouterr().out
    for name in ("linear", "knn"):
        assert (
            results[name]["top1_percent"] > 60 and results[name]["top5_percent"] == 100
        )  # one colour a class; by chance 33
        assert f"top-1 {results[name]['top1_percent']:6.2f} %" in printed
    assert (results["train_images"], results["val_images"], results["classes"]) == (36, 15, 3)
    with pytest.raises(UserError, match="json is .* which exists"):
        main(command)
    assert main([*command, "--overwrite"]) == 0
    assert json.loads(out.read_text()) == results  # the seed is all there is

    with pytest.raises(UserError, match="knn_k is 37 and there are 36 training images"):
        main([*command, "--overwrite", "--knn-k", "37"])
    shutil.rmtree(val / "c")
    with pytest.raises(UserError, match=r"the classes of .* and .* differ: .* lacks class 'c'"):
        main([*command, "--overwrite"])
    (val / "a" / "00.png").rename(val / "loose.png")
    with pytest.raises(ValueError, match=r"labels were asked for, but .*loose\.png is in no class folder"):
        main([*command, "--overwrite"])


@pytest.mark.parametrize("flag", ["--knn-k", "--epochs", "--batch-size", "--threads"])
def test_wrong_numbers_are_told_before_anything_is_read(flag):
    name = flag[2:].replace("-", "_")
    with pytest.raises(UserError, match=f"{name} is 0: give 1 or more"):
        main(["nowhere", "--data", "nowhere", "--val", "nowhere", flag, "0"])
    with pytest.raises(UserError, match="knn_temperature is 0"):
        main(["nowhere", "--data", "nowhere", "--val", "nowhere", "--knn-temperature", "0"])
