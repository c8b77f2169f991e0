"""Runs of version 0.1.0 load and go on: the two in tests/fixtures/run_0_1_0, whose README says how they were made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mirl import load_classifier, load_pretrained
from mirl.engine.configuration.config import PretrainConfig
from mirl.engine.transfer.classification.config import FinetuneConfig
from tests.support.launch import FIXTURES
from tests.support.runs import losses

RUNS = FIXTURES / "run_0_1_0"
EXPECTED = json.loads((RUNS / "expected.json").read_text())


def write_images(folder: Path) -> Path:
    """Sixteen lossless pictures in two classes, the same on every machine."""
    rows, columns = np.mgrid[0:24, 0:24]
    for number in range(16):
        picture = np.stack([rows * (number + 3), columns * (number + 5), rows * columns + 7 * number], -1) % 256
        home = folder / ("even", "odd")[number % 2]
        home.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.astype(np.uint8)).save(home / f"{number:02d}.png")
    return folder


def averaged_logits(run: Path) -> list[float]:
    """Logits of the averaged weights in the newest checkpoint of ``run``, for two fixed inputs: 2 x 2 of them, flat."""
    classifier, _ = load_classifier(run, weights="ema")
    with torch.no_grad():
        return classifier(torch.linspace(-2, 2, 2 * 3 * 16 * 16).view(2, 3, 16, 16)).flatten().tolist()


@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_a_resumed_run_gives_the_losses_of_its_own_version(kind, server, tmp_path):
    images = write_images(tmp_path / "images")
    shutil.copytree(RUNS / kind, tmp_path / kind)
    flags = [*EXPECTED["flags"][kind], "--data", images, "--out", kind, "--resume", "auto"]
    run = server.start(tmp_path, *flags, ranks=1, entry=kind, tiny=False)
    assert run.end(120) == [0], run.output()[-3000:]
    found = losses(tmp_path / kind)
    # Another processor sums in another order; see tests/golden/README.md.
    expected = {int(step): pytest.approx(loss, rel=1e-5) for step, loss in EXPECTED["losses"][kind].items()}
    assert {step: found[step] for step in expected} == expected
    if kind == "finetune":  # no loss depends on the averaged weights, so they are asked themselves
        assert averaged_logits(tmp_path / kind) == pytest.approx(EXPECTED["ema_logits_of_resumed"], rel=1e-4, abs=1e-6)


def test_the_model_and_the_classifier_load_and_compute_what_they_did():
    images = torch.arange(2 * 16 * 16 * 3, dtype=torch.int64).mul(37).remainder(256).to(torch.uint8).view(2, 16, 16, 3)
    model = load_pretrained(RUNS / "pretrain")
    loss = model(images, noise=torch.linspace(0, 1, 8).view(2, 4)).loss
    assert loss.item() == pytest.approx(EXPECTED["loss_of_loaded"], rel=1e-5)
    assert load_classifier(RUNS / "finetune", weights="ema")[1].classes == ("even", "odd")
    assert averaged_logits(RUNS / "finetune") == pytest.approx(EXPECTED["logits_of_loaded"], rel=1e-4, abs=1e-6)


def test_the_configurations_are_read():
    for kind, config in (("pretrain", PretrainConfig), ("finetune", FinetuneConfig)):
        values = json.loads((RUNS / kind / "config.json").read_text())
        assert config.from_dict(values, source="config.json").to_dict().keys() >= values.keys()
