"""The training loop: loader -> masks -> model -> loss -> step, with log, pictures, checkpoints and an orderly end."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dataloaders import TrainLoader
from engine.checkpoint import CheckpointWriter
from engine.config import PretrainConfig
from engine.ds_engine import TrainEngine
from engine.errors import EXIT_PREEMPTED, Diverged, NotSaved, Preempted, UserError
from engine.flops import training_flops_per_image
from engine.launch import Ranks
from engine.noise import mask_noise
from engine.pictures import reconstruct, save_grid
from engine.run_log import RunLog, memory_gib, peak_flops
from engine.schedule import Durations
from engine.stop_request import StopRequest
from engine.watchdog import Watchdog

FILES_NAMED = 4  # of a batch that gave a non-finite loss


@dataclass(kw_only=True)
class Progress:
    """How far a run has come. ``step`` counts batches, ``applied_steps`` those whose update was applied."""

    step: int = 0
    applied_steps: int = 0
    nonfinite_in_a_row: int = 0
    images: int = 0


@dataclass(kw_only=True)
class Window:
    """What happened since the last log line. Loss terms stay on the device until then."""

    started: float = field(default_factory=time.perf_counter)
    terms: Tensor | None = None
    loss: Tensor | None = None
    micro_batches: int = 0
    images: int = 0
    wait_started: float = 0.0

    def add(self, loss: Tensor, terms: Tensor, images: int) -> None:
        self.terms = terms.detach().clone() if self.terms is None else self.terms + terms.detach()
        self.loss = loss.detach().clone() if self.loss is None else self.loss + loss.detach()
        self.micro_batches += 1
        self.images += images


@dataclass(kw_only=True)
class Seen:
    """One micro-batch of the current step: enough to say which files gave a non-finite loss."""

    terms: Tensor
    sample_ids: np.ndarray


class Trainer:
    """Runs the steps of one rank. All ranks make the same calls in the same order."""

    def __init__(
        self,
        config: PretrainConfig,
        *,
        ranks: Ranks,
        engine: TrainEngine,
        loader: TrainLoader,
        durations: Durations,
        writer: CheckpointWriter,
        log: RunLog,
        progress: Progress,
        micro_batch: int,
        accumulation: int,
        picture_images: Tensor | None,
        out: Path,
    ) -> None:
        self.config, self.ranks, self.engine, self.loader = config, ranks, engine, loader
        self.durations, self.writer, self.log, self.progress = durations, writer, log, progress
        self.micro_batch, self.accumulation = micro_batch, accumulation
        self.picture_images, self.out = picture_images, out
        self.schedule = durations.schedule(config.optim)
        self.stop = StopRequest(max_minutes=config.run.max_minutes)
        self.watchdog = Watchdog(minutes=config.run.watchdog_minutes, rank=ranks.rank)
        self._started = time.perf_counter()
        self._gflops_per_image = training_flops_per_image(config.model) / 1e9
        self._peak = peak_flops(ranks.device)
        self._checkpointed_step = progress.step
        self._term_names: tuple[str, ...] = engine.module.term_names
        self._seen: list[Seen] = []
        self._parameter_shapes: dict[str, list[int]] = {}

    def run(self) -> None:
        """Train to the last step.

        Raises:
            Preempted: a signal or the time limit ended the run; its state is saved.
            Diverged: too many steps in a row were not finite; the last checkpoint is intact.
            NotSaved: the run is over and its last checkpoint could not be written.
        """
        try:
            # The signals are held until the last checkpoint is written; the watchdog sees the end of the run too.
            with self.stop, self.watchdog:
                self._run()
        except BaseException:
            self.writer.abandon()
            raise

    def _run(self) -> None:
        window = self._new_window()
        while self.progress.step < self.durations.total_steps:
            applied = self._step(window)
            step = self.progress.step
            self.log.advance(step)
            if not applied:
                self._after_skipped_step()
            last = step == self.durations.total_steps
            if step % self.durations.log_every == 0 or last:
                self._log(window)
                window = self._new_window()
            if self.config.log.pictures and (step % self.durations.picture_every == 0 or last):
                self._picture()
            if step % self.durations.checkpoint_every == 0 or last:
                self.save()
            self._tell_of_checkpoints()
            stop, too_many_bad = self.ranks.agree_max([float(self.stop.requested), float(self.loader.too_many_bad)])
            if too_many_bad:
                self._refuse_bad_images()
            if stop and not last:
                self._leave_early()
            self.watchdog.beat(f"step {step + 1}")
        self.finish_saving()

    # --- one step

    def _step(self, window: Window) -> bool:
        """One optimiser step over all micro-batches of the effective batch; False when it was skipped."""
        config, device = self.config, self.ranks.device
        lr = self.schedule.lr(self.progress.applied_steps)
        if config.model.drop_path:
            torch.manual_seed(
                (config.run.seed * 1_000_003 + self.progress.step) * self.ranks.world_size + self.ranks.rank
            )
        seen: list[Seen] = []
        applied = None
        for part in range(self.accumulation):
            batch = self._next_batch()
            # The place of this micro-batch in the effective batch, as dataloaders.order.StepPlan divides it.
            first = (part * self.ranks.world_size + self.ranks.rank) * self.micro_batch
            noise = mask_noise(config.run.seed, self.progress.step, first, self.micro_batch, config.model.num_patches)
            output = self.engine.forward(batch.images, noise=noise.to(device, non_blocking=True))
            self.engine.backward(output.loss)
            applied = self.engine.step(lr)
            window.add(output.loss, output.terms, self.micro_batch)
            seen.append(Seen(terms=output.terms.detach(), sample_ids=batch.sample_ids))
        assert applied is not None, "DeepSpeed did not reach the accumulation boundary"
        self.progress.step += 1
        self.progress.images += config.optim.batch_size
        self._seen = seen
        if applied:
            self.progress.applied_steps += 1
            self.progress.nonfinite_in_a_row = 0
        else:
            self.progress.nonfinite_in_a_row += 1
        return applied

    def _next_batch(self) -> Any:
        """The next micro-batch, or the loader's error on every rank together."""
        batch, problem = None, None
        try:
            batch = self.loader.next_micro_batch()
        except (ValueError, OSError, RuntimeError) as error:
            problem = error
        if self.ranks.world_size > 1:
            (failed,) = self.ranks.agree_max([float(problem is not None)])
            if failed:
                problems = self.ranks.gather(str(problem) if problem else None)
                self.writer.wait()
                rank, text = next((rank, text) for rank, text in enumerate(problems) if text)
                raise UserError(f"rank {rank}: {text}") from problem
        elif problem is not None:
            self.writer.wait()
            raise problem
        return batch

    def _after_skipped_step(self) -> None:
        """Name pair, rank and files of a step that was skipped on every rank; stop all ranks after too many in a
        row.
        """
        bad: set[str] = set()
        files: list[str] = []
        for item in self._seen:
            names = [
                name
                for name, finite in zip(self._term_names, item.terms.isfinite().tolist(), strict=True)
                if not finite
            ]
            if names:
                bad.update(names)
                files += self.loader.paths(item.sample_ids[:FILES_NAMED])
        reports = self.ranks.gather((sorted(bad), files[:FILES_NAMED]))
        step, in_a_row = self.progress.step, self.progress.nonfinite_in_a_row
        where = [
            f"rank {rank}: loss of {', '.join(names)}, files {', '.join(named)}, ..."
            for rank, (names, named) in enumerate(reports)
            if names
        ]
        detail = "; ".join(where) or "every loss was finite, a gradient was not"
        self.log.say(f"step {step} was skipped, {in_a_row} in a row: not finite ({detail})")
        self.log.event("skipped_step", step, in_a_row=in_a_row, detail=detail)
        if in_a_row >= self.config.run.max_nonfinite_steps:
            self.writer.wait()
            raise Diverged(
                f"step {step}: loss or gradient was not finite for {in_a_row} steps in a row ({detail}); the "
                "checkpoints in "
                f"{self.writer.folder} are intact. Lower --base-lr, set --clip-grad 1, or resume from an earlier "
                "checkpoint"
            )

    # --- what is told

    def _new_window(self) -> Window:
        return Window(wait_started=self.loader.wait_seconds)

    def _log(self, window: Window) -> None:
        """One line and one record; the only place in the loop where the host waits for the device."""
        sums = torch.cat([window.loss.reshape(1), window.terms]).double() / window.micro_batches
        sums = torch.cat([sums, sums.new_tensor([float(len(self.loader.bad_images))])])
        if self.ranks.world_size > 1:
            torch.distributed.all_reduce(sums)
            sums[:-1] /= self.ranks.world_size
        loss, *terms, bad_images = sums.tolist()
        seconds = time.perf_counter() - window.started
        images_per_s = window.images * self.ranks.world_size / seconds
        step, total = self.progress.step, self.durations.total_steps
        named_terms = dict(zip(self._term_names, terms, strict=True)) if len(terms) > 1 else {}
        values: dict[str, Any] = {"step": step, "loss": loss} | {
            f"loss_{name}": term for name, term in named_terms.items()
        }
        values |= {
            "lr": self.schedule.lr(max(0, self.progress.applied_steps - 1)),
            "gradient_norm": self.engine.gradient_norm(),
            "images_per_s": images_per_s,
            "step_ms": 1000 * seconds / max(1, window.micro_batches // self.accumulation),
            "data_wait_percent": 100 * (self.loader.wait_seconds - window.wait_started) / seconds,
            "memory_gib": memory_gib(self.ranks.device),
            "images": self.progress.images,
            "epoch": self.progress.images / self.loader.num_images,
            "skipped_steps": step - self.progress.applied_steps,
            "bad_images": int(bad_images),
        }
        if self._peak:
            values["mfu_percent"] = (
                100 * images_per_s / self.ranks.world_size * self._gflops_per_image * 1e9 / self._peak
            )
        left = (total - step) * values["step_ms"] / 1000
        parts = [f"step {step:>{len(str(total))}}/{total}", f"loss {loss:.4f}"]
        parts += [f"{name} {term:.4f}" for name, term in named_terms.items()]
        parts += [
            f"lr {values['lr']:.2e}",
            f"grad {values['gradient_norm']:.2f}",
            f"{images_per_s:.0f} images/s",
            f"wait {values['data_wait_percent']:.1f}%",
            f"mem {values['memory_gib']:.1f}GiB",
        ]
        parts += [f"mfu {values['mfu_percent']:.1f}%"] if self._peak else []
        parts.append(f"left {_clock(left)}")
        self.log.metrics(values, "  ".join(parts))

    def _picture(self) -> None:
        """A grid of reconstructions; under ZeRO-3 every rank takes part, because each holds a part of the weights."""
        if self.picture_images is None or not (self.ranks.is_main or self.engine.stage == 3):
            return
        batch = self.picture_images.shape[0]
        noise = mask_noise(self.config.run.seed + 1, 0, 0, batch, self.config.model.num_patches)
        titles, columns = reconstruct(self.engine.module, self.picture_images, noise.to(self.ranks.device))
        if self.ranks.is_main:
            path = self.out / "pictures" / f"step-{self.progress.step:08d}.png"
            try:
                self.log.picture(save_grid(path, titles, columns), self.progress.step)
            except OSError as error:
                self.log.say(f"warning: no picture of step {self.progress.step}: {error}; training goes on")

    # --- state

    def state(self) -> dict[str, Any]:
        """Everything but the tensors, as JSON values."""
        if not self._parameter_shapes:
            self._parameter_shapes = {
                name: list(getattr(parameter, "ds_shape", parameter.shape))
                for name, parameter in self.engine.module.named_parameters()
            }
        return {
            "step": self.progress.step,
            "applied_steps": self.progress.applied_steps,
            "nonfinite_in_a_row": self.progress.nonfinite_in_a_row,
            "images": self.progress.images,
            "steps_per_epoch": self.loader.steps_per_epoch,
            "world_size": self.ranks.world_size,
            "zero_stage": self.engine.stage,
            "loader": self.loader.state_dict(),
            "parameters": self._parameter_shapes,
            "config": self.config.to_dict(),
        }

    def save(self) -> None:
        """Start writing a checkpoint of this step."""
        self.writer.save(self.progress.step, self.engine.fragments(), self.state())
        self._checkpointed_step = self.progress.step

    def finish_saving(self) -> None:
        """Until every rank's part of the last checkpoint is on disk; NotSaved if the last one failed."""
        self.writer.wait()
        published, failure = self.writer.poll()
        self._report(published, failure)
        failures = [text for text in self.ranks.gather(failure) if text]
        if failures:
            raise NotSaved(
                f"{failures[0]}; earlier checkpoints in {self.writer.folder} are intact: make room, and the same "
                "command with --resume auto goes on from the last one"
            )

    def _tell_of_checkpoints(self) -> None:
        self._report(*self.writer.poll())

    def _report(self, published: Path | None, failure: str | None) -> None:
        if published is not None:
            self.log.event(
                "checkpoint",
                self.progress.step,
                path=str(published),
                stall_ms=self.writer.stall_ms(published),
                stall_percent=100 * self.writer.stall_seconds / (time.perf_counter() - self._started),
            )
        if failure is not None:
            self.log.say(f"warning: {failure}; training goes on, earlier checkpoints are intact")
            self.log.event("checkpoint_failed", self.progress.step, reason=failure)

    def _refuse_bad_images(self) -> None:
        """End the run on every rank, its state saved: too many images of some rank were broken."""
        if self._checkpointed_step != self.progress.step:
            self.save()
        self.finish_saving()
        messages = self.ranks.gather(str(self.loader.bad_limit_error()) if self.loader.too_many_bad else None)
        raise UserError(next(message for message in messages if message))

    def _leave_early(self) -> None:
        if self._checkpointed_step != self.progress.step:
            self.save()
        self.finish_saving()
        reasons = [reason for reason in self.ranks.gather(self.stop.reason) if reason]
        self.log.event("stopped", self.progress.step, reason=reasons[0], exit_code=EXIT_PREEMPTED)
        raise Preempted(
            f"{reasons[0]} after step {self.progress.step} of {self.durations.total_steps}; saved in "
            f"{self.writer.folder}; "
            "the same command with --resume auto goes on"
        )


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
