"""Measure what growing images cost and gain at a small scale: python -m benchmarks.science.image_sizes --out FILE

A MIRL of 6 blocks on Fashion-MNIST, pre-trained with one image size or with growing ones, by AdamW or by Muon, each for
equal FLOPs; then a linear probe of its frozen features. The FLOPs are counted after the exact skips, forward and
backward. Seconds of the processor are told too; those of a machine with other programs on it say little.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.science.fashion_mnist import CLASSES, DEFAULT_FOLDER, MEAN, STD, load
from benchmarks.science.reading import mean_and_error, verdict
from mirl.engine.accounting.flops import training_flops_per_image
from mirl.engine.analysis.in_memory import shift_and_flip
from mirl.engine.configuration.config import OptimConfig, PretrainConfig
from mirl.engine.models import MIRL, ExactSkips, ModelConfig
from mirl.engine.models.resizing import set_image_size
from mirl.engine.pretraining.evaluating import pooled_features
from mirl.engine.pretraining.recipes import recipe
from mirl.engine.training.image_sizes import StepSizes
from mirl.engine.training.noise import mask_noise
from mirl.engine.training.optimizer import build_optimizer
from mirl.engine.training.schedule import Schedule
from mirl.engine.transfer.classification.linear_probe import LabelledFeatures, train_linear_probe

MODEL = ModelConfig(
    name="custom", depth=6, width=64, heads=4, patch_size=4, image_height=28, image_width=28, channels=1, mean=MEAN,
    std=STD, segments=2, decoder_width=32, decoder_heads=4, decoder_depth=1,
)  # fmt: skip
SIZES = ("16", "20@0.5", "28@0.85")  # of 224 pixels they would be 128, 160 and 224
ARMS: dict[str, tuple[tuple[str, ...], str]] = {
    "one size, AdamW": ((), "adamw"),
    "growing, AdamW": (SIZES, "adamw"),
    "one size, Muon": ((), "muon"),
    "growing, Muon": (SIZES, "muon"),
}
PLAIN, UNTRAINED = "one size, AdamW", "untrained"
BATCH, LR = 64, 2e-3
WHOLE_IMAGES = 32_000  # of the whole size: the FLOPs of budget 1
FITTED, MEASURED = 3_000, 5_000  # labelled images of the probe


def run_of(sizes: Sequence[str], optimizer: str, budget: float) -> PretrainConfig:
    """Make the settings of a run whose FLOPs are ``budget`` times those of `WHOLE_IMAGES` images of the whole size."""
    steps = round(budget * WHOLE_IMAGES / BATCH)
    base = recipe("tiny")
    data = dataclasses.replace(base.data, image_sizes=tuple(sizes))
    for _ in range(3):  # the cost of a step depends, by rounding, on their number
        optim = OptimConfig(batch_size=BATCH, steps=steps, warmup_steps=steps // 10, lr=LR, optimizer=optimizer)
        config = dataclasses.replace(base, model=MODEL, data=data, optim=optim)
        steps = round(budget * WHOLE_IMAGES / BATCH / StepSizes.of(config, steps).mean_cost)
    return config


def pretrain(config: PretrainConfig, images: Tensor, seed: int) -> tuple[MIRL, dict[str, Any]]:
    """Train a model on ``images`` [n, 28, 28, 1], uint8; returns it, and what that took."""
    optim, steps = config.optim, config.optim.steps
    sizes = StepSizes.of(config, steps)
    torch.manual_seed(seed)
    model = MIRL(config.model).train()
    optimizer = build_optimizer(model, optim, images.device)
    schedule = Schedule(
        peak_lr=optim.peak_lr, min_lr=0.0, warmup_steps=optim.warmup_steps, total_steps=steps, shape="cosine"
    )
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    began, wall = time.process_time(), time.perf_counter()
    for step in range(steps):
        while len(order) < BATCH:
            order = torch.cat([order, torch.randperm(len(images), generator=generator)])
        rows, order = order[:BATCH], order[BATCH:]
        batch = shift_and_flip(images[rows], 2, True, generator)
        now = sizes.model_at(step) if sizes else config.model
        if now.image_height != MODEL.image_height:
            side = (now.image_height, now.image_width)
            smaller = F.interpolate(batch.permute(0, 3, 1, 2), size=side, mode="bicubic", antialias=True)
            batch = smaller.permute(0, 2, 3, 1).contiguous()
        set_image_size(model, now.image_height, now.image_width)
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr(step)
        loss = model(batch, noise=mask_noise(seed, step, 0, BATCH, now.num_patches)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    flops = steps * BATCH * sizes.mean_cost * training_flops_per_image(config.model, ExactSkips())
    took = {"cpu_seconds": time.process_time() - began, "wall_seconds": time.perf_counter() - wall}
    return model, {"steps": steps, "images": steps * BATCH, "flops": flops} | took


def probe_percent(model: MIRL, data: dict[str, tuple[Tensor, Tensor]]) -> float:
    """Fit a linear classifier of frozen features to training images; returns its top-1 on test images."""
    model.eval()
    labelled = []
    for split, count in (("train", FITTED), ("test", MEASURED)):
        images, labels = (part[:count] for part in data[split])
        features = torch.cat([pooled_features(model, images[first : first + 250]) for first in range(0, count, 250)])
        labelled.append(LabelledFeatures(features=features, labels=labels, classes=None))
    probe = train_linear_probe(labelled[0], num_classes=CLASSES, epochs=100, seed=0)
    return 100 * (probe(labelled[1].features).argmax(1) == labelled[1].labels).double().mean().item()


def table(records: list[dict[str, Any]]) -> str:
    """Write Markdown: a line an arm and budget, mean +- standard deviation, and the difference to `PLAIN` there."""
    columns = "budget", "run", "TFLOP", "images", "processor s", "linear probe top-1", "against plain, paired"
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    found: dict[tuple[float, str], dict[int, dict[str, Any]]] = defaultdict(dict)
    for record in records:
        found[record["budget"], record["arm"]][record["seed"]] = record
    for (budget, arm), by_seed in sorted(
        found.items(), key=lambda item: (item[0][0], [UNTRAINED, *ARMS].index(item[0][1]))
    ):
        values = [record["probe"] for record in by_seed.values()]
        spread = f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        first = next(iter(by_seed.values()))
        seconds = statistics.fmean(record["cpu_seconds"] for record in by_seed.values())
        beside = found.get((budget, PLAIN), {})
        pairs = [by_seed[seed]["probe"] - beside[seed]["probe"] for seed in sorted(set(by_seed) & set(beside))]
        compared = ""
        if arm != PLAIN and pairs:
            mean, error = mean_and_error(pairs)
            compared = f"{mean:+.2f} +- {error:.2f}, {verdict(mean, error, len(pairs))}"
        lines.append(
            f"| {budget:g} | {arm} | {first['flops'] / 1e12:.2f} | {first['images']} | {seconds:.0f} | "
            f"{statistics.fmean(values):.2f}{spread} | {compared} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines; what stands there is not done again")
    parser.add_argument("--data", type=Path, default=DEFAULT_FOLDER, help="folder of the four files")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 1.0, 2.0])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    data = load(asked.data)
    lines = asked.out.read_text().splitlines() if asked.out.exists() else []
    records = [json.loads(line) for line in lines]
    done = {(record["seed"], record["budget"], record["arm"]) for record in records}
    for seed in asked.seeds:
        for budget, arm in [(0.0, UNTRAINED), *((budget, arm) for budget in asked.budgets for arm in asked.arms)]:
            if (seed, budget, arm) not in done:
                if arm == UNTRAINED:
                    torch.manual_seed(seed)
                    model, took = MIRL(MODEL), {"steps": 0, "images": 0, "flops": 0.0, "cpu_seconds": 0.0}
                else:
                    model, took = pretrain(run_of(*ARMS[arm], budget), data["train"][0], seed)
                record = {"arm": arm, "seed": seed, "budget": budget, "probe": probe_percent(model, data)} | took
                records.append(record)
                with asked.out.open("a") as stream:
                    stream.write(json.dumps(record) + "\n")
    print(table(records))


if __name__ == "__main__":
    main()
