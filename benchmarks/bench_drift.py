"""Whether long runs agree, however they are computed: loss curves of whole runs with the same seeds.

    python -m benchmarks.bench_drift [--steps 4000] [--seeds 3] [--model tiny|vit_b_24] [--cases NAME ...] [--work DIR]

Each case is a run of `mirl pretrain` on the demo photographs, each seed a run of its own. A case is held against the
reference of its precision, seed by seed, by the mean loss of the last tenth of the steps: weights at the start, images
and masks are the same, so that only rounding differs. The spread of the seeds says how large a difference means
something.

Without a GPU two runs go on at a time, one thread each. A run that is done is not made again (``--work``), so that an
interrupted benchmark goes on. Writes RESULTS/DEVICE_DATE_drift.json, .md and .png.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import commit, device_name, versions
from mirl.dataloaders import prepare_demo

CHECKOUT = Path(__file__).resolve().parents[1]
RESULTS = CHECKOUT / "benchmarks" / "results"
MODELS = {
    # Some milliseconds a step on one core; 32 pixels of the photographs, 16 patches.
    "tiny": [
        "--image-size", "32", "--depth", "4", "--width", "48", "--heads", "2", "--segments", "2", "--batch-size", "16",
        "--decoder-width", "32", "--decoder-heads", "2", "--decoder-depth", "1",
    ],
    "vit_b_24": ["--model", "vit_b_24", "--image-size", "224", "--batch-size", "256", "--lr", "2e-4"],
}  # fmt: skip
COMMON = ["--pictures", "0", "--no-tensorboard", "--log-every", "1", "--keep-checkpoints", "1"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A way to compute the same training. against: the case that it is held against, none for a reference."""

    precision: str
    compiled: bool = False
    flat: bool = True
    against: str | None = None

    @property
    def flags(self) -> list[str]:
        """Those of `mirl pretrain`."""
        return [
            "--precision", self.precision, "--compile", "on" if self.compiled else "off",
            "--flat-gradients" if self.flat else "--no-flat-gradients",
        ]  # fmt: skip


CASES = {
    "fp32": Case(precision="fp32"),
    "fp32 regions": Case(precision="fp32", compiled=True, against="fp32"),
    "fp32 DeepSpeed gradients": Case(precision="fp32", flat=False, against="fp32"),
    "bf16": Case(precision="bf16", against="fp32"),
    "bf16 regions": Case(precision="bf16", compiled=True, against="bf16"),
    "bf16 DeepSpeed gradients": Case(precision="bf16", flat=False, against="bf16"),
}


def losses(case: str, seed: int, *, model: str, steps: int, work: Path) -> list[float]:
    """The loss of each step of the run of ``case`` with ``seed``; it is made first if ``work`` does not hold it."""
    out = work / f"{model}_{steps}_{re.sub('[^a-z0-9]+', '-', case.lower())}_{seed}"
    found = _read(out)
    if len(found) < steps:
        command = [sys.executable, "-m", "mirl.engine.pretrain", "--recipe", "tiny", *MODELS[model], *COMMON]
        command += ["--data", str(prepare_demo(many=True))]
        command += [*CASES[case].flags, "--seed", str(seed), "--steps", str(steps), "--warmup-steps", str(steps // 20)]
        # A fresh start: a resumed one would be right too, but would not be the run that a user sees.
        command += ["--checkpoint-every", str(steps), "--out", str(out)]
        shutil.rmtree(out, ignore_errors=True)
        threads = {} if torch.cuda.is_available() else {"OMP_NUM_THREADS": "1"}
        if threads:
            command += ["--cpu-threads", "1", "--loader-threads", "1"]
        done = subprocess.run(command, cwd=CHECKOUT, env=os.environ | threads, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{case}, seed {seed}: exit code {done.returncode}\n{done.stdout}{done.stderr}"[-3000:])
        found = _read(out)
    return [found[step] for step in range(1, steps + 1)]


def _read(out: Path) -> dict[int, float]:
    if not (out / "metrics.jsonl").exists():
        return {}
    records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def compare(curves: dict[str, list[list[float]]]) -> list[dict[str, Any]]:
    """A row for each case: final loss by seed, and its difference from the reference of the same seed.

    ``curves``: of each case, for each seed, the loss of each step.
    """
    rows: list[dict[str, Any]] = []
    final = {case: [statistics.mean(run[-max(1, len(run) // 10) :]) for run in runs] for case, runs in curves.items()}
    for case, values in final.items():
        row: dict[str, Any] = {
            "case": case, "final_loss": values,
            "spread_of_seeds": statistics.stdev(values) if len(values) > 1 else None,
        }  # fmt: skip
        against = CASES[case].against
        if against in final:
            differences = [value - other for value, other in zip(values, final[against], strict=True)]
            row |= {"against": against, "differences": differences, "mean_difference": statistics.mean(differences)}
            row["first_steps_difference"] = max(
                abs(run[step] - other[step])
                for run, other in zip(curves[case], curves[against], strict=True)
                for step in range(min(10, len(run)))
            )
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| case | final loss | spread of seeds | held against | mean difference | by seed | largest, first 10 steps |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        spread = "" if row["spread_of_seeds"] is None else f"{row['spread_of_seeds']:.5f}"
        cells = [row["case"], f"{statistics.mean(row['final_loss']):.5f}", spread]
        if "against" in row:
            by_seed = ", ".join(f"{value:+.5f}" for value in row["differences"])
            cells += [row["against"], f"{row['mean_difference']:+.5f}", by_seed, f"{row['first_steps_difference']:.1e}"]
        else:
            cells += [""] * 4
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(curves: dict[str, list[list[float]]], path: Path) -> None:
    """Curves above, differences from the reference of the same seed below; running means over a fortieth of the run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def smooth(values: list[float]) -> torch.Tensor:
        window = max(1, len(values) // 40)
        return torch.tensor(values, dtype=torch.float64).unfold(0, window, 1).mean(dim=1)

    figure, (above, below) = plt.subplots(2, 1, figsize=(9, 8), sharex=True, height_ratios=[1, 1], layout="constrained")
    seeds = torch.stack([smooth(run) for run in curves["fp32"]])
    steps = torch.arange(seeds.shape[1]) + max(1, len(curves["fp32"][0]) // 40)
    for index, (case, runs) in enumerate(curves.items()):
        smoothed = torch.stack([smooth(run) for run in runs])
        above.plot(steps, smoothed.mean(dim=0), color=f"C{index}", linewidth=1, label=case)
        against = CASES[case].against
        if against in curves:
            difference = smoothed - torch.stack([smooth(run) for run in curves[against]])
            below.plot(steps, difference.mean(dim=0), color=f"C{index}", linewidth=1, label=f"{case} - {against}")
            lowest, highest = difference.amin(dim=0), difference.amax(dim=0)
            below.fill_between(steps, lowest, highest, color=f"C{index}", alpha=0.15, linewidth=0)
    above.fill_between(steps, seeds.amin(dim=0), seeds.amax(dim=0), color="grey", alpha=0.3, label="fp32, all seeds")
    spread = (seeds - seeds.mean(dim=0)).abs().amax(dim=0)
    below.fill_between(steps, -spread, spread, color="grey", alpha=0.3, label="seeds about their mean", zorder=0)
    above.set(ylabel="loss", yscale="log", title=f"Loss, mean of {len(seeds)} seeds")
    below.set(ylabel="difference of losses", xlabel="step", title="Same seed, computed otherwise; bands: all seeds")
    above.legend(fontsize=8)
    below.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--model", choices=MODELS, default="vit_b_24" if on_gpu else "tiny")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--work", type=Path, default=CHECKOUT / "runs" / "drift", help="folder of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    parser.add_argument("--workers", type=int, default=1 if on_gpu else len(os.sched_getaffinity(0)))
    arguments = parser.parse_args(argv)
    cases = [name for name in CASES if name in {"fp32", *arguments.cases}]
    started = datetime.datetime.now()

    def run(unit: tuple[str, int]) -> list[float]:
        case, seed = unit
        found = losses(case, seed, model=arguments.model, steps=arguments.steps, work=arguments.work)
        print(f"{case}, seed {seed}: {statistics.mean(found[-max(1, len(found) // 10) :]):.5f}", flush=True)
        return found

    units = [(case, seed) for seed in range(arguments.seeds) for case in cases]
    with ThreadPoolExecutor(arguments.workers) as pool:
        found = dict(zip(units, pool.map(run, units), strict=True))
    curves = {case: [found[case, seed] for seed in range(arguments.seeds)] for case in cases}
    rows = compare(curves)
    record = {
        "device": device_name(), "date": started.isoformat(timespec="seconds"), "commit": commit(),
        "versions": versions(), "model": arguments.model, "flags": MODELS[arguments.model], "steps": arguments.steps,
        "seeds": arguments.seeds, "minutes": round((datetime.datetime.now() - started).total_seconds() / 60, 1),
        "rows": rows,
    }  # fmt: skip
    arguments.results.mkdir(parents=True, exist_ok=True)
    name = re.sub("[^A-Za-z0-9]+", "-", device_name()).strip("-")
    stem = arguments.results / f"{name}_{started.date()}_drift"
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    text = f"{device_name()}, commit {record['commit']}: {arguments.model}, {arguments.steps} steps, "
    stem.with_suffix(".md").write_text(f"{text}{arguments.seeds} seeds\n\n{table(rows)}")
    draw(curves, stem.with_suffix(".png"))
    print(table(rows) + f"\n{stem}.json, .md, .png")


if __name__ == "__main__":
    main()
