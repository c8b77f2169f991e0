"""Labelled pictures, checkpoints, and processes of one group."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mirl.engine.checkpoints.writer import CheckpointWriter
from mirl.engine.distributed.ds_engine import Fragment
from mirl.engine.distributed.launch import Ranks
from mirl.engine.models import MIRL, ModelConfig


def write_classes(root: Path, counts: dict[str, int], size: tuple[int, int] = (20, 28)) -> Path:
    """PNG files of noise in ``root``/CLASS, of one colour in each class; another ``root`` name, other noise."""
    rng = np.random.default_rng(len(root.name))
    for number, (label, count) in enumerate(counts.items()):
        (root / label).mkdir(parents=True)
        colour = np.array([(90, 120, 200), (200, 110, 80), (110, 190, 110)][number])
        for index in range(count):
            noise = rng.normal(0, 30, (*size, 3))
            Image.fromarray((colour + noise).clip(0, 255).astype(np.uint8)).save(root / label / f"{index:02d}.png")
    return root


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[[ModelConfig], Path]:
    """checkpoint(config): the folder of a checkpoint with the weights of a fresh model."""

    def make(config: ModelConfig) -> Path:
        torch.manual_seed(3)
        model = MIRL(config)
        ranks = Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1, device=torch.device("cpu"))
        writer = CheckpointWriter(tmp_path / "checkpoints", ranks, keep=0)
        state = {
            "config": {"model": dataclasses.asdict(config)},
            "parameters": {name: list(parameter.shape) for name, parameter in model.named_parameters()},
        }
        fragments = [
            Fragment(name=name, kind="weight", start=0, tensor=parameter.detach().flatten())
            for name, parameter in model.named_parameters()
        ]
        writer.save(1, fragments, state)
        writer.wait()
        published, failure = writer.poll()
        assert published is not None, failure
        return published

    return make
