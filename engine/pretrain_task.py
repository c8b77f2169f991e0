"""Pre-training as a task of the loop: masks from the seed, the model's loss, pictures of reconstructions."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dataloaders import Batch
from engine.config import PretrainConfig
from engine.ds_engine import Fragment, TrainEngine
from engine.flops import training_flops_per_image
from engine.launch import Ranks
from engine.noise import mask_noise
from engine.pictures import reconstruct, save_grid
from engine.run_log import RunLog
from engine.schedule import Durations
from engine.task import Place


class PretrainTask:
    """One rank's part. ``picture_images``: what the picture grids show, None for none."""

    def __init__(
        self,
        config: PretrainConfig,
        *,
        ranks: Ranks,
        engine: TrainEngine,
        durations: Durations,
        log: RunLog,
        picture_images: Tensor | None,
        out: Path,
    ) -> None:
        self.config, self.ranks, self.engine, self.durations, self.log = config, ranks, engine, durations, log
        self.picture_images, self.out = picture_images, out
        self.term_names: tuple[str, ...] = engine.module.term_names
        self.gflops_per_image = training_flops_per_image(config.model) / 1e9

    def forward(self, batch: Batch, place: Place) -> tuple[Tensor, Tensor]:
        """Loss and terms of `engine.models.MIRL`."""
        noise = self._noise(self.config.run.seed, place.step, place.first, len(batch.images))
        if self.config.model.drop_path:
            # Keyed like the mask, but for the whole micro-batch: a resumed run drops the same paths.
            torch.manual_seed((self.config.run.seed * 1_000_003 + place.step) * 1_000_003 + place.first)
        output = self.engine.forward(batch.images, noise=noise)
        return output.loss, output.terms.detach()

    def after_step(self, applied: bool) -> None:
        """Nothing: the weights are all there is."""

    def report(self, step: int, *, last: bool) -> dict[str, Any]:
        """A grid of reconstructions, at the interval of the configuration and at the end."""
        if self.config.log.pictures and (step % self.durations.picture_every == 0 or last):
            self._picture(step)
        return {}

    def fragments(self) -> Iterable[Fragment]:
        return ()

    def _noise(self, seed: int, step: int, first: int, batch: int) -> Tensor:
        noise = mask_noise(seed, step, first, batch, self.config.model.num_patches)
        return noise.to(self.ranks.device, non_blocking=True)

    def _picture(self, step: int) -> None:
        """Under ZeRO-3 every rank takes part, because each holds a part of the weights."""
        if self.picture_images is None or not (self.ranks.is_main or self.engine.stage == 3):
            return
        noise = self._noise(self.config.run.seed + 1, 0, 0, len(self.picture_images))
        titles, columns = reconstruct(self.engine.module, self.picture_images, noise)
        if self.ranks.is_main:
            path = self.out / "pictures" / f"step-{step:08d}.png"
            try:
                self.log.picture(save_grid(path, titles, columns), step)
            except OSError as error:
                self.log.say(f"warning: no picture of step {step}: {error}; training goes on")
