"""Whole runs on a small folder of real photographs: how they are started, and what they leave."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image
from skimage import data

from mirl.engine.checkpoints.reader import CheckpointReader
from tests.support.launch import CHECKOUT

TINY = [
    "--image-size", "32", "--patch-size", "8", "--depth", "4", "--width", "32", "--heads", "2", "--segments", "4",
    "--decoder-width", "32", "--decoder-heads", "2", "--batch-size", "8", "--precision", "fp32",
    "--log-every", "1", "--pictures", "2", "--no-tensorboard", "--loader-threads", "1",
]  # fmt: skip
ENTRY = str(CHECKOUT / "engine" / "pretrain.py")


def write_photographs(folder: Path) -> Path:
    """44 JPEG files: five steps of eight an epoch, and four left over."""
    pictures = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket()]
    for number in range(44):
        picture = Image.fromarray(pictures[number % 4])
        left, top = (number * 37) % (picture.width - 96), (number * 23) % (picture.height - 96)
        picture.crop((left, top, left + 96, top + 96)).save(folder / f"{number:03d}.jpg", quality=90)
    return folder


def records(out: Path) -> list[dict]:
    """The lines of metrics.jsonl; each is JSON as its standard has it, which knows no NaN."""

    def refuse(constant: str) -> float:
        raise ValueError(f"metrics.jsonl holds {constant}")

    return [json.loads(line, parse_constant=refuse) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in records(out) if "loss" in record}


def events(out: Path, kind: str) -> list[dict]:
    return [record for record in records(out) if record.get("event") == kind]


def tensors(checkpoint: Path) -> dict:
    reader = CheckpointReader(checkpoint)
    kinds = ["weight", "exp_avg", "exp_avg_sq"]
    if (reader.state["config"].get("optim") or {}).get("ema"):
        kinds.append("ema")
    return {
        (kind, name): reader.read(name, kind, 0, weight.numel())
        for name, weight in reader.weights().items()
        for kind in kinds
    }


def equal_tensors(one: Path, other: Path) -> bool:
    first, second = tensors(one), tensors(other)
    return first.keys() == second.keys() and all(bool((first[key] == second[key]).all()) for key in first)
