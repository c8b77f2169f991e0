"""Evaluation while pre-training: the loss of held-out images, and a linear probe of the encoder as it is.

Nothing here draws a random number or changes the model, so that a run has the same losses with and without.

Letters: B batch, N patches, D width, n images.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mirl.dataloaders import Batch, EvalLoader
from mirl.engine.accounting.flops import encoder_block_flops, forward_flops, training_flops_per_image
from mirl.engine.configuration.config import PretrainConfig
from mirl.engine.distributed.launch import Ranks
from mirl.engine.models import MIRL
from mirl.engine.pretraining.evaluation_data import ProbeData
from mirl.engine.training.image_sizes import StepSizes
from mirl.engine.training.noise import mask_noise
from mirl.engine.training.run_log import RunLog
from mirl.engine.transfer.classification.classifier import all_visible, pool_tokens
from mirl.engine.transfer.classification.evaluation import EvaluationInterrupted, hits
from mirl.engine.transfer.classification.linear_probe import LabelledFeatures, train_linear_probe
from mirl.errors import UserError

VAL_LOSS, PROBE = "val_loss", "probe_top1_percent"
MASK_SEED = 0x4D495251  # of no run, so that the figures of runs with other seeds are of the same masks
PROBE_EPOCHS = 20
PROBE_SEED = 0
TIMES = 10  # evaluations of a run by default, unless they would take more than
MOST_PERCENT = 2.0  # of its time
SETTLED = 3  # evaluations, after which their share of the time says something
_PLANNED = 0.6  # share of that in floating-point operations; reading images and fitting the probe is the rest

Features = Callable[[Tensor], dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class EvaluationSets:
    """val: held-out images, None for no loss of theirs. probe: labelled ones, None for no probe."""

    val: EvalLoader | None
    probe: ProbeData | None

    def __bool__(self) -> bool:
        return self.val is not None or self.probe is not None

    @property
    def images(self) -> int:
        """That one evaluation passes through the model."""
        sets = [self.val, self.probe.loader if self.probe is not None else None]
        return sum(found.num_images for found in sets if found is not None)


def default_interval(config: PretrainConfig, sets: EvaluationSets, total_steps: int) -> int:
    """Steps between evaluations: ten in a run, or fewer where their operations would be more than 1.2 % of the run's.

    A function of the settings and the data alone: all ranks and a resumed run have the same.
    """
    model = config.model
    whole = model.built_depth * encoder_block_flops(model, model.num_patches + 1)
    cost = sets.val.num_images * forward_flops(model).total if sets.val is not None else 0.0
    cost += sets.probe.loader.num_images * whole if sets.probe is not None else 0.0
    step = config.optim.batch_size * training_flops_per_image(model) * StepSizes.of(config, total_steps).mean_cost
    spared = math.ceil(cost / (step * MOST_PERCENT / 100 * _PLANNED))
    return min(total_steps, max(1, math.ceil(total_steps / TIMES), spared))


class Evaluation:
    """The evaluations of one run. All ranks make the same calls in the same order; rank 0 writes.

    best: of each metric the best value and its step; it stands in the run's `Progress`, and so in its checkpoints.
    """

    def __init__(
        self,
        config: PretrainConfig,
        sets: EvaluationSets,
        *,
        ranks: Ranks,
        log: RunLog,
        total_steps: int,
        best: dict[str, list[float]],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.sets, self.best = sets, best
        self.every = config.log.eval_every or default_interval(config, sets, total_steps)
        self._patches = config.model.num_patches
        self._ranks, self._log, self._clock = ranks, log, clock
        self._began, self._seconds = clock(), 0.0
        self._made, self._told_of_time = 0, False

    def opening_lines(self) -> list[str]:
        """Lines of the log that say what is evaluated, how often, and what was the best before this start."""
        parts = [] if self.sets.val is None else [f"loss of {self.sets.val.ledger}"]
        if self.sets.probe is not None:
            loader, fitted = self.sets.probe.loader, self.sets.probe.fitted
            parts.append(
                f"linear probe of {self.sets.probe.num_classes} classes, fitted to {fitted} images and measured on "
                f"{loader.num_images - fitted}"
            )
        lines = [f"evaluated every {self.every} steps and at the end: {'; '.join(parts)}"]
        if self.best:
            named = ", ".join(f"{name} {value:.4f} at step {step:.0f}" for name, (value, step) in self.best.items())
            lines.append(f"best so far: {named}")
        return lines

    def due(self, step: int, *, last: bool) -> bool:
        """Whether there is an evaluation after ``step``."""
        return last or step % self.every == 0

    def run(self, model: MIRL, step: int, *, last: bool, features: Features, interrupted: Callable[[], bool]) -> None:
        """Evaluate ``model`` and tell the figures; cut short, on all ranks alike, where ``interrupted`` says so.

        features: what the loss needs beside images, of the images. last: of the run.
        """
        began = self._clock()
        values: dict[str, float] = {"step": step}
        try:
            with _in_eval_mode(model):
                if self.sets.val is not None:
                    values |= self._held_out(model, self.sets.val, features, interrupted)
                if self.sets.probe is not None:
                    values |= self._probe(model, self.sets.probe, interrupted)
        except EvaluationInterrupted:
            self._log.say(f"step {step}  the evaluation was cut short")
            return
        finally:
            now = self._clock()
            self._seconds += now - began
        share = 100 * self._seconds / (now - self._began)
        for name, better in ((VAL_LOSS, min), (PROBE, max)):
            if name in values and math.isfinite(values[name]):
                before = self.best.get(name)
                if before is None or better(values[name], before[0]) != before[0]:
                    self.best[name] = [values[name], step]
                values[f"best_{name}"] = self.best[name][0]
        values["evaluation_percent"] = share
        self._log.metrics(values, self._line(step, values, share))
        self._made += 1
        # The first ones are measured against the start of the run, which is short.
        if share > MOST_PERCENT and not self._told_of_time and (last or self._made >= SETTLED):
            self._told_of_time = True
            self._log.say(
                f"the evaluations take {share:.1f}% of the time, above {MOST_PERCENT:g}%: give fewer images, or "
                f"--eval-every above {self.every}"
            )

    def _line(self, step: int, values: dict[str, float], share: float) -> str:
        parts = [f"step {step}"]
        if VAL_LOSS in values:
            parts.append(f"held-out loss {values[VAL_LOSS]:.4f} of {values['val_images']} images{self._told(VAL_LOSS)}")
        if PROBE in values:
            parts.append(f"linear probe top-1 {values[PROBE]:.2f}%{self._told(PROBE)}")
        elif self.sets.probe is not None:
            parts.append("no linear probe: too few images can be read")
        return "  ".join([*parts, f"evaluations {share:.1f}% of the time"])

    def _told(self, name: str) -> str:
        if name not in self.best:
            return ""
        value, step = self.best[name]
        return f" (best {value:.4f} at step {step:.0f})" if name == VAL_LOSS else f" (best {value:.2f}% at {step:.0f})"

    @torch.no_grad()
    def _held_out(
        self, model: MIRL, loader: EvalLoader, features: Features, interrupted: Callable[[], bool]
    ) -> dict[str, float]:
        """Mean loss and terms over all readable images, each once; its mask is a function of its number."""
        device = self._ranks.device
        sums = torch.zeros(2 + len(model.term_names), dtype=torch.float64, device=device)
        for batch, rows, count in _counted(loader, interrupted):
            images = batch.images[rows.to(device)]
            noise_BN = mask_noise(MASK_SEED, 0, int(batch.positions[0]), len(batch.positions), self._patches)
            output = model(images, noise=noise_BN[rows].to(device), **features(images))
            if count:
                found = torch.cat([output.loss.reshape(1), output.terms.detach()]).double()
                sums += torch.cat([found * count, found.new_tensor([float(count)])])
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        loss, *terms, images_seen = sums.tolist()
        scale = 1 / max(1.0, images_seen)
        named = dict(zip(model.term_names, terms, strict=True)) if len(terms) > 1 else {}
        values = {VAL_LOSS: loss * scale if images_seen else math.nan}
        values |= {f"{VAL_LOSS}_{name}": term * scale for name, term in named.items()}
        return values | {"val_images": int(images_seen)}

    def _probe(self, model: MIRL, data: ProbeData, interrupted: Callable[[], bool]) -> dict[str, float]:
        """Top-1 of a linear classifier on the mean of the normed patch tokens, as `mirl probe` has it."""
        features, labels, numbers = [torch.empty(0, model.config.width)], [torch.empty(0, dtype=torch.int64)], []
        for batch, rows, count in _counted(data.loader, interrupted):
            assert batch.labels is not None
            found_BD = pooled_features(model, batch.images[rows.to(self._ranks.device)])
            features.append(found_BD[:count].cpu())
            labels.append(batch.labels.cpu()[rows][:count])
            numbers += batch.positions[rows.numpy()][:count].tolist()
        gathered = self._ranks.gather((torch.cat(features), torch.cat(labels), numbers))
        interrupted()  # a sign of life before the one rank that fits
        found = _fit_and_measure(gathered, data, self._ranks.device) if self._ranks.is_main else None
        found = self._ranks.broadcast(found)
        return {} if found is None else {PROBE: found}


@torch.no_grad()
def pooled_features(model: MIRL, images: Tensor) -> Tensor:
    """Mean of the patch tokens after the last norm, of all patches: float32 [B, D]; ``model`` is in eval mode.

    images: uint8 [B, H, W, C], or float [B, C, H, W] normalised.
    """
    model.choose(images, plain=True)
    latents = model.encoder(images, all_visible(len(images), model.config.num_patches, images.device))
    return pool_tokens(latents[-1], "avg").float()


def _fit_and_measure(
    gathered: list[tuple[Tensor, Tensor, list[int]]], data: ProbeData, device: torch.device
) -> float | None:
    """Top-1 in per cent; None where too few images could be read to fit or to measure."""
    features_nD, labels_n = torch.cat([part[0] for part in gathered]), torch.cat([part[1] for part in gathered])
    numbers_n = torch.tensor([number for part in gathered for number in part[2]])
    order_n = numbers_n.argsort()  # the order of the data, however many ranks have divided it
    features_nD, labels_n, numbers_n = features_nD[order_n].to(device), labels_n[order_n].to(device), numbers_n[order_n]
    whole = LabelledFeatures(features=features_nD, labels=labels_n, classes=None)
    rows_n = (numbers_n < data.fitted).to(device)
    train, measured = whole.subset(rows_n.nonzero()[:, 0]), whole.subset((~rows_n).nonzero()[:, 0])
    if not len(train) or not len(measured):
        return None
    try:
        probe = train_linear_probe(train, num_classes=data.num_classes, epochs=PROBE_EPOCHS, seed=PROBE_SEED)
    except UserError:
        return None
    return 100 * int(hits(probe(measured.features), measured.labels)[:, 0].sum()) / len(measured)


def _counted(loader: EvalLoader, interrupted: Callable[[], bool]) -> Iterator[tuple[Batch, Tensor, int]]:
    """Each batch, which of its rows to compute, and how many of those count: all, or none of the one row.

    Every rank has as many batches, and passes one through the model also where its part of the set has run out.
    """
    batches = iter(loader)
    with contextlib.closing(batches):  # type: ignore[type-var]  # a generator
        for batch in batches:
            if interrupted():
                raise EvaluationInterrupted
            assert batch.valid is not None
            rows = torch.from_numpy(batch.valid.nonzero()[0])
            yield (batch, rows, len(rows)) if len(rows) else (batch, torch.zeros(1, dtype=torch.int64), 0)


@contextmanager
def _in_eval_mode(model: MIRL) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def complete_best(best: dict[str, list[float]], out: Path, step: int) -> None:
    """Add to ``best``, of a checkpoint, what metrics.jsonl of its run in ``out`` has up to ``step``.

    The evaluation after a step comes after its checkpoint, which therefore does not hold it.
    """
    with contextlib.suppress(OSError):
        for line in (out / "metrics.jsonl").read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError, AttributeError, TypeError):
                record = json.loads(line)
                for name, better in ((VAL_LOSS, min), (PROBE, max)):
                    value = record.get(name)
                    if value is None or record["step"] > step:
                        continue
                    before = best.get(name)
                    if before is None or better(value, before[0]) != before[0]:
                        best[name] = [value, record["step"]]
