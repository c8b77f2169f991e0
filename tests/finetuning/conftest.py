"""Labelled pictures, checkpoints, and processes of one group."""

from __future__ import annotations

import dataclasses
import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.checkpoint import CheckpointWriter
from engine.ds_engine import Fragment
from engine.launch import Ranks
from engine.models import MIRL, ModelConfig
from tests.conftest import launch_environment


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


def start_ranks(worker: Path, world_size: int, settings: dict) -> None:
    """Run ``worker`` in ``world_size`` processes of one group, ``settings`` on their standard input as JSON."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = launch_environment() | {
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(worker)],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    for process in processes:
        process.stdin.write(json.dumps(settings))
        process.stdin.close()
        process.stdin = None
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs[0][-3000:] + outputs[-1][-3000:]
