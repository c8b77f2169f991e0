"""What DeepSpeed costs: a step through engine/distributed/ds_engine.py against a bare loop, same model, optimiser and
images.

    python -m benchmarks.bench_deepspeed [--world-size 2] [--stage zero2] [--model demo] [--steps 9]
    pytest benchmarks/test_deepspeed.py           # small; the figure goes to the terminal

On 2 ranks the bare loop averages gradients by one all-reduce of one flat tensor. The two take turns, step by step, so
that whatever else the machine does falls on both. The result is the median over steps of the ratio of neighbours. fp32
on both sides, so that both do the same arithmetic; the weights are compared at the end.

DeepSpeed's cost is one of parameters, not of images: gradients are copied to where the optimiser reads them
(engine/distributed/flat_gradients.py), and weights copied back. So the model and the batch decide what share of a step
it is; the default is the demo recipe's. `cpu_ratio` compares processor time instead of wall time: on a busy machine the
steadier of the two.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

CHECKOUT = Path(__file__).resolve().parents[1]
TARGET = {"cuda": 1.02, "cpu": 1.05}


class BareLoop:
    """AdamW on fp32 weights without DeepSpeed."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, clip: float, world_size: int) -> None:
        self.model, self.optimizer, self.clip, self.world_size = model, optimizer, clip, world_size
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def __call__(self, images: Tensor, noise: Tensor) -> None:
        self.model(images, noise=noise).loss.backward()
        if self.world_size > 1:
            flat = torch.cat([parameter.grad.reshape(-1) for parameter in self.parameters])
            torch.distributed.all_reduce(flat)
            flat /= self.world_size
            pieces = flat.split([parameter.numel() for parameter in self.parameters])
            for parameter, piece in zip(self.parameters, pieces, strict=True):
                parameter.grad.copy_(piece.view_as(parameter))
        torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()


def measure(model_name: str, stage: str, batch: int, side: int, steps: int) -> dict[str, float]:
    """One rank's work; every rank returns its own figures."""
    from mirl.engine.configuration.config import DataConfig, OptimConfig, PretrainConfig, RunConfig
    from mirl.engine.distributed.ds_config import read_ds_config, resolve_ds_config
    from mirl.engine.distributed.ds_engine import TrainEngine
    from mirl.engine.distributed.launch import join, leave
    from mirl.engine.models import MIRL, model_config
    from mirl.engine.pretraining.recipes import recipe
    from mirl.engine.training.noise import mask_noise
    from mirl.engine.training.optimizer import build_optimizer

    ranks = join()
    demo = recipe("demo").model
    config = PretrainConfig(
        recipe="bench",
        model=demo if model_name == "demo" else model_config(model_name, image_height=side, image_width=side),
        data=DataConfig(),
        optim=OptimConfig(batch_size=batch * ranks.world_size, steps=steps, clip_grad=1.0),
        run=RunConfig(deepspeed_config=stage, precision="fp32"),
    )

    def build() -> tuple[MIRL, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = MIRL(config.model).to(ranks.device)
        return model, build_optimizer(model, config.optim, ranks.device)

    bare = BareLoop(*build(), config.optim.clip_grad, ranks.world_size)
    ds_config = resolve_ds_config(
        read_ds_config(stage), config, micro_batch=batch, accumulation=1, precision="fp32", device=ranks.device
    )
    engine = TrainEngine(*build(), ds_config)

    def with_deepspeed(images: Tensor, noise: Tensor) -> None:
        engine.backward(engine.forward(images, noise=noise).loss)
        engine.step(config.optim.peak_lr)

    for group in bare.optimizer.param_groups:
        group["lr"] = config.optim.peak_lr
    side = config.model.image_height
    images = torch.randint(0, 256, (batch, side, side, config.model.channels), dtype=torch.uint8, device=ranks.device)
    noise = mask_noise(0, 0, ranks.rank * batch, batch, config.model.num_patches).to(ranks.device)
    seconds: dict[str, list[tuple[float, float]]] = {"bare": [], "deepspeed": []}
    for step in range(steps + 2):  # two to warm up
        pair = [("bare", bare), ("deepspeed", with_deepspeed)]
        for name, call in pair if step % 2 else pair[::-1]:
            ranks.barrier()
            taken = time_of(call, images, noise)
            if step >= 2:
                seconds[name].append(taken)
    same = torch.cat([parameter.reshape(-1) for parameter in bare.parameters])
    ours = torch.cat([parameter.detach().float().reshape(-1) for parameter in engine.module.parameters()])
    # Both did the same training, else the comparison is of different work (ZeRO-3 holds no whole weights to compare).
    assert stage == "zero3" or torch.allclose(same, ours, atol=1e-4)  # some steps of fp32 sums in another order
    leave()
    wall, cpu = (
        [ours[kind] / bare[kind] for ours, bare in zip(seconds["deepspeed"], seconds["bare"], strict=True)]
        for kind in (0, 1)
    )
    return {f"{name}_ms": 1000 * statistics.median(wall for wall, _ in values) for name, values in seconds.items()} | {
        "ratio": statistics.median(wall),
        "spread_percent": 100 * (max(wall) - min(wall)) / statistics.median(wall),
        "cpu_ratio": statistics.median(cpu),
    }


def time_of(call: Callable[[Tensor, Tensor], None], images: Tensor, noise: Tensor) -> tuple[float, float]:
    """Wall and processor seconds of one step."""
    _synchronise()
    wall, cpu = time.perf_counter(), time.process_time()
    call(images, noise)
    _synchronise()
    return time.perf_counter() - wall, time.process_time() - cpu


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def run(world_size: int, *arguments: str) -> dict[str, float]:
    """Rank 0's figures of ``world_size`` processes, each on one thread of a CPU."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = dict(os.environ) | {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.bench_deepspeed", "--worker", *arguments],
            cwd=CHECKOUT,
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError(f"a rank failed with {[process.returncode for process in processes]}")
    return json.loads(outputs[0].splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world-size", type=int, default=1)
    parser.add_argument("--model", default="demo", help="demo, or a name of mirl.engine.models.MODEL_NAMES")
    parser.add_argument("--stage", default="zero2")
    parser.add_argument("--batch", type=int, default=64, help="images of a rank")
    parser.add_argument("--side", type=int, default=96, help="pixels; the demo has its own")
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        if not torch.cuda.is_available():
            torch.set_num_threads(1)
        figures = measure(given.model, given.stage, given.batch, given.side, given.steps)
        if os.environ["RANK"] == "0":
            print(json.dumps(figures))
        return
    flags = [f"--{name}={getattr(given, name)}" for name in ("model", "stage", "batch", "side", "steps")]
    figures = run(given.world_size, *flags)
    limit = TARGET["cuda" if torch.cuda.is_available() else "cpu"]
    print(
        f"{given.model} {given.stage}, {given.world_size} ranks x {given.batch} images: "
        f"bare {figures['bare_ms']:.1f} ms, DeepSpeed {figures['deepspeed_ms']:.1f} ms, ratio {figures['ratio']:.3f} "
        f"(target {limit}), spread {figures['spread_percent']:.0f} %, "
        f"processor time {figures['cpu_ratio']:.3f}"
    )


if __name__ == "__main__":
    main()
