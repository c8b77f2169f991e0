"""One crop: evaluation, and the preprocessing that exports write for timm and transformers, see the same pixels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image

from mirl.dataloaders import build_eval_loader
from mirl.dataloaders.decoding.crops import evaluation_crop
from mirl.engine.commands.evaluate import main as evaluate
from mirl.engine.commands.export import run as export
from mirl.engine.models.interop.huggingface import hf_preprocessor
from mirl.engine.models.interop.timm_keys import timm_config
from mirl.engine.models.pixels import normalise_images
from tests.engine.commands.test_evaluate import write_classifier
from tests.engine.models.helpers import tiny_config

LEVELS = 3 / 255  # resizes of torch, torchvision and Pillow round differently
# (height, width)
SIZES = [(64, 64), (100, 100), (37, 37), (90, 120), (200, 130), (500, 333)]


def smooth(height: int, width: int, seed: int = 0) -> Image.Image:
    """A picture with structure in every place, which a crop one pixel off would show."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (max(2, height // 6), max(2, width // 6), 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def ours(path: Path, config) -> torch.Tensor:
    size = (config.image_height, config.image_width)
    with build_eval_loader(path, image_size=size, batch_size=1, threads=1, labels=False) as loader:
        (batch,) = loader
    return normalise_images(batch.images, config.mean, config.std, torch.float32)


def timms(path: Path, config) -> torch.Tensor:
    """By the configuration that the export writes for timm."""
    cfg = timm_config(config)["pretrained_cfg"]
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, pretrained_cfg=cfg))
    return transform(Image.open(path))[None]


def transformers_(path: Path, config, folder: Path) -> torch.Tensor:
    (folder / "preprocessor_config.json").write_text(json.dumps(hf_preprocessor(config)))
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    return processor(Image.open(path), return_tensors="pt")["pixel_values"]


def difference(one: torch.Tensor, other: torch.Tensor, config) -> float:
    """The largest, in units of the image's own values from 0 to 1."""
    assert one.shape == other.shape
    return ((one - other).abs() * torch.tensor(config.std).view(3, 1, 1)).max().item()


@pytest.mark.parametrize("side", [32, 40, 48, 56])  # of 48, 256 / 224 rounds up, and timm would round down
@pytest.mark.parametrize("size", SIZES)
def test_three_libraries_see_the_same_pixels(side, size, tmp_path):
    config = tiny_config(channels=3, image_height=side, image_width=side)
    (tmp_path / "images").mkdir()
    path = tmp_path / "images" / "0.png"
    smooth(*size).save(path)
    short = evaluation_crop((side, side)).resized[0]
    assert short == round(side * 256 / 224)
    seen = ours(tmp_path / "images", config)
    assert difference(seen, timms(path, config), config) < LEVELS
    theirs = transformers_(path, config, tmp_path)
    for axis, edge in ((-2, size[0]), (-1, size[1])):
        if (short * edge // min(size) - side) % 4 == 3:
            # A half pixel, which torchvision rounds to even and transformers down: its crop is one to the side.
            seen, theirs = seen.narrow(axis, 0, side - 1), theirs.narrow(axis, 1, side - 1)
    assert difference(seen, theirs, config) < LEVELS


@pytest.mark.parametrize("size", [(64, 64), (90, 200), (200, 90)])
@pytest.mark.parametrize("shape", [(16, 32), (48, 32)])
def test_timm_crops_what_is_not_square_as_we_do(shape, size, tmp_path):
    config = tiny_config(channels=3, image_height=shape[0], image_width=shape[1])
    (tmp_path / "images").mkdir()
    path = tmp_path / "images" / "0.png"
    smooth(*size).save(path)
    seen, theirs = ours(tmp_path / "images", config), timms(path, config)
    # The long side is rounded down here and to the nearest there: a scale of a pixel in some dozens.
    assert (seen - theirs).abs().mean().item() < 0.1 * seen.std().item()


def test_the_same_top_1_in_all_three(tmp_path, capsys):
    """Of a set of several sizes, through the files of the exports and the libraries' own preprocessing."""
    checkpoint = tmp_path / "fine"
    write_classifier(checkpoint, seed=3, config=tiny_config(channels=3, image_height=56, image_width=56))
    val = tmp_path / "val"
    paths = []
    # Those whose crop lies on whole pixels in every library: where not, transformers' is one to the side (above).
    shapes = [(64, 64), (90, 90), (40, 40), (128, 160), (160, 128), (64, 96), (200, 200), (33, 33)]
    for label, name in enumerate(("blue", "green", "red")):
        (val / name).mkdir(parents=True)
        for number in range(8):
            path = val / name / f"{number}.png"
            smooth(*shapes[number], seed=10 * label + number).save(path)
            paths.append((label, path))
    assert evaluate([str(checkpoint), "--val", str(val), "--weights", "last", "--out", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())["weights"]["last"]
    for kind in ("timm", "hf"):
        assert export([str(checkpoint), "--to", kind, "--out", str(tmp_path / kind)]) == 0
    assert capsys.readouterr().out.count("crop: resized until the short side is 64 pixels") == 3
    vit = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(vit))
    theirs = transformers.ViTForImageClassification.from_pretrained(tmp_path / "hf").eval()
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    confusions = {"timm": [[0] * 3 for _ in range(3)], "hf": [[0] * 3 for _ in range(3)]}
    with torch.no_grad():
        for label, path in paths:
            image = Image.open(path)
            confusions["timm"][label][vit(transform(image)[None]).argmax().item()] += 1
            logits = theirs(processor(image, return_tensors="pt")["pixel_values"]).logits
            confusions["hf"][label][logits.argmax().item()] += 1
    assert confusions["timm"] == found["confusion"] and confusions["hf"] == found["confusion"]
    assert sum(sum(row) for row in found["confusion"]) == 24
