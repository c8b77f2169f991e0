"""Pre-training as a task of the loop: masks from the seed, the model's loss, pictures of reconstructions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from mirl.dataloaders import Batch
from mirl.engine.accounting.flops import training_flops_per_image
from mirl.engine.configuration.config import PretrainConfig
from mirl.engine.distributed.ds_engine import Fragment, FragmentReader, TrainEngine
from mirl.engine.distributed.launch import Ranks
from mirl.engine.models import ModelConfig
from mirl.engine.models.resizing import set_image_size
from mirl.engine.models.teacher import EmaTeacher
from mirl.engine.pretraining.evaluating import Evaluation
from mirl.engine.pretraining.pictures import reconstruct, save_grid
from mirl.engine.training.ema import ShardedEma
from mirl.engine.training.image_sizes import StepSizes
from mirl.engine.training.noise import NoiseAhead, mask_noise, seed_stochastic_depth
from mirl.engine.training.run_log import RunLog
from mirl.engine.training.schedule import Durations
from mirl.engine.training.task import Place
from mirl.engine.training.time_left import count_reports

TEACHER = "teacher"
"""Kind of the fragments that hold the EMA teacher."""


class PretrainTask:
    """One rank's part. ``picture_images``: what the picture grids show, None for none. ``teacher``: of the feature
    loss; every rank has a whole one and updates it alike. ``ema``: the average of the weights, for later.
    """

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
        teacher: EmaTeacher | None = None,
        ema: ShardedEma | None = None,
        evaluation: Evaluation | None = None,
    ) -> None:
        """evaluation: of held-out images and a probe, None for neither. Images of a step have the size that the
        settings give it; pictures and evaluations are of the whole size.
        """
        self.config, self.ranks, self.engine, self.durations, self.log = config, ranks, engine, durations, log
        self.picture_images, self.out = picture_images, out
        self.evaluation = evaluation
        self.report_images = 0 if picture_images is None else len(picture_images)
        if evaluation is not None:
            self.report_images += evaluation.sets.images
        self.term_names: tuple[str, ...] = engine.module.term_names
        self.plain_gflops_per_image = training_flops_per_image(config.model) / 1e9
        self.gflops_per_image = training_flops_per_image(config.model, engine.module.skips) / 1e9
        self.teacher, self.ema = teacher, ema
        self._sizes = StepSizes.of(config, durations.total_steps)
        self._told = 0  # the latest step whose new size was told of
        patches = (lambda step: self._sizes.model_at(step).num_patches) if self._sizes else config.model.num_patches
        self._noise = NoiseAhead(config.run.seed, patches, ranks.device)

    def forward(self, batch: Batch, place: Place) -> tuple[Tensor, Tensor]:
        """Loss and terms of `mirl.engine.models.MIRL`."""
        if self._sizes:
            self._take_size(self._sizes.model_at(place.step), place.step)
        noise = self._noise.take(place.step, place.first, len(batch.images))
        if self.config.model.drop_path:
            seed_stochastic_depth(self.config.run.seed, place.step, place.first)
        output = self.engine.forward(batch.images, noise=noise, **self._features(batch.images))
        return output.loss, output.terms.detach()

    def _take_size(self, model: ModelConfig, step: int | None = None) -> None:
        """Let model and teacher take images of the size of ``model``; told of where ``step`` is the first with it."""
        for network in (self.engine.module, self.teacher):
            if network is not None:
                set_image_size(network, model.image_height, model.image_width)
        if step is not None and step in self._sizes.firsts and step > self._told:
            self._told = step
            size, kept = f"{model.image_height}x{model.image_width}", model.num_kept
            self.log.say(f"step {step + 1}: images of {size} from here on, {model.num_patches} patches, {kept} visible")
            self.log.event("image_size", step + 1, height=model.image_height, width=model.image_width)

    def _features(self, images: Tensor) -> dict[str, Tensor]:
        if self.teacher is None:
            return {}
        # The average is kept in fp32 and computes in the precision of the model.
        in_bf16 = self.engine.weight_dtype == torch.bfloat16
        with torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=in_bf16):
            return {"teacher_features": self.teacher(images)}

    def after_step(self, applied: bool) -> None:
        """Move the teacher, and the average, towards the weights that the step gave."""
        if self.ema is not None and applied:
            self.ema.update()
        if self.teacher is not None and applied:
            self.teacher.update(self.engine.module)

    def standing_at_start(self) -> None:
        """Unknown: nothing is evaluated."""

    def report(self, step: int, *, last: bool, interrupted: Callable[[], bool]) -> None:
        """A grid of reconstructions and an evaluation, each at its interval and at the end."""
        if self.config.log.pictures and (step % self.durations.picture_every == 0 or last):
            self._picture(step)
        if self.evaluation is not None and self.evaluation.due(step, last=last):
            self._take_size(self.config.model)
            self.evaluation.run(
                self.engine.module, step, last=last, features=self._features, interrupted=interrupted
            )  # fmt: skip

    def reports_after(self, step: int, total_steps: int) -> int:
        """The evaluations, which take longer than pictures; where there are none, the pictures."""
        if not self.report_images:
            return 0
        if self.evaluation is not None:
            return count_reports(self.evaluation.every, after=step, total=total_steps)
        return count_reports(self.durations.picture_every, after=step, total=total_steps)

    def fragments(self) -> Iterator[Fragment]:
        """The average, and the teacher, its parameters dealt out to the ranks, which all have the same."""
        if self.ema is not None:
            yield from self.ema.fragments()
        if self.teacher is not None:
            for index, (name, parameter) in enumerate(self.teacher.named_parameters()):
                if index % self.ranks.world_size == self.ranks.rank:
                    yield Fragment(name=name, kind=TEACHER, start=0, tensor=parameter.detach().flatten())

    @torch.no_grad()
    def load(self, read: FragmentReader) -> None:
        """Set the average and the teacher, if there is one, from a checkpoint of a run that had one."""
        if self.ema is not None:
            self.ema.load(read)
        if self.teacher is not None:
            for name, parameter in self.teacher.named_parameters():
                parameter.copy_(read(name, TEACHER, 0, parameter.numel()).reshape(parameter.shape))

    def _picture(self, step: int) -> None:
        """Under ZeRO-3 every rank takes part, because each holds a part of the weights."""
        if self.picture_images is None or not (self.ranks.is_main or self.engine.stage == 3):
            return
        self._take_size(self.config.model)
        noise = mask_noise(self.config.run.seed + 1, 0, 0, len(self.picture_images), self.config.model.num_patches)
        titles, columns = reconstruct(self.engine.module, self.picture_images, noise.to(self.ranks.device))
        if self.ranks.is_main:
            path = self.out / "pictures" / f"step-{step:08d}.png"
            try:
                self.log.picture(save_grid(path, titles, columns), step)
            except OSError as error:
                self.log.say(f"warning: no picture of step {step}: {error}; training goes on")
