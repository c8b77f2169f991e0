"""Grey images come back grey, and the run that found them grey keeps what it chose."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from mirl.dataloaders import load_images
from mirl.engine.checkpoints.pretrained import load_pretrained
from mirl.engine.models.config import IMAGENET_MEAN, IMAGENET_STD
from mirl.engine.pretraining.pictures import column_titles, legend, reconstruct
from mirl.engine.training.noise import mask_noise

COMMON = [
    "--norm-pix", "--lr", "3e-3", "--warmup-steps", 2, "--checkpoint-every", 10, "--keep-checkpoints", 0, "--pictures",
    1,
]  # fmt: skip
LEVELS = 2


@pytest.fixture(scope="module")
def grey_images(tmp_path_factory):
    """40 grey crops of a cat with flat patches among them, half of them stored with one channel."""
    folder = tmp_path_factory.mktemp("grey")
    cat = Image.fromarray(data.chelsea()).convert("L")
    for number in range(40):
        left, top = 8 * (number % 8), 20 * (number // 8)
        picture = cat.crop((left, top, left + 64, top + 64))
        picture.paste(number * 6, (0, 0, 40, 20))
        picture.convert("RGB" if number % 2 else "L").save(folder / f"{number:02d}.png")
    return folder


def train(server, tmp_path, images, out, *flags, steps=20, ranks=1):
    common = ["--data", images, *COMMON, "--steps", steps, "--out", out]
    run = server.start(tmp_path, *common, *flags, ranks=ranks)
    assert run.end(90) == [0] * ranks, run.output()[-3000:]
    return run.output(), json.loads((tmp_path / out / "config.json").read_text())["model"]


def spread(run, images) -> int:
    """Largest difference in levels between the channels of a pixel, in the sums."""
    model = load_pretrained(run)
    config = model.config
    files = sorted(images.iterdir())[::4]
    pixels = load_images(files, image_size=(config.image_height, config.image_width), mean=config.mean, std=config.std)
    titles, columns = reconstruct(model, pixels, mask_noise(0, 0, 0, len(pixels), config.num_patches))
    sums = [column for title, column in zip(titles, columns, strict=True) if title.startswith("sum")]
    assert len(sums) == 2 and all(column.std() > 10 for column in sums)
    return max(int(np.ptp(column.astype(int), axis=-1).max()) for column in sums)


def test_grey_images_come_back_grey(server, tmp_path, grey_images):
    said, model = train(server, tmp_path, grey_images, "grey", "--head-init", "zero", ranks=2)
    assert len(set(model["mean"])) == len(set(model["std"])) == 1 and model["statistics"] == "grey"
    assert model["mean"][0] == pytest.approx(sum(IMAGENET_MEAN) / 3, abs=1e-6)
    assert said.count("the images are grey: mean 0.449 and std 0.226 in all 3 channels") == 1
    columns = legend(column_titles(load_pretrained(tmp_path / "grey").config))
    assert [text.split(":")[0] for text in columns] == ["input", "masked", "main", "residual", "sum"]
    assert all(text in said for text in columns)
    assert spread(tmp_path / "grey", grey_images) <= LEVELS

    # The same command goes on with what the first start settled; nobody has to repeat it.
    longer, after = train(
        server, tmp_path, grey_images, "grey", "--head-init", "zero", "--resume", "auto", steps=22, ranks=2
    )
    (settings,) = [line for line in longer.splitlines() if "goes on with other settings" in line]
    assert "the images are grey" not in longer and "steps" in settings and "mean" not in settings
    assert {**after, "name": ""} == {**model, "name": ""}

    # What the check above can see: statistics by channel, as they are given, tint.
    given, model = train(server, tmp_path, grey_images, "given", "--mean", *IMAGENET_MEAN, "--std", *IMAGENET_STD)
    assert model["mean"] == list(IMAGENET_MEAN) and "the images are grey" not in given
    assert spread(tmp_path / "given", grey_images) > LEVELS


def test_with_equal_channels_zero_heads_stay_equal(grey_images):
    """In exact arithmetic: the gradients of three channels with one target are one."""
    from mirl.engine.models import MIRL
    from tests.engine.models.helpers import tiny_config

    torch.manual_seed(0)
    model = MIRL(tiny_config(head_init="zero", statistics="grey")).double()
    size = (model.config.image_height, model.config.image_width)
    images = load_images(sorted(grey_images.iterdir())[:8], image_size=size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(5):
        noise = mask_noise(0, step, 0, len(images), model.config.num_patches)
        optimizer.zero_grad()
        model(images, noise=noise).loss.backward()
        optimizer.step()
    for decoder in model.decoders.values():
        rows_CE = decoder.head.weight.unflatten(0, (-1, 3))
        assert rows_CE.abs().max() > 1e-3
        assert (rows_CE - rows_CE[:, :1]).abs().max() < 1e-9
