"""`mirl visualize` reads images as training does."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import torch
from PIL import Image

from mirl.dataloaders import build_eval_loader
from mirl.engine.checkpoints.files import write_weights
from mirl.engine.commands.visualize import main as visualize
from mirl.engine.training.noise import mask_noise
from tests.engine.models.helpers import make_model, tiny_config


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_array_files_are_normalised_with_the_statistics_of_the_model(tmp_path, capsys, dtype):
    mean, std = (0.2, 0.4, 0.6), (0.05, 0.1, 0.2)
    config = tiny_config(channels=3, mean=mean, std=std)
    model = make_model(config, dtype=torch.float32).eval()
    state = {"step": 0, "config": {"model": dataclasses.asdict(config)}}
    write_weights(tmp_path / "checkpoint", dict(model.named_parameters()), state)
    size = (config.image_height, config.image_width)
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    top = 65535 if dtype == np.uint16 else 1
    for number in range(2):
        np.save(tmp_path / f"data/{number}.npy", (rng.random((*size, 3)) * top).astype(dtype))
    files = sorted((tmp_path / "data").iterdir())
    assert visualize([str(tmp_path / "checkpoint"), *map(str, files), "--out", str(tmp_path / "grid.png")]) == 0
    shown = float(re.search(r"masked-patch error ([0-9.]+)", capsys.readouterr().out).group(1))
    with build_eval_loader(
        tmp_path / "data",
        image_size=size,
        batch_size=2,
        resize_short=min(size),
        mean=mean,
        std=std,
        labels=False,
        threads=1,
    ) as loader:
        images = next(iter(loader)).images
    with torch.no_grad():
        loss = model(images, noise=mask_noise(0, 0, 0, 2, config.num_patches)).loss.item()
        raw = images * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
        wrong = model(raw, noise=mask_noise(0, 0, 0, 2, config.num_patches)).loss.item()
    assert shown == pytest.approx(loss, abs=6e-5)  # printed with four digits
    assert abs(wrong - loss) > 1e-3
    grid = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB")).astype(float)
    assert grid.std() > 20  # not a flat column
