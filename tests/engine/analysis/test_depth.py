"""Depth report and short fine-tuning in memory."""

from __future__ import annotations

import json
import re

import pytest
import torch

from mirl.engine.analysis.depth import cut_depths, gradient_norms
from mirl.engine.analysis.in_memory import ShortFinetune, accuracy_percent, finetune_in_memory, shift_and_flip
from mirl.engine.cli import dispatch
from mirl.engine.commands.depth_picture import bands
from mirl.engine.commands.depth_report import reading, table
from mirl.engine.models import MIRL
from mirl.engine.models.teacher import EmaTeacher
from mirl.engine.training.noise import mask_noise
from mirl.engine.transfer.classification.classifier import Classifier
from mirl.errors import UserError
from tests.engine.conftest import write_classes
from tests.engine.models.helpers import make_inputs, tiny_config


@pytest.mark.parametrize("settings", [{}, {"feature_loss": 1.0}, {"vgg_loss": 1.0}, {"drop_path": 0.5}], ids=str)
def test_gradient_norms_are_those_of_one_backward_pass(settings):
    config = tiny_config(segments=4, head_init="xavier", **settings)  # zero heads pass no gradient on
    torch.manual_seed(0)
    model = MIRL(config)
    images, _ = make_inputs(config, batch=5)
    found = gradient_norms(model, images, seed=7, batch_size=2)  # 2 + 2 + 1: unequal parts
    assert all(parameter.grad is None for parameter in model.parameters())
    noise = mask_noise(7, 0, 0, 5, config.num_patches)
    features = EmaTeacher(model, config, decay=0.0)(images) if config.feature_loss else None
    model.eval()
    # A full pass leaves the VGG term out.
    model(images, noise=noise, teacher_features=features, full=bool(config.vgg_loss)).loss.backward()
    expected = [
        torch.cat([parameter.grad.flatten() for parameter in block.parameters()]).norm().item()
        for block in model.encoder.blocks
    ]
    assert found.norm == pytest.approx(expected, rel=1e-4)  # float32 sums in another order


def test_the_noise_of_a_gradient_is_half_the_difference_of_two_halves():
    config = tiny_config(segments=2, head_init="xavier")
    torch.manual_seed(0)
    model = MIRL(config)
    images, _ = make_inputs(config, batch=6)

    def gradient(first: int, last: int) -> list[torch.Tensor]:
        model.eval().zero_grad()
        noise = mask_noise(7, 0, first, last - first, config.num_patches)
        model(images[first:last], noise=noise).loss.backward()
        return [torch.cat([p.grad.flatten() for p in block.parameters()]) for block in model.encoder.blocks]

    pairs = zip(gradient(0, 2), gradient(2, 6), strict=True)  # batches 2, 2, 2: the middle is before the second
    expected = [((first - second) / 2).norm().item() for first, second in pairs]
    model.zero_grad()
    assert gradient_norms(model, images, seed=7, batch_size=2).noise == pytest.approx(expected, rel=1e-4)
    assert gradient_norms(model, images, seed=7, batch_size=6).noise is None


def test_bands_are_the_noise_that_is_stated():
    report = {
        "gradient_norm": [5.0, 1.0], "gradient_noise": [3.0, 2.0], "gradient_images": 64, "val_images": 100,
        "probe_top1_percent": [50.0, 90.0], "reinit_top1_percent": {"0": 50.0, "2": 90.0},
    }  # fmt: skip
    assert bands(report, "gradient_norm") == ([4.0, 0.0], [5.0, 1.0], "without the noise of 64 images")
    for name in ("probe_top1_percent", "reinit_top1_percent"):
        lower, upper, what = bands(report, name)
        assert (lower, upper) == (pytest.approx([40.0, 84.0]), pytest.approx([60.0, 96.0])) and "100 images" in what
    assert bands(report | {"gradient_noise": None}, "gradient_norm") is None


def test_cuts_are_spread_over_the_depth_and_end_with_none():
    assert cut_depths(24, 4) == [0, 6, 12, 18, 24]
    assert cut_depths(4, 9) == [0, 1, 2, 3, 4]
    assert cut_depths(7, 0) == [7]


def test_reading_names_the_first_harmless_cut():
    report = {
        "depth": 4, "segments": 2, "val_images": 10_000, "probe_top1_percent": [50.0, 70.0, 60.0, 40.0],
        "reinit_top1_percent": {"0": 30.0, "2": 74.0, "3": 80.0, "4": 75.0},
    }  # fmt: skip
    probe, whole, harmless = reading(report)
    assert "best after block 1 (70.00 %)" in probe and "30.00 less" in probe
    # Two standard errors of a difference of 75 % on 10,000 images are 1.2 points, so 74 % is no worse.
    assert "75.00 %; less than 1.22 apart" in whole and "from 2 on initialised afresh it is no worse" in harmless
    # Harmless at 0, but not at 2: what counts is from some block on.
    report["reinit_top1_percent"] = {"0": 75.0, "2": 60.0, "3": 75.0, "4": 75.0}
    assert "from 3 on" in reading(report)[-1]
    report["reinit_top1_percent"] = {"0": 75.0, "2": 60.0, "4": 75.0}
    assert "initialising even the last blocks afresh costs accuracy" in reading(report)[-1]
    assert table(report).splitlines()[3].split() == ["2", "-", "60.00", "60.00"]


def test_shifts_and_flips_move_whole_images():
    images = torch.arange(4 * 6 * 6, dtype=torch.uint8).reshape(4, 6, 6, 1)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(shift_and_flip(images, 0, False, generator), images)
    moved = shift_and_flip(images, 2, True, generator)
    assert moved.shape == images.shape and moved.dtype == torch.uint8 and not torch.equal(moved, images)
    rows = [
        any(
            torch.equal(moved[i, r, c], images[i, 3, 3]) for r in range(1, 6) for c in range(6)
        )  # the middle stays inside
        for i in range(4)
    ]
    assert all(rows)
    floats = images.permute(0, 3, 1, 2).float()
    again = shift_and_flip(floats, 2, True, torch.Generator().manual_seed(5))
    same = shift_and_flip(images, 2, True, torch.Generator().manual_seed(5))
    assert torch.equal(again, same.permute(0, 3, 1, 2).float())


def test_short_finetuning_learns_and_repeats():
    config = tiny_config(segments=1, did=False, image_height=16, image_width=16)
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(40) % 2
    images = (labels[:, None, None, None] * 120 + torch.randint(0, 60, (40, 16, 16, 3), generator=generator)).byte()
    recipe = ShortFinetune(steps=30, batch_size=16, lr=5e-3)
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        model = Classifier(config, num_classes=2)
        finetune_in_memory(model, images, labels, recipe, seed=3)
        found.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    assert torch.equal(*found)
    assert accuracy_percent(model, images, labels) == 100.0


def test_report_of_a_checkpoint(checkpoint, tmp_path, capsys):
    """The command, from a checkpoint to its files."""
    pretrained = checkpoint(tiny_config(segments=2, head_init="xavier"))  # zero heads pass no gradient on
    train = write_classes(tmp_path / "train", {"a": 12, "b": 12})
    val = write_classes(tmp_path / "val", {"a": 4, "b": 4})
    arguments = ["--data", train, "--val", val, "--out", tmp_path / "report", "--images", "8"]
    arguments += ["--probe-epochs", "2", "--cuts", "2", "--steps", "2", "--batch-size", "8"]
    assert dispatch(["depth-report", str(pretrained), *map(str, arguments)]) == 0
    report = json.loads((tmp_path / "report" / "depth.json").read_text())
    depth = report["depth"]
    assert len(report["gradient_norm"]) == len(report["probe_top1_percent"]) == depth
    assert all(norm > 0 for norm in report["gradient_norm"])
    assert sorted(map(int, report["reinit_top1_percent"])) == cut_depths(depth, 2)
    assert (tmp_path / "report" / "depth.png").stat().st_size > 10_000
    said = capsys.readouterr().out
    assert "fine-tuned with every block as pre-trained" in said
    parts = r"gradient norms \d+:\d\d, features \d+:\d\d, linear probes \d+:\d\d, fine-tunings \d+:\d\d"
    assert re.search(rf"this takes about \d+:\d\d: {parts}\n.*gradient norms over", said, flags=re.DOTALL)
    with pytest.raises(UserError, match="which exists: give another folder"):
        dispatch(["depth-report", str(pretrained), *map(str, arguments)])
