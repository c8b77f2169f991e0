"""One unit of the experiment: pre-train one method with one seed, then fine-tune it in every way that is compared."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.science.fashion_mnist import CLASSES, MEAN, STD, balanced_subset, load
from mirl.engine.accounting.flops import training_flops_per_image
from mirl.engine.analysis.in_memory import ShortFinetune, accuracy_percent, autocast, finetune_in_memory, shift_and_flip
from mirl.engine.configuration.config import OptimConfig
from mirl.engine.models import MIRL, ExactSkips, ModelConfig
from mirl.engine.models.initialise import initialise
from mirl.engine.training.noise import mask_noise
from mirl.engine.training.optimizer import build_optimizer
from mirl.engine.training.schedule import Schedule
from mirl.engine.transfer.classification.classifier import Classifier, encoder_config
from mirl.engine.transfer.initialise_from import initialise_from, reinit_last

METHODS: dict[str, dict[str, Any]] = {
    "mae": {"objective": "mae", "segments": 1, "did": False},
    "multi_decoder": {"objective": "multi_decoder"},
    "mirl": {"objective": "mirl"},
    "mirl_without_did": {"objective": "mirl", "did": False},
}
FRESH = "scratch"  # no pre-training at all
REINITIALISED = ("mae", "multi_decoder", "mirl")  # also fine-tuned with the last third afresh


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large everything is. pretrain_images: that MIRL sees; every method gets the FLOPs that this takes."""

    depth: int
    width: int
    heads: int
    patch_size: int
    segments: int
    decoder_width: int
    decoder_heads: int
    decoder_depth: int
    pretrain_images: int
    pretrain_batch: int
    pretrain_lr: float
    finetune: ShortFinetune
    drop_path: float
    labels: tuple[int, ...]
    test_images: int

    def model(self, method: str) -> ModelConfig:
        shape = {
            name: getattr(self, name)
            for name in ("depth", "width", "heads", "patch_size", "decoder_width", "decoder_heads", "decoder_depth")
        }
        settings = {"segments": self.segments} | METHODS[method]
        return ModelConfig(
            name=f"science_{method}",
            image_height=28,
            image_width=28,
            channels=1,
            mean=MEAN,
            std=STD,
            **shape,
            **settings,
        )

    def pretrain_steps(self, method: str) -> int:
        """As many as the FLOPs of ``pretrain_images`` images of MIRL pay for, counted with the exact skips."""
        skips = ExactSkips()
        budget = self.pretrain_images * training_flops_per_image(self.model("mirl"), skips)
        return round(budget / training_flops_per_image(self.model(method), skips) / self.pretrain_batch)


REDUCED = Scale(
    depth=16, width=64, heads=4, patch_size=7, segments=4, decoder_width=32, decoder_heads=4, decoder_depth=2,
    pretrain_images=96_000, pretrain_batch=128, pretrain_lr=2e-3,
    finetune=ShortFinetune(steps=450, batch_size=32, lr=2e-3, layer_decay=0.93), drop_path=0.0,
    labels=(1000, 6000), test_images=5_000,
)  # fmt: skip
FULL = Scale(
    depth=48, width=128, heads=4, patch_size=4, segments=6, decoder_width=64, decoder_heads=4, decoder_depth=2,
    pretrain_images=3_000_000, pretrain_batch=1024, pretrain_lr=2e-3,
    finetune=ShortFinetune(steps=1500, batch_size=128, lr=2e-3, layer_decay=0.9), drop_path=0.1,
    labels=(1000, 6000), test_images=10_000,
)  # fmt: skip


class Pretraining(Protocol):
    """What `pretrain` asks of a scale."""

    @property
    def pretrain_batch(self) -> int: ...

    @property
    def pretrain_lr(self) -> float: ...

    def model(self, method: str) -> ModelConfig: ...

    def pretrain_steps(self, method: str) -> int: ...


def pretrain(
    scale: Pretraining, method: str, images: Tensor, seed: int, *, same_encoder: bool = False
) -> tuple[MIRL, dict[str, Any]]:
    """The model of ``method`` trained on ``images``, uint8 [n, H, W, C], for the steps of ``scale``; how that went.

    same_encoder: the encoder begins with the same weights whatever the decoders are.
    """
    config, device = scale.model(method), images.device
    steps = scale.pretrain_steps(method)
    torch.manual_seed(seed)
    model = MIRL(config)
    if same_encoder:
        # Modules draw numbers when they are made, other decoders other ones.
        torch.manual_seed(seed)
        initialise(model.encoder)
    model = model.to(device).train()
    optimizer = build_optimizer(model, OptimConfig(steps=steps, lr=scale.pretrain_lr), device)
    schedule = Schedule(
        peak_lr=scale.pretrain_lr, min_lr=0.0, warmup_steps=steps // 10, total_steps=steps, shape="cosine"
    )
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    loss_sum, tail = torch.zeros((), device=device), max(1, steps // 10)
    for step in range(steps):
        while len(order) < scale.pretrain_batch:
            order = torch.cat([order, torch.randperm(len(images), generator=generator)])
        rows, order = order[: scale.pretrain_batch].to(device), order[scale.pretrain_batch :]
        batch = shift_and_flip(images[rows], 2, True, generator)
        noise = mask_noise(seed, step, 0, len(batch), config.num_patches).to(device)
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr(step)
        with autocast(device):
            loss = model(batch, noise=noise).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step >= steps - tail:
            loss_sum += loss.detach()
    flops = steps * scale.pretrain_batch * training_flops_per_image(config, ExactSkips())
    return model, {"steps": steps, "flops": flops, "last_loss": loss_sum.item() / tail}


def run_unit(scale: Scale, method: str, seed: int, folder: Path, device_name: str) -> list[dict[str, Any]]:
    """Records of one method and seed: one for each number of labels, with the last third as pre-trained and afresh."""
    if device_name == "cpu":
        torch.set_num_threads(1)
    device = torch.device(device_name)
    data = load(folder)
    (images, labels), (test_images, test_labels) = (
        [part.to(device) for part in data[name]] for name in ("train", "test")
    )
    test_images, test_labels = test_images[: scale.test_images], test_labels[: scale.test_images]
    started = time.perf_counter()
    weights, about = {}, {}
    if method != FRESH:
        model, about = pretrain(scale, method, images, seed)
        weights = {
            name.removeprefix("encoder."): value.detach()
            for name, value in model.named_parameters()
            if name.startswith("encoder.") and ".segment_norms." not in name
        }
    about["pretrain_seconds"] = time.perf_counter() - started
    config = encoder_config(scale.model("mae" if method == FRESH else method))
    records = []
    for count in scale.labels:
        subset = balanced_subset(labels.cpu(), count, seed).to(device)
        for fresh in (0, scale.depth // 3) if method in REINITIALISED else (0,):
            started = time.perf_counter()
            torch.manual_seed(seed)
            classifier = Classifier(config, num_classes=CLASSES, drop_path=scale.drop_path)
            if weights:
                initialise_from(classifier, config, {name: value.cpu() for name, value in weights.items()})
            reinit_last(classifier, fresh, seed + 1000)
            classifier.to(device)
            # Without pre-training there is nothing in the early layers to be kept.
            recipe = dataclasses.replace(scale.finetune, layer_decay=1.0) if method == FRESH else scale.finetune
            finetune_in_memory(classifier, images[subset], labels[subset], recipe, seed=seed)
            top1 = accuracy_percent(classifier, test_images, test_labels)
            records.append(
                {"method": method, "seed": seed, "labels": count, "fresh_blocks": fresh, "top1_percent": top1}
                | about
                | {"finetune_seconds": time.perf_counter() - started}
            )
    return records


def describe(scale: Scale) -> dict[str, Any]:
    """Everything that is not a result."""
    methods = {method: scale.pretrain_steps(method) for method in METHODS}
    return dataclasses.asdict(scale) | {"pretrain_steps": methods}
