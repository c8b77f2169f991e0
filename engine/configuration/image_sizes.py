"""`--image-sizes`: a run whose crops are smaller at first. What is written, and whether it fits the model.

A text is SIDE or HEIGHTxWIDTH, in pixels, and behind an @ the share of the run's steps from which it holds:
``112 160@0.5 224@0.85``. The first has no share. The last is the size of the images itself.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from mirl.engine.models.config import ModelConfig
from mirl.errors import UserError

FORM = re.compile(r"(\d+)(?:x(\d+))?(?:@(\d*\.?\d+(?:e-?\d+)?))?", re.ASCII)
EXAMPLE = "112 160@0.5 224@0.85"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """From ``share`` of the steps of a run on, crops have this size in pixels. ``share`` is exact: 0.1 is a tenth."""

    height: int
    width: int
    share: Fraction

    @property
    def size(self) -> str:
        """Write the size as a flag has it: the side of a square, else HEIGHTxWIDTH."""
        return str(self.height) if self.height == self.width else f"{self.height}x{self.width}"

    def __str__(self) -> str:
        return self.size if not self.share else f"{self.size}@{float(self.share)}"


def read_stages(texts: Sequence[object]) -> tuple[Stage, ...]:
    """Read the stages that ``texts`` write; a bare number, which a file of settings may hold, is a side.

    Raises:
        UserError: a text is no size, the first one has a share, or the shares do not rise or do not end below 1.
    """
    stages = []
    for text in map(str, texts):
        found = FORM.fullmatch(text.strip().lower())
        if found is None or not int(found[1]) or not int(found[2] or 1):
            raise UserError(
                f"image_sizes has {text!r}: give SIDE or HEIGHTxWIDTH in pixels, and behind an @ the share of the run "
                f"from which it holds, e.g. {EXAMPLE}"
            )
        height, width = int(found[1]), int(found[2] or found[1])
        stages.append(Stage(height=height, width=width, share=Fraction(found[3] or 0)))
    if stages and stages[0].share:
        raise UserError(f"image_sizes begins with {stages[0]}: the first size holds from the start, give it without @")
    shares = [stage.share for stage in stages]
    if any(later <= earlier for earlier, later in pairwise(shares)) or max(shares, default=0) >= 1:
        raise UserError(
            f"image_sizes is {' '.join(map(str, stages))}: give every size after the first a share of the run, rising "
            f"and below 1, e.g. {EXAMPLE}"
        )
    return tuple(stages)


def require_fitting(texts: Sequence[str], model: ModelConfig) -> None:
    """Check the sizes that ``texts`` write against ``model``, whose image size is that of the last.

    Raises:
        UserError: one line that names the size and the mend.
    """
    whole = Stage(height=model.image_height, width=model.image_width, share=Fraction(0)).size
    stages = read_stages(texts)
    if stages and stages[-1].size != whole:
        raise UserError(
            f"image_sizes ends with {stages[-1]} and image_size is {whole}: end with the size of the images, e.g. "
            f"{whole}@0.85"
        )
    for stage in stages:
        _require_one(stage, model, whole)


def _require_one(stage: Stage, model: ModelConfig, whole: str) -> None:
    patch = model.patch_size
    if stage.height > model.image_height or stage.width > model.image_width:
        raise UserError(
            f"image_sizes has {stage} and image_size is {whole}, for which memory is reserved: give none that is larger"
        )
    if stage.height % patch or stage.width % patch:
        side = stage.height if stage.height % patch else stage.width
        nearest = [str(near) for near in (side // patch * patch, (side // patch + 1) * patch) if near]
        raise UserError(
            f"image_sizes has {stage} and patch_size is {patch}: give multiples of it, e.g. {' or '.join(nearest)}"
        )
    # Sides are whole patches, so the proportions hold to less than one patch of the shorter side; a square is one.
    gap = abs(stage.height * model.image_width - stage.width * model.image_height)
    if gap >= patch * max(model.image_height, model.image_width):
        width = _to_patches(Fraction(stage.height * model.image_width, model.image_height), patch)
        raise UserError(
            f"image_sizes has {stage} and image_size is {whole}: give both sides in the proportions of the images, "
            f"e.g. {stage.height}x{width}"
        )
    patches = stage.height * stage.width // patch**2
    kept = int(patches * (1 - model.mask_ratio))
    if not 0 < kept < patches:
        raise UserError(
            f"image_sizes has {stage} and mask_ratio is {model.mask_ratio:g}, which keeps {kept} of its {patches} "
            "patches: give a larger size, so that at least one is kept and one masked"
        )


def resized(texts: Sequence[str], before: ModelConfig, after: ModelConfig) -> tuple[str, ...]:
    """Fit the sizes of a recipe, written for ``before``, to the image and patch size of ``after``: each side keeps its
    share of the image's, rounded to whole patches, and at least one.
    """

    def side(old: int, of: int, now: int) -> int:
        return max(after.patch_size, _to_patches(Fraction(old * now, of), after.patch_size))

    made = [
        dataclasses.replace(
            stage,
            height=side(stage.height, before.image_height, after.image_height),
            width=side(stage.width, before.image_width, after.image_width),
        )
        for stage in read_stages(texts)
    ]
    return tuple(map(str, made))


def _to_patches(pixels: Fraction, patch: int) -> int:
    """``pixels`` rounded to whole patches, in pixels."""
    return round(pixels / patch) * patch
