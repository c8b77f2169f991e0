"""One training step, forward, backward and optimiser: the engine's model against the eager reference and others.

    python -m benchmarks.bench_step                             # the table of the design: four sizes, two variants
    python -m benchmarks.bench_step --models vit_b_48 --batch 256 --precision bf16

All contestants (benchmarks/contestants.py) of a case run in one process on one device on the same batch, taking turns
step by step, so that what else happens on the machine meets all of them. Every figure is a median over rounds. Before a
case is timed, the loss of every contestant is compared with that of the eager reference.

MFU counts the FLOPs that are left after the exact skips (engine/accounting/flops.py); plain MFU those of the full model
of the variant. Both are over the data-sheet peak of the GPU; on a CPU over a large matrix product in the same dtype and
threads, timed just before. The results are on disk after each case. On a CPU the processor time of the process is kept
beside the wall time: on a machine shared with others it is the steadier of the two (set OMP_WAIT_POLICY=PASSIVE, or
waiting threads count as work).
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.breakdown import profile_step
from benchmarks.contestants import NAMES, ON_REQUEST, PRECISIONS, Contestant, MasterAdamW, make_contestants
from benchmarks.measure import device
from benchmarks.report import Results
from mirl.engine.accounting.flops import training_flops_per_image
from mirl.engine.configuration.config import OptimConfig
from mirl.engine.models import MODEL_NAMES, ModelConfig, model_config
from mirl.engine.models.config import VARIANTS
from mirl.engine.training.run_log import peak_flops

RESULTS = Path(__file__).resolve().parent / "results"
# Of the loss, relative to the eager reference. bfloat16 keeps 8 bits, and the reference rounds its loss to them too.
AGREEMENT = {"fp32": 1e-4, "bf16": 2e-2, "autocast": 2e-2}


@dataclass(frozen=True)
class _Step:
    """``run`` is timed, ``prepare`` before it is not."""

    prepare: Callable[[], None]
    run: Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class StepCase:
    """``rounds`` timed steps of each contestant after ``warmup`` ones."""

    config: ModelConfig
    batch: int
    precision: str
    contestants: tuple[str, ...] = NAMES
    rounds: int = 10
    warmup: int = 2
    profile: bool = True

    @property
    def name(self) -> str:
        return f"step {self.config.name} {self.config.variant} {self.config.objective}"


def measure_case(case: StepCase, place: torch.device, peak: tuple[float, str] | None) -> dict[str, Any]:
    """The case as an entry of ``cases`` in the results; benchmarks/README.md has the keys.

    Raises RuntimeError if a contestant's loss differs from that of the eager reference: its time would mean nothing.
    """
    model, contestants, left_out = make_contestants(case.config, case.contestants, case.batch, place, case.precision)
    images, noise = _inputs(case, place)
    shared = MasterAdamW(model, OptimConfig(steps=1), place)
    steps: dict[str, _Step] = {}
    for contestant in contestants:
        theirs = getattr(contestant.loss, "model", None)
        optimizer = shared if theirs is None else MasterAdamW(theirs, OptimConfig(steps=1), place)
        run = _step_of(contestant, optimizer, images, noise, case.precision, place)
        steps[contestant.name] = _Step(contestant.prepare, run)
    _check_losses(contestants, images, noise, case, place)
    times: dict[str, list[float]] = {name: [] for name in steps}
    processor_times: dict[str, list[float]] = {name: [] for name in steps}
    peaks = {name: _peak_gib(step, case.warmup, place) for name, step in steps.items()}
    for _ in range(case.rounds):
        for name, step in steps.items():
            step.prepare()  # a walk over all modules, which a run makes once
            before = time.process_time()
            times[name].append(_timed(step.run, place))
            processor_times[name].append(1e3 * (time.process_time() - before))
    medians = {name: statistics.median(values) for name, values in times.items()}
    # A whole engine where one runs; regions are compiled where that is the default, which on a CPU it is not.
    first_choice = ("engine_compiled", "engine", *(("ours_compiled",) if place.type == "cuda" else ()), "ours")
    mine = next(name for name in first_choice if name in medians)
    images_per_s = 1e3 * case.batch / medians[mine]
    plain = training_flops_per_image(case.config)
    flops = training_flops_per_image(case.config, model.skips)

    def mfu_percent(flops: float) -> float | None:
        return None if peak is None else round(100 * images_per_s * flops / peak[0], 2)

    def ratio(name: str) -> float | None:
        return round(medians[name] / medians[mine], 4) if name in medians else None

    row = {
        "name": case.name,
        "model": case.config.name,
        "variant": case.config.variant,
        "batch": case.batch,
        "images_per_s": round(images_per_s, 3),
        "mfu_percent": mfu_percent(flops),
        "plain_mfu_percent": mfu_percent(plain),
        "peak_memory_gib": peaks[mine],
        "ratio_eager_math": ratio("eager_math"),
        "ratio_eager_sdpa": ratio("eager_sdpa"),
        "ratio_compile": ratio("compile"),
        "ratio_mae": ratio("mae"),
        "host_ms": None,
        "device_ms": None,
        "breakdown_ms": None,
        "precision": case.precision,
        "measured_as": mine,
        "gflop_per_image": round(flops / 1e9, 2),
        "plain_gflop_per_image": round(plain / 1e9, 2),
        "peak_source": None if peak is None else peak[1],
        "threads": torch.get_num_threads() if place.type == "cpu" else None,
        "all": {
            name: {
                "ms": round(medians[name], 3),
                "spread_percent": round(_spread_percent(values), 1),
                "fastest_ms": round(min(values), 3),
                "processor_ms": round(statistics.median(processor_times[name]), 3),
                "peak_memory_gib": peaks[name],
            }
            for name, values in times.items()
        },
        "left_out": left_out,
    }
    if case.profile:
        steps[mine].prepare()
        row |= profile_step(steps[mine].run, place)
    return row


def _inputs(case: StepCase, place: torch.device) -> tuple[Tensor, Tensor]:
    config, generator = case.config, torch.Generator().manual_seed(0)
    shape = (case.batch, config.image_height, config.image_width, config.channels)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return images.to(place), torch.rand(case.batch, config.num_patches, generator=generator).to(place)


def _autocast(precision: str, place: torch.device) -> Any:
    return torch.autocast(place.type, torch.bfloat16) if precision == "autocast" else contextlib.nullcontext()


def _step_of(
    contestant: Contestant, optimizer: MasterAdamW, images: Tensor, noise: Tensor, precision: str, place: torch.device
) -> Callable[[], None]:
    if contestant.step is not None:
        return partial(contestant.step, images, noise)

    def step() -> None:
        with _autocast(precision, place):
            loss = contestant.loss(images, noise)
        loss.backward()
        optimizer.step()

    return step


def _check_losses(
    contestants: Sequence[Contestant], images: Tensor, noise: Tensor, case: StepCase, place: torch.device
) -> None:
    losses: dict[str, float] = {}
    for contestant in contestants:
        contestant.prepare()
        with _autocast(case.precision, place):
            losses[contestant.name] = float(contestant.loss(images, noise).detach())
    reference = next((losses[name] for name in ("eager_math", "eager_sdpa") if name in losses), None)
    for name, loss in losses.items():
        # Hugging Face's model has weights of its own.
        if reference is None or name == "mae":
            continue
        if not abs(loss - reference) <= AGREEMENT[case.precision] * abs(reference):
            raise RuntimeError(f"{case.name}: the loss of {name} is {loss:.6f}, that of the reference {reference:.6f}")


def _timed(step: Callable[[], None], place: torch.device) -> float:
    """Wall time of one step in milliseconds, the device idle before and after."""
    if place.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    step()
    if place.type == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started)


def _peak_gib(step: _Step, warmup: int, place: torch.device) -> float | None:
    """torch's peak over one step after the warm-up, parameters and optimiser included; None on a CPU."""
    step.prepare()
    for _ in range(max(1, warmup)):
        step.run()
    if place.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step.run()
    torch.cuda.synchronize()
    return round(torch.cuda.max_memory_allocated() / 2**30, 3)


def _spread_percent(values: Sequence[float]) -> float:
    """Interquartile range relative to the median."""
    if len(values) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4)
    return 100 * (high - low) / middle


def find_peak(place: torch.device, precision: str) -> tuple[float, str] | None:
    """FLOP/s to quote utilisation on, and where the figure is from; None where there is none."""
    if place.type == "cuda":
        flops = peak_flops(place) if precision != "fp32" else None
        return None if flops is None else (flops, "data sheet, bf16 dense")
    dtype, size = torch.float32 if precision == "fp32" else torch.bfloat16, 1536
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    fastest = min(_timed(lambda: a @ b, place) for _ in range(6))
    return 2 * size**3 / fastest * 1e3, f"measured {size} x {size} matrix product, {dtype}"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    on_gpu = device().type == "cuda"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = ["vit_b", "vit_b_24", "vit_s_54", "vit_b_48"] if on_gpu else ["vit_b"]
    parser.add_argument("--models", nargs="+", choices=MODEL_NAMES, default=models)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS) if on_gpu else ["paper"])
    parser.add_argument("--batch", nargs="+", type=int, default=[64, 256] if on_gpu else [8])
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=["bf16"] if on_gpu else ["fp32"])
    parser.add_argument(
        "--contestants",
        nargs="+",
        choices=NAMES + ON_REQUEST,
        default=None,
        help="default: all but engine; compile: GPU only",
    )
    parser.add_argument("--no-mae", action="store_true", help="leave out the MAE of size vit_b against Hugging Face's")
    parser.add_argument("--rounds", type=int, default=10 if on_gpu else 5)
    parser.add_argument("--warmup", type=int, default=3 if on_gpu else 1)
    parser.add_argument("--seconds", type=float, default=0, help="start no further case after this time; 0: no limit")
    parser.add_argument("--threads", type=int, default=0, help="of torch on a CPU; 0: torch's own choice")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--label", default="step", help="written DEVICE_DATE_LABEL.json and .md")
    return parser.parse_args(argv)


def cases(options: argparse.Namespace) -> list[StepCase]:
    """The largest model last: if time runs out, what is missing is one model and not the comparison."""
    chosen = options.contestants or (NAMES if device().type == "cuda" else ("ours", "eager_math", "eager_sdpa"))
    found = [
        StepCase(
            config=model_config(name, variant=variant), batch=batch, precision=precision,
            contestants=tuple(n for n in chosen if n != "mae"), rounds=options.rounds, warmup=options.warmup,
        )
        for batch in options.batch for name in options.models for variant in options.variants
        for precision in options.precision
    ]  # fmt: skip
    if not options.no_mae and "vit_b" in options.models:
        mae = model_config("vit_b", objective="mae")
        found += [
            StepCase(
                config=mae, batch=batch, precision=precision, contestants=(*(n for n in chosen if n != "mae"), "mae"),
                rounds=options.rounds, warmup=options.warmup,
            )
            for batch in options.batch for precision in options.precision
        ]  # fmt: skip
    return found


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    place, results, started, failed, when = device(), Results(), time.monotonic(), 0, datetime.now(UTC)
    results.keep(options.out, when, options.label)
    for case in cases(options):
        label = f"{case.name} batch {case.batch} {case.precision}"
        if options.seconds and time.monotonic() - started > options.seconds:
            print(f"{label}: not started, {options.seconds:g} s are over", flush=True)
            continue
        try:
            results.add_step(measure_case(case, place, find_peak(place, case.precision)))
            print(results.step_line(-1), flush=True)
        except (RuntimeError, ValueError) as error:  # out of memory, or a wrong result: the other cases go on
            failed += 1
            print(f"{label}: FAILED, {type(error).__name__}: {error}", flush=True)
        torch._dynamo.reset()
        gc.collect()
        if place.type == "cuda":
            torch.cuda.empty_cache()
    if not results.empty:
        for path in results.write(options.out, when, label=options.label):
            print(f"wrote {path}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
