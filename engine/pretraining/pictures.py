"""Picture grids: input | masked | main | residual | sum of each pair, a row an image, with titles and a legend."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from mirl.engine.models.config import ModelConfig
from mirl.engine.models.masking import PatchMask
from mirl.engine.models.mirl import MIRL
from mirl.engine.models.objectives.objective import objective_terms, part_images
from mirl.engine.models.pixels import normalise_images, patch_statistics, patchify, to_uint8, unpatchify

GREY = 128
GAP = 4
LINE_HEIGHT = 14
# Small images are enlarged by a whole factor, so that the patches can be seen.
SMALLEST_SIDE = 128
# What a column shows, by the first word of its title.
MEANINGS = {
    "input": "the image as the model is given it",
    "masked": "what the encoder sees: the grey patches are hidden from it",
    "main": "what the shallow decoder of the pair predicts",
    "residual": "what the deep decoder of the pair adds to it, around mid-grey",
    "sum": "main + residual, the reconstruction; training compares it alone with the input, so that main and residual "
    "may hold patterns that cancel; patches that were not hidden are copied from the input",
    "reconstruction": "what the decoder predicts",
    "decoder": "what that decoder predicts by itself",
    "coarse": "the low frequencies, as that decoder predicts them",
    "fine": "the high frequencies, as that decoder predicts them, around mid-grey",
}
NORMALISED = (
    "Predictions are of normalised patches: each is shown at the true mean and contrast of its patch, which the model "
    "does not predict."
)


@torch.no_grad()
def reconstruct(model: MIRL, images: Tensor, noise: Tensor) -> tuple[list[str], list[np.ndarray]]:
    """Titles and columns of a picture grid.

    images: uint8 [B, H, W, C], or float [B, C, H, W] normalised. noise: [B, N]. Each column is uint8 [B, H, W, C].
    Predictions of normalised pixels are put back with the true mean and deviation of each patch: structure is
    predicted, brightness and contrast are given. A residual is shown around grey. Visible patches are copied from the
    input.
    """
    config: ModelConfig = model.config
    was_training = model.training
    model.eval()
    output = model(images, noise=noise, full=True)
    model.train(was_training)
    pixels = normalise_images(images, config.mean, config.std, torch.float32)
    true = patchify(pixels, config.patch_size)
    mask: PatchMask = output.mask
    hidden = mask.mask_BN[..., None]
    mean, deviation = _statistics(config, true)

    def image(patches: Tensor) -> np.ndarray:
        return to_uint8(unpatchify(patches, config.grid, config.patch_size), config.mean, config.std).cpu().numpy()

    def predicted(patches: Tensor) -> np.ndarray:
        return image(torch.where(hidden, patches * deviation + mean, true))

    def around_grey(patches: Tensor) -> np.ndarray:
        """A residual has no brightness of its own; visible patches, which nobody predicts, are grey."""
        std = torch.tensor(config.std, device=patches.device)
        offset = (
            unpatchify(torch.where(hidden, patches * deviation, 0.0), config.grid, config.patch_size).permute(
                0, 2, 3, 1
            )
            * std
        )
        return (255 * offset + GREY).clamp(0, 255).round().to(torch.uint8).cpu().numpy()

    shown = image(true)
    masked = (
        unpatchify(hidden.expand_as(true).float(), config.grid, config.patch_size)
        .permute(0, 2, 3, 1)
        .bool()
        .cpu()
        .numpy()
    )
    columns = [shown, np.where(masked, np.uint8(GREY), shown)]
    predictions = [prediction.float() for prediction in output.predictions]
    if config.objective == "mirl" and config.segments > 1:
        for pair in range(config.segments // 2):
            main, residual = predictions[pair], predictions[config.segments - 1 - pair]
            columns += [predicted(main), around_grey(residual), predicted(main + residual)]
    else:
        parts = part_images(config, pixels, torch.float32)
        for term, prediction in zip(model.terms, predictions, strict=True):
            if term.part != "all":
                # A part is put back with its own statistics: a fine one around grey, as a residual is.
                true = patchify(parts[term.part], config.patch_size)
                mean, deviation = _statistics(config, true)
            columns.append(around_grey(prediction) if term.part == "fine" else predicted(prediction))
    return column_titles(config), columns


def column_titles(config: ModelConfig) -> list[str]:
    """Titles of the columns that `reconstruct` makes for a model of ``config``."""
    titles = ["input", "masked"]
    if config.objective == "mirl" and config.segments > 1:
        pairs = range(1, config.segments // 2 + 1)
        return titles + [f"{part} {pair}" for pair in pairs for part in ("main", "residual", "sum")]
    for term in objective_terms(config):
        alone = "reconstruction" if config.segments == 1 else f"decoder {term.main}"
        titles.append(alone if term.part == "all" else f"{term.part} {term.main}")
    return titles


def legend(titles: list[str]) -> list[str]:
    """Say what each kind of column in ``titles`` shows, a text a kind. Titles without a known meaning are left out."""
    kinds = dict.fromkeys(title.split()[0] for title in titles)
    return [f"{kind}: {MEANINGS[kind]}" for kind in kinds if kind in MEANINGS]


def _statistics(config: ModelConfig, patches_BNQ: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation [B, N, 1] by which a prediction is put back."""
    if config.norm_pix:
        return patch_statistics(patches_BNQ)
    return torch.zeros_like(patches_BNQ[..., :1]), torch.ones_like(patches_BNQ[..., :1])


def grid_image(titles: list[str], columns: list[np.ndarray]) -> Image.Image:
    """One picture of all columns [B, H, W, C], C = 1 or 3 (of any other number of channels the first is shown).

    A title stands above each column, and below all of them what the titles mean.
    """
    batch, height, width, channels = columns[0].shape
    factor = max(1, -(-SMALLEST_SIDE // min(height, width)))
    cell_height, cell_width = height * factor, width * factor
    total_width, bottom = GAP + len(columns) * (cell_width + GAP), LINE_HEIGHT + GAP + batch * (cell_height + GAP)
    footer = [line for text in legend(titles) for line in _wrapped(text, total_width - 2 * GAP)]
    canvas = Image.new("RGB", (total_width, bottom + len(footer) * LINE_HEIGHT + (GAP if footer else 0)), "white")
    pen = ImageDraw.Draw(canvas)
    for column, (title, images) in enumerate(zip(titles, columns, strict=True)):
        left = GAP + column * (cell_width + GAP)
        pen.text((left, 1), title, fill="black")
        for row in range(batch):
            pixels = images[row] if channels == 3 else np.repeat(images[row][..., :1], 3, axis=-1)
            cell = Image.fromarray(pixels).resize((cell_width, cell_height), Image.Resampling.NEAREST)
            canvas.paste(cell, (left, LINE_HEIGHT + GAP + row * (cell_height + GAP)))
    for number, line in enumerate(footer):
        pen.text((GAP, bottom + number * LINE_HEIGHT), line, fill="black")
    return canvas


def _wrapped(text: str, width: int) -> list[str]:
    """``text`` in lines of at most ``width`` pixels, or of one word."""
    measure = ImageDraw.Draw(Image.new("L", (1, 1)))
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and measure.textlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def save_grid(path: Path | str, titles: list[str], columns: list[np.ndarray]) -> Image.Image:
    """Write the picture as PNG, whole or not at all, and return it."""
    picture = grid_image(titles, columns)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp.png")
    try:
        picture.save(aside)
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    return picture
