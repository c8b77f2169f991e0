"""Fig. 2 in parts that resume: MAE and MIRL with their last blocks as pre-trained and afresh, paired seed by seed.

    python -m benchmarks.science.run_fresh_blocks --scale cpu --seeds 8 --minutes 150
    python -m benchmarks.science.power RECORDS

Every unit, one method with one seed, is written to the records as it ends; the same command goes on where the last one
stopped. With --minutes none is begun that would not end in time, judged by the longest so far.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import CHECKOUT, commit, device_name, versions
from benchmarks.science.fresh_blocks import METHODS, NONE, SCALES, Scale, run_unit

RESULTS = Path(__file__).resolve().parents[1] / "results"
Unit = tuple[str, int]  # method, seed


def units(first_seed: int, seeds: int) -> list[Unit]:
    """All of one seed stand together: whenever a run is stopped, most seeds are pairs."""
    return [(method, seed) for seed in range(first_seed, first_seed + seeds) for method in (*METHODS, NONE)]


def open_records(path: Path, scale: str) -> dict[str, Any]:
    """What ``path`` holds, or a new file's content. ValueError if it was made with other settings."""
    settings = json.loads(json.dumps(dataclasses.asdict(SCALES[scale]) | {"methods": METHODS}))
    if not path.exists():
        about = {"device": device_name(), "versions": versions(), "commit": commit()}
        return about | {"scale": scale, "settings": settings, "records": []}
    found = json.loads(path.read_text())
    if found["settings"] != settings:
        raise ValueError(f"--records is {path}, made with other settings than scale {scale} has: give another file")
    return found


def write_records(path: Path, content: dict[str, Any]) -> None:
    """Replaces ``path`` by one rename: whoever ends the program leaves a whole file."""
    content["records"].sort(key=lambda record: (record["seed"], [*METHODS, NONE].index(record["method"])))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


def run(
    path: Path,
    scale_name: str,
    wanted: list[Unit],
    pool: Executor,
    *,
    device: str,
    workers: int,
    minutes: float,
    runner: Callable[[Scale, str, int, str], dict[str, Any]] = run_unit,
) -> int:
    """Make those of ``wanted`` that ``path`` lacks, as many as ``minutes`` allow; how many are still missing.

    pool: of as many ``workers``; each unit is ``runner(scale, method, seed, device)`` in one of them.
    """
    content, scale = open_records(path, scale_name), SCALES[scale_name]
    done = {(record["method"], record["seed"]) for record in content["records"]}
    waiting = [unit for unit in wanted if unit not in done]
    started, longest = time.monotonic(), 0.0
    running: dict[Future[dict[str, Any]], float] = {}
    while waiting or running:
        while waiting and len(running) < workers and time.monotonic() - started + longest < 60 * minutes:
            running[pool.submit(runner, scale, *waiting.pop(0), device)] = time.monotonic()
        if not running:
            break
        for job in wait(running, return_when=FIRST_COMPLETED).done:
            longest = max(longest, time.monotonic() - running.pop(job))
            ended = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H:%M:%SZ}"
            content["records"].append(job.result() | {"ended": ended})
            write_records(path, content)
            print(f"{ended}  {summary(scale, job.result())}", flush=True)
    return len(waiting)


def summary(scale: Scale, record: dict[str, Any]) -> str:
    """A line for the log: accuracies at the end of each fine-tuning, and how long the unit took."""
    ends = [f"{curve['fresh_blocks']}: {curve['top1_percent'][-1]:.2f}" for curve in record["finetune"]]
    probes = record["probe_top1_percent"]
    inside = (
        f"probe of block {scale.depth - scale.fresh}: {probes[-1 - scale.fresh]:.1f}, of the last: {probes[-1]:.1f}"
    )
    loss = f"loss {record['last_loss']:.4f}" if "last_loss" in record else "not pre-trained"
    return (
        f"{record['method']} seed {record['seed']}  {loss}  top-1 % by fresh blocks {', '.join(ends)}  {inside}  "
        f"{sum(record['seconds'].values()):.0f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--scale", choices=("auto", *SCALES), default="auto", help="auto: gpu on a GPU, else cpu")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--first-seed", type=int, default=0, help="a test takes seeds that no pilot had [0]")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing that would end later")
    parser.add_argument("--workers", type=int, help="processes [one a core; 4 on a GPU, which they share]")
    parser.add_argument("--records", type=Path, help="file to write and to go on with [RESULTS/DEVICE_SCALE...]")
    arguments = parser.parse_args()
    for name in ("seeds", "workers"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name} is {value}: give 1 or more")
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda and torch finds no GPU: give --device cpu")
    scale = arguments.scale if arguments.scale != "auto" else {"cuda": "gpu", "cpu": "cpu"}[device]
    workers = arguments.workers or (4 if device == "cuda" else len(os.sched_getaffinity(0)))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    name = re.sub(r"[^A-Za-z0-9]+", "-", device_name() if device == "cuda" else "cpu").strip("-")
    path = arguments.records or RESULTS / f"{name}_fresh-blocks-{scale}.json"
    wanted = units(arguments.first_seed, arguments.seeds)
    # mirl puts the checkout behind all else in the path, where another installation may have its own benchmarks/.
    sys.path.insert(0, str(CHECKOUT))
    try:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            missing = run(path, scale, wanted, pool, device=device, workers=workers, minutes=arguments.minutes)
    except ValueError as error:
        parser.error(str(error))
    said = f"; {missing} of {len(wanted)} units are missing: the same command goes on" if missing else ""
    print(f"records in {path}{said}")


if __name__ == "__main__":
    main()
