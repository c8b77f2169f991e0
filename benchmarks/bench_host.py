"""Processor time of the host in a training step: a model of full depth that is too narrow for arithmetic to count.

    python -m benchmarks.bench_host --models vit_b_48 vit_s_54 demo           # this checkout
    python -m benchmarks.bench_host --against OTHER_CHECKOUT --compile none

A step is a forward pass, a backward pass and a step of `TrainEngine` (ZeRO-2, one rank, one thread) with the
depth, the decoders and the calls of the named model, on two images of 64 pixels. What is left is Python, torch's
dispatcher and autograd, and what a CPU takes for products of a few values each, which a GPU's launches replace.

The defaults are what a step on a GPU does, or the nearest to it that costs a CPU little: compiled regions, attention
as one operator, and fp32, since a CPU converts and pads small products in bf16, which no host of a GPU does.

With ``--against`` both checkouts run in turns, each in a process of its own, and the processor time of each step is
compared, so that neighbours on the machine hit both alike. The other checkout may be as old as e3e2fab.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent
PARTS = ("forward", "backward", "step")
NARROW = {
    "name": "custom", "width": 24, "heads": 2, "decoder_width": 16, "decoder_heads": 2, "patch_size": 16,
    "image_height": 64, "image_width": 64,
}  # fmt: skip
IMAGES, WARM_UP = 2, 3
COMPILERS = ("none", "aot_eager", "inductor")
SETTINGS = ("compile", "precision", "attention")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["vit_b_48", "vit_s_54", "demo"], metavar="NAME")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="another checkout, to be timed in turns")
    parser.add_argument(
        "--compile", default="inductor", choices=("none", "aot_eager", "inductor"), help="of the regions"
    )
    parser.add_argument(
        "--precision",
        default="fp32",
        choices=("bf16", "fp32"),
        help="a CPU's small products in fp32 are cheap, so that what is left is nearer to what a GPU's host does",
    )
    parser.add_argument("--attention", default="sdpa", choices=("sdpa", "math"), help="in one operator, or in several")
    parser.add_argument("--rounds", type=int, default=6, help="turns of each checkout")
    parser.add_argument("--steps", type=int, default=5, help="steps of a turn")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all samples there, as JSON")
    parser.add_argument("--profile", action="store_true", help="show where this checkout's Python spends its time")
    parser.add_argument("--serve", metavar="MODEL", help=argparse.SUPPRESS)
    known = parser.parse_args()
    if known.serve:
        serve(known)
        return
    checkouts = {"new": HERE} | ({"old": known.against.resolve()} if known.against else {})
    everything = {}
    for model in known.models:
        everything[model] = samples = in_turns(model, checkouts, known)
        for line in describe(model, samples):
            print(line, flush=True)
    if known.out:
        known.out.write_text(
            json.dumps({**{key: getattr(known, key) for key in SETTINGS}, "milliseconds": everything}, indent=1) + "\n"
        )


def in_turns(model: str, checkouts: dict[str, Path], known: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of every step of each checkout, by part."""
    workers = {name: Worker(model, path, known) for name, path in checkouts.items()}
    samples: dict[str, dict[str, list[float]]] = {name: {part: [] for part in PARTS} for name in workers}
    try:
        for _ in range(known.rounds):
            for name, worker in workers.items():
                for part, values in worker.turn(known.steps).items():
                    samples[name][part] += values
    finally:
        for worker in workers.values():
            worker.close()
    return samples


def describe(model: str, samples: dict[str, dict[str, list[float]]]) -> list[str]:
    """Fastest and median of each part and of the whole, and the shares of new in old."""
    lines, whole = [], {}
    for name, parts in samples.items():
        together = [sum(step) for step in zip(*parts.values(), strict=True)]
        whole[name] = together
        texts = [f"{part} {min(v):.1f} ({statistics.median(v):.1f})" for part, v in (parts | {"all": together}).items()]
        lines.append(f"{model} {name}: processor ms of {len(together)} steps, fastest (median): {', '.join(texts)}")
    if "old" in whole:
        fastest, median = (f(whole["new"]) / f(whole["old"]) for f in (min, statistics.median))
        lines.append(f"{model}: new / old {fastest:.2f} by the fastest, {median:.2f} by the median")
    return lines


class Worker:
    """A process that takes steps of one model in one checkout when it is told to."""

    def __init__(self, model: str, checkout: Path, known: argparse.Namespace) -> None:
        command = [sys.executable, str(Path(__file__).resolve()), "--serve", model]
        command += [text for key in SETTINGS for text in (f"--{key}", getattr(known, key))]
        command += ["--profile"] if known.profile else []
        environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            command, cwd=checkout, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._read()  # it is warm

    def turn(self, steps: int) -> dict[str, list[float]]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"a worker ended with code {self._process.wait()}")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


# --- the process that takes the steps, in whatever checkout it stands


def module_of(now: str, once: str) -> Any:
    """Module ``now`` of `mirl.engine`, which was ``once`` below `engine` before there was a package of the name mirl.

    Told by the files: an installed mirl would answer to an old checkout too.
    """
    found = importlib.import_module(f"mirl.engine.{now}" if Path("mirl/__init__.py").exists() else f"engine.{once}")
    assert Path(str(found.__file__)).is_relative_to(Path.cwd()), f"{found.__file__} is of another checkout"
    return found


def serve(known: argparse.Namespace) -> None:
    """Take as many steps as each line of stdin says, and print their processor times as a line of JSON."""
    step = build(known.serve, known.compile, known.precision, known.attention)
    for _ in range(WARM_UP):
        step()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        times = [step() for _ in range(int(line))]
        print(json.dumps({part: [1e3 * t[i] for t in times] for i, part in enumerate(PARTS)}), flush=True)
    if known.profile:
        import cProfile
        import pstats

        profile = cProfile.Profile()
        profile.enable()
        for _ in range(5):
            step()
        profile.disable()
        pstats.Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats(45)


def config_of(name: str) -> Any:
    """The model's configuration, of a recipe where no model has the ``name``."""
    models = module_of("models", "models")
    if name in models.MODEL_NAMES:
        return models.model_config(name)
    return module_of("pretraining.recipes", "recipes").recipe(name).model


def build(name: str, backend: str, precision: str, attention: str) -> Any:
    """A function that takes one step and returns the processor seconds of its parts."""
    import torch

    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        # Each step of an optimiser asks this twice, and without a GPU the answer is a search for a driver's library.
        torch.cuda.is_available = lambda: False
    models = module_of("models", "models")
    launch = module_of("distributed.launch", "launch")
    configs = module_of("configuration.config", "config")
    ds_config = module_of("distributed.ds_config", "ds_config")
    optimizers = module_of("training.optimizer", "optimizer")
    engines = module_of("distributed.ds_engine", "ds_engine")
    ranks = launch.join()
    device = torch.device("cpu") if ranks is None else ranks.device
    config = dataclasses.replace(config_of(name), **NARROW, attention=attention)
    settings = configs.PretrainConfig(
        recipe="bench", model=config, data=configs.DataConfig(),
        optim=configs.OptimConfig(batch_size=IMAGES, steps=1), run=configs.RunConfig(precision=precision),
    )  # fmt: skip
    values = ds_config.resolve_ds_config(
        ds_config.read_ds_config("zero2"), settings, micro_batch=IMAGES, accumulation=1, precision=precision,
        device=device,
    )  # fmt: skip
    torch.manual_seed(0)
    model = models.MIRL(config)
    model.set_execution(models.Execution.for_device(device))
    engine = engines.TrainEngine(model, optimizers.build_optimizer(model, settings.optim, device), values)
    if backend != "none":
        compiling = module_of("training.compiling", "compiling")
        choice = compiling.compile_regions(engine.module, IMAGES, device, backend=backend)
        print(choice, file=sys.stderr, flush=True)
        assert choice.on, choice
    images = torch.randint(0, 256, (IMAGES, 64, 64, 3), dtype=torch.uint8)
    noise = torch.rand(IMAGES, config.num_patches)

    def step() -> tuple[float, float, float]:
        begin = time.process_time()
        loss = engine.forward(images, noise=noise).loss
        forward = time.process_time()
        engine.backward(loss)
        backward = time.process_time()
        engine.step(1e-4)
        return forward - begin, backward - forward, time.process_time() - backward

    return step


if __name__ == "__main__":
    main()
