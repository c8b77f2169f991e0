"""Most memory that one rank holds during a training step, of many settings: real steps, through DeepSpeed.

usage: python -m tests.engine.accounting.step_memory < cases.json, a list of {"model": {...}, "stage", "precision",
"checkpointing", "micro_batch", "accumulation", "bucket"}; prints a list of bytes.

On a CPU every storage that an operation makes is followed until it is freed; on a GPU it is torch's peak.
"""

from __future__ import annotations

import json
import sys
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from mirl.engine.configuration.config import DataConfig, OptimConfig, PretrainConfig, RunConfig
from mirl.engine.distributed.ds_config import read_ds_config, resolve_ds_config
from mirl.engine.distributed.ds_engine import TrainEngine
from mirl.engine.distributed.launch import join, leave
from mirl.engine.models import MIRL, Execution, ModelConfig
from mirl.engine.training.optimizer import build_optimizer


class StorageTracker(TorchDispatchMode):
    """While entered: ``alive`` and ``peak``, bytes of the storages that operations made and that are not yet freed."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for item in tree_iter(result):
            if isinstance(item, Tensor) and item.device.type != "meta":
                self._follow(item.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self._known and self._known[address]() is not None:
            return

        def forget(reference: weakref.ref) -> None:
            if self._known.get(address) is reference:  # else another storage has its address already
                del self._known[address]
            self.alive -= size

        self._known[address] = weakref.ref(storage, forget)
        self.alive += size
        self.peak = max(self.peak, self.alive)


def make_engine(case: dict[str, Any], device: torch.device) -> TrainEngine:
    micro_batch = case["micro_batch"]
    config = PretrainConfig(
        recipe="test",
        model=ModelConfig(**case["model"]),
        data=DataConfig(),
        optim=OptimConfig(batch_size=case["accumulation"] * micro_batch, micro_batch=micro_batch, steps=1, lr=1e-3),
        run=RunConfig(deepspeed_config=case["stage"], precision=case["precision"]),
    )
    values = read_ds_config(case["stage"])
    values["zero_optimization"]["reduce_bucket_size"] = case["bucket"]
    ds_config = resolve_ds_config(
        values,
        config,
        micro_batch=micro_batch,
        accumulation=case["accumulation"],
        precision=case["precision"],
        device=device,
    )
    model = MIRL(config.model)
    model.set_activation_checkpointing(case["checkpointing"])
    model.set_execution(Execution.for_device(device))
    model.to(device)
    return TrainEngine(model, build_optimizer(model, config.optim, device), ds_config)


def train(case: dict[str, Any], device: torch.device) -> None:
    engine, config = make_engine(case, device), ModelConfig(**case["model"])
    shape = (case["micro_batch"], config.image_height, config.image_width, config.channels)
    for _ in range(case["accumulation"]):
        images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
        output = engine.forward(images, noise=torch.rand(shape[0], config.num_patches, device=device))
        engine.backward(output.loss)
        del output
        engine.step(1e-3)


def peak_bytes(case: dict[str, Any], device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        train(case, device)
        return torch.cuda.max_memory_allocated() - before
    with StorageTracker() as tracker:
        train(case, device)
    return tracker.peak


if __name__ == "__main__":
    torch.set_num_threads(1)
    place = join()
    print(json.dumps([peak_bytes(case, place.device) for case in json.load(sys.stdin)]))
    leave()
