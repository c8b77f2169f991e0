"""One model for images of several sizes: its weights know none, so a size is a configuration and two fixed tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from mirl.engine.models.compute_choices import ComputeChoices
from mirl.engine.models.positions import sincos_positions


def set_image_size(model: ComputeChoices, height: int, width: int) -> None:
    """Let ``model``, a `MIRL` or an `EmaTeacher`, take images of ``height`` x ``width`` pixels from now on.

    Its positions become those of the grid of such images, as a model made for that size has them. Weights, and how
    blocks are computed, stay what they are. UserError for a size that no such model can have.
    """
    before = model.config
    if (height, width) == (before.image_height, before.image_width):
        return
    after = dataclasses.replace(before, image_height=height, image_width=width)
    tables: list[tuple[nn.Module, str]] = [(model.encoder, "pos_embed")]
    if hasattr(model, "decoder_pos_embed"):
        tables.append((model, "decoder_pos_embed"))
    for module, name in tables:
        current: Tensor = getattr(module, name)
        model.position_tables[name, before.grid] = current
        known = model.position_tables.get((name, after.grid))
        made = sincos_positions(after.grid, current.shape[1]) if known is None else known
        # Where and in what the table was: an engine may have cast it, and tables that wait are not moved with a model.
        setattr(module, name, made.to(current))
    model.config = model.encoder.config = model.encoder.patch_embed.config = after


@contextmanager
def at_image_size(model: ComputeChoices, height: int, width: int) -> Iterator[None]:
    """Keep ``model`` at another size within a block; see `set_image_size`."""
    before = model.config
    set_image_size(model, height, width)
    try:
        yield
    finally:
        set_image_size(model, before.image_height, before.image_width)
