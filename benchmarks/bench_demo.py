"""How well a demo model fills in what is hidden: PSNR of masked patches, in dB, on training crops and held-out ones.

    python -m benchmarks.bench_demo RUN [RUN ...] [--masks N] [--picture FILE]

Both sets are squares of the photographs of the demo (`mirl.dataloaders.tools.demo`): the training crops are the files
that the run was trained on; the held-out ones lie between them, at sizes and places that no file has. Masks are the
same for every run: functions of the number of the image and of the mask. Values are pixels in [0, 1]; a PSNR is over
all masked pixels of a set, 10 log10(1 / mean squared error). Beside each model stands the best guess that needs no
model: each hidden patch takes the mean colour of the visible ones among its eight neighbours, or of all visible ones
where it has none.

"main k" is the shallow decoder of pair k alone, "sum k" with the residual of the deep one. Where patches were
normalised for the loss, a prediction is put back with the true mean and deviation, so that it is no longer comparable.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mirl.dataloaders import load_images
from mirl.dataloaders.tools.demo import between_squares, prepare_demo
from mirl.engine.checkpoints.pretrained import load_pretrained
from mirl.engine.models import MIRL
from mirl.engine.models.pixels import normalise_images, patch_statistics, patchify
from mirl.engine.pretraining.pictures import reconstruct, save_grid
from mirl.engine.training.noise import mask_noise

SEED = 20230925


def neighbours_mean(patches_BNP: Tensor, mask_BN: Tensor, grid: tuple[int, int], channels: int) -> Tensor:
    """Each patch as the mean colour of its visible neighbours: [B, N, P] from pixels [B, N, P], channels last."""
    batch, patches, _ = patches_BNP.shape
    colour_BNC = patches_BNP.view(batch, patches, -1, channels).mean(dim=2)
    seen_BN1 = (~mask_BN)[..., None].float()
    maps = torch.cat([colour_BNC * seen_BN1, seen_BN1], dim=-1).mT.reshape(batch, channels + 1, *grid)
    around = F.avg_pool2d(maps, 3, stride=1, padding=1, divisor_override=1).flatten(2).mT
    whole = (colour_BNC * seen_BN1).sum(dim=1, keepdim=True) / seen_BN1.sum(dim=1, keepdim=True)
    count_BN1 = around[..., channels:]
    guess_BNC = torch.where(count_BN1 > 0, around[..., :channels] / count_BN1.clamp(min=1), whole)
    return guess_BNC[:, :, None].expand(-1, -1, patches_BNP.shape[-1] // channels, -1).reshape(patches_BNP.shape)


@torch.no_grad()
def squared_errors(model: MIRL, images: Tensor, masks: int) -> dict[str, float]:
    """Mean squared error over the masked pixels, in [0, 1], of each prediction; images uint8 [n, H, W, C]."""
    config = model.config
    std = torch.tensor(config.std).repeat(config.patch_size**2)
    true = patchify(normalise_images(images, config.mean, config.std, torch.float32), config.patch_size)
    mean, deviation = patch_statistics(true) if config.norm_pix else (0.0, 1.0)
    totals: dict[str, float] = defaultdict(float)
    count = 0
    for number in range(masks):
        noise = mask_noise(SEED, number, 0, len(images), config.num_patches)
        output = model(images, noise=noise, full=True)
        hidden_BN = output.mask.mask_BN
        predictions = {"neighbours": neighbours_mean(true, hidden_BN, config.grid, config.channels)}
        for pair in range(config.segments // 2):
            main, residual = output.predictions[pair], output.predictions[config.segments - 1 - pair]
            predictions[f"main {pair + 1}"] = main * deviation + mean
            predictions[f"sum {pair + 1}"] = (main + residual) * deviation + mean
        for name, predicted in predictions.items():
            error = ((predicted - true) * std)[hidden_BN]
            totals[name] += float(error.square().sum(dtype=torch.float64))
        count += int(hidden_BN.sum()) * true.shape[-1]
    return {name: total / count for name, total in totals.items()}


def psnr(squared_error: float) -> float:
    """In dB, of pixels in [0, 1]."""
    return -10 * math.log10(squared_error)


def crops(run: Path, model: MIRL) -> dict[str, Tensor]:
    """Training crops, the files that ``run`` was trained on, and held-out ones: uint8 [n, H, W, C] each."""
    trained = json.loads((run / "config.json").read_text())["data"]["data"]
    folder = Path(trained[0]) if trained else prepare_demo()
    config = model.config
    size = (config.image_height, config.image_width)
    common = {"image_size": size, "channels": config.channels, "mean": config.mean, "std": config.std}
    files = load_images(sorted(folder.rglob("*.jpg")), **common)
    held_out = [np.asarray(square.resize(size[::-1], Image.Resampling.BICUBIC)) for square in between_squares()]
    return {"training crops": files, "held-out crops": torch.from_numpy(np.stack(held_out))}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_demo", description=__doc__.partition("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--masks", type=int, default=4, metavar="N", help="masks of each image")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="held-out crops, reconstructed by the first run")
    arguments = parser.parse_args(argv)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for run in arguments.runs:
        model = load_pretrained(run)
        sets = crops(run, model)
        found[str(run)] = {
            name: {kind: psnr(error) for kind, error in squared_errors(model, images, arguments.masks).items()}
            for name, images in sets.items()
        }
        if arguments.picture is not None and run == arguments.runs[0]:
            shown = sets["held-out crops"][:: max(1, len(sets["held-out crops"]) // 6)]
            noise = mask_noise(SEED, 0, 0, len(shown), model.config.num_patches)
            save_grid(arguments.picture, *reconstruct(model, shown, noise))
    if arguments.json:
        print(json.dumps(found, indent=1))
        return 0
    for run, sets in found.items():
        for name, values in sets.items():
            print(f"{run}  {name:<14}  " + "  ".join(f"{kind} {value:.2f}" for kind, value in values.items()), "dB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
