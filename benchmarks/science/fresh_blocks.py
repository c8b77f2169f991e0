"""One unit of the experiment on Fig. 2: pre-train one method with one seed, then fine-tune it with its last blocks as
they are and afresh, beside what the depth report measures of it.

The methods are compared as in the paper's Fig. 2: twelve blocks, two segments, MIRL's decoders of two blocks each and
MAE's of four. Both see the same images in the same order under the same masks from the same initial encoder, and both
fine-tunings of a repeat have the same batches, head and fresh blocks, so that a difference is of what is compared.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.science.experiment import pretrain
from benchmarks.science.views import views
from mirl.engine.analysis.depth import (
    LabelledImages,
    features_by_block,
    fresh_from,
    gradient_norms,
    probe_accuracies,
)
from mirl.engine.analysis.in_memory import ShortFinetune, autocast, finetune_in_memory
from mirl.engine.models import ModelConfig
from mirl.engine.models.encoder import Encoder
from mirl.engine.models.initialise import initialise
from mirl.engine.transfer.classification.classifier import Classifier

METHODS: dict[str, dict[str, Any]] = {
    "mae": {"objective": "mae", "segments": 1, "did": False, "decoder_depth": 4},
    "mirl": {"objective": "mirl", "segments": 2, "decoder_depth": 2},
}

NONE = "none"  # the encoder that both begin with, not trained at all: whether pre-training is worth anything


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large everything is. fresh: the last blocks that are made afresh; repeats: fine-tunings of each kind;
    looks: how often the held-out accuracy is measured over a fine-tuning, at equal distances, the end included."""

    depth: int = 12
    width: int
    heads: int
    patch_size: int
    image_side: int
    decoder_width: int
    decoder_heads: int
    train_views: int
    held_out_views: int
    steps: int
    pretrain_batch: int
    pretrain_lr: float
    finetune: ShortFinetune
    fresh: int = 4
    repeats: int = 2
    looks: int = 4
    probe_views: int
    probe_epochs: int = 30
    gradient_views: int = 256

    def model(self, method: str) -> ModelConfig:
        names = ("depth", "width", "heads", "patch_size", "decoder_width", "decoder_heads")
        return ModelConfig(
            name=f"fresh_blocks_{method}",
            image_height=self.image_side,
            image_width=self.image_side,
            **{name: getattr(self, name) for name in names},
            **METHODS[method],
        )

    def pretrain_steps(self, method: str) -> int:
        """Equal for every method, as the paper's epochs are."""
        return self.steps


CPU = Scale(
    width=64, heads=4, patch_size=8, image_side=32, decoder_width=32, decoder_heads=4,
    train_views=8192, held_out_views=1024, steps=800, pretrain_batch=64, pretrain_lr=2e-3,
    finetune=ShortFinetune(steps=80, batch_size=64, lr=2e-3, layer_decay=0.9), probe_views=2048,
)  # fmt: skip
SCALES = {
    "cpu": CPU,
    # What two cores do with sixteen seeds in two nights of 2.5 hours.
    "nights": dataclasses.replace(
        CPU, steps=9000, train_views=32768, held_out_views=2048,
        finetune=dataclasses.replace(CPU.finetune, steps=400),
    ),
    "gpu": Scale(
        width=192, heads=6, patch_size=8, image_side=64, decoder_width=96, decoder_heads=3,
        train_views=32768, held_out_views=4096, steps=6000, pretrain_batch=256, pretrain_lr=2e-3,
        finetune=ShortFinetune(steps=600, batch_size=128, lr=2e-3, layer_decay=0.8), probe_views=8192,
        gradient_views=1024,
    ),
    "tiny": Scale(
        width=8, heads=2, patch_size=8, image_side=16, decoder_width=8, decoder_heads=2,
        train_views=144, held_out_views=72, steps=2, pretrain_batch=8, pretrain_lr=2e-3,
        finetune=ShortFinetune(steps=2, batch_size=8), looks=2, probe_views=144, probe_epochs=1, gradient_views=64,
    ),
}  # fmt: skip


def untrained(config: ModelConfig, seed: int) -> Encoder:
    """What `pretrain` begins with under ``same_encoder``."""
    encoder = Encoder(config)
    torch.manual_seed(seed)
    initialise(encoder)
    return encoder


class Stopwatch:
    """Seconds of each part: of the processor on a CPU, which other programs share, and by the clock on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._now = time.process_time if device.type == "cpu" else time.perf_counter
        self._last = self._now()
        self.seconds: dict[str, float] = {}

    def lap(self, part: str) -> None:
        now = self._now()
        self.seconds[part] = round(self.seconds.get(part, 0.0) + now - self._last, 2)
        self._last = now


def run_unit(scale: Scale, method: str, seed: int, device_name: str) -> dict[str, Any]:
    """The record of one method and seed; see `benchmarks.science.power` for what is read from it."""
    device = torch.device(device_name)
    if device.type == "cpu":
        torch.set_num_threads(1)
    train, held_out = (
        LabelledImages(images=images.to(device), labels=labels.to(device), classes=None)
        for images, labels in (
            views(scale.train_views, scale.image_side, held_out=False),
            views(scale.held_out_views, scale.image_side, held_out=True),
        )
    )
    watch = Stopwatch(device)
    config = scale.model("mae" if method == NONE else method)
    found: dict[str, Any] = {"method": method, "seed": seed}
    if method == NONE:
        encoder = untrained(config, seed)
    else:
        model, about = pretrain(scale, method, train.images, seed, same_encoder=True)
        watch.lap("pretrain")
        encoder, norms = model.encoder, gradient_norms(model, held_out.images[: scale.gradient_views], seed=seed)
        found |= {"last_loss": about["last_loss"], "gradient_norm": norms.norm}
    weights = {
        name: value.detach().cpu()
        for name, value in encoder.named_parameters()
        if not name.startswith("segment_norms.")
    }
    frozen = fresh_from(config, weights, train, first=scale.depth, seed=seed)
    some = LabelledImages(
        images=train.images[: scale.probe_views], labels=train.labels[: scale.probe_views], classes=None
    )
    seen, unseen = features_by_block(frozen, some), features_by_block(frozen, held_out)
    found["probe_top1_percent"] = probe_accuracies(seen, unseen, epochs=scale.probe_epochs, seed=seed)
    watch.lap("look_inside")
    curves = []
    for repeat in range(scale.repeats):
        for fresh in (0,) if method == NONE else (0, scale.fresh):
            drawn = 1000 * seed + repeat
            classifier = fresh_from(config, weights, train, first=scale.depth - fresh, seed=drawn)
            curve = finetuning_curve(classifier, train, held_out, scale, seed=drawn)
            curves.append({"repeat": repeat, "fresh_blocks": fresh} | curve)
    watch.lap("finetune")
    return found | {"finetune": curves, "seconds": watch.seconds}


def finetuning_curve(
    classifier: Classifier, train: LabelledImages, held_out: LabelledImages, scale: Scale, *, seed: int
) -> dict[str, list[float]]:
    """Held-out top-1 in per cent and cross-entropy at each of the ``looks``; trains ``classifier`` in place."""
    done, curve = 0, {"top1_percent": [], "cross_entropy": []}
    at = {scale.finetune.steps * (look + 1) // scale.looks for look in range(scale.looks)}

    def advance(steps: int) -> None:
        nonlocal done
        done += steps
        if done in at:
            top1, loss = evaluate(classifier, held_out.images, held_out.labels)
            curve["top1_percent"].append(top1)
            curve["cross_entropy"].append(loss)
            classifier.train()

    finetune_in_memory(classifier, train.images, train.labels, scale.finetune, seed=seed, advance=advance)
    return curve


@torch.no_grad()
def evaluate(model: Classifier, images: Tensor, labels: Tensor, batch_size: int = 256) -> tuple[float, float]:
    """Top-1 in per cent and mean cross-entropy; leaves ``model`` in eval mode."""
    model.eval()
    correct = loss = torch.zeros((), device=images.device)
    for rows, wanted in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        with autocast(images.device):
            logits = model(rows)
        correct = correct + (logits.argmax(dim=1) == wanted).sum()
        loss = loss + F.cross_entropy(logits.float(), wanted, reduction="sum")
    return 100 * correct.item() / len(images), loss.item() / len(images)
