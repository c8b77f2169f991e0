"""MAE, multi-decoder and MIRL pre-trained with equal compute on Fashion-MNIST, then fine-tuned on few labels.

    python -m benchmarks.science.run [--data FOLDER] [--scale reduced|full] [--seeds 3]

Without a GPU: the reduced scale, one process a core. With one: the full scale. Writes
RESULTS/DEVICE_DATE_science.json, .md and .png.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import re
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import commit, device_name, versions
from benchmarks.science.experiment import FRESH, FULL, METHODS, REDUCED, Scale, describe, run_unit
from benchmarks.science.fashion_mnist import DEFAULT_FOLDER, load
from benchmarks.science.reading import comparisons, draw, table

RESULTS = Path(__file__).resolve().parents[1] / "results"


def run(scale: Scale, *, folder: Path, seeds: int, device: str, workers: int) -> list[dict[str, Any]]:
    """Records of every method and seed, in the same order however many processes share the work."""
    units = [(method, seed) for seed in range(seeds) for method in (*METHODS, FRESH)]
    if device != "cpu":
        return [record for method, seed in units for record in run_unit(scale, method, seed, folder, device)]
    records: dict[tuple[str, int], list[dict[str, Any]]] = {}
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        jobs = {pool.submit(run_unit, scale, method, seed, folder, device): (method, seed) for method, seed in units}
        for job in as_completed(jobs):
            records[jobs[job]] = job.result()
            method, seed = jobs[job]
            shown = ", ".join(f"{r['labels']}/{r['fresh_blocks']}: {r['top1_percent']:.2f}" for r in records[jobs[job]])
            print(f"{method} seed {seed}  top-1 % by labels/fresh blocks  {shown}", flush=True)
    return [record for unit in units for record in records[unit]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEFAULT_FOLDER, help=f"folder of the IDX files [{DEFAULT_FOLDER}]")
    parser.add_argument("--scale", choices=("auto", "reduced", "full"), default="auto", help="auto: full on a GPU")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes without a GPU")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = arguments.scale if arguments.scale != "auto" else "full" if device == "cuda" else "reduced"
    scale = FULL if name == "full" else REDUCED
    load(arguments.data)  # a missing data set is told at once
    os.environ["OMP_NUM_THREADS"] = "1" if device == "cpu" else os.environ.get("OMP_NUM_THREADS", "8")
    started = time.perf_counter()
    records = run(scale, folder=arguments.data, seeds=arguments.seeds, device=device, workers=arguments.workers)
    minutes = (time.perf_counter() - started) / 60
    now = datetime.datetime.now(datetime.UTC)
    about = {"device": device_name(), "date": f"{now:%Y-%m-%dT%H:%M:%SZ}", "versions": versions(), "commit": commit()}
    stem = f"{re.sub(r'[^A-Za-z0-9]+', '-', device_name()).strip('-')}_{now:%Y-%m-%d}_science"
    result = about | {"scale": name, "settings": describe(scale), "minutes": minutes, "records": records}
    arguments.results.mkdir(parents=True, exist_ok=True)
    (arguments.results / f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n")
    title = f"{about['device']}, torch {about['versions']['torch']}, {about['date']}, commit {about['commit']}"
    text = "\n".join([title, "", table(records), "", *(f"- {line}" for line in comparisons(records))])
    (arguments.results / f"{stem}.md").write_text(text + "\n")
    draw(records, arguments.results / f"{stem}.png")
    print(f"{text}\n\n{minutes:.1f} minutes; wrote {arguments.results / stem}.json, .md and .png")


if __name__ == "__main__":
    main()
