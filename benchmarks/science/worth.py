"""What the last blocks of a pre-trained encoder are worth: statistics of the records of Fig. 2, table and picture.

Above zero the blocks are worth something, at zero nothing, below they harm. Fig. 2 says at most zero of MAE and above
zero of MIRL; the question is the difference, MIRL minus MAE, paired by seed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.science.fresh_blocks import METHODS, NONE
from benchmarks.science.paired import Estimate, Parts, estimate, variance_parts

Record = dict[str, Any]
# In points of accuracy: MIRL over MAE, ViT-B, 300 epochs, in the paper's Table 3. An effect on one third of the blocks
# that is larger than the advance of the whole method is not to be expected.
PAPER_POINTS = 0.9
ASKED = ("mirl - mae", *METHODS)


def _curves(record: Record, read: Callable[[dict[str, Any]], float]) -> list[float]:
    """For each repeat, what ``read`` gives of the fine-tuning as pre-trained minus what it gives of the fresh one."""
    found = {(curve["repeat"], bool(curve["fresh_blocks"])): read(curve) for curve in record["finetune"]}
    return [found[repeat, False] - found[repeat, True] for repeat, fresh in sorted(found) if not fresh]


def _probe(record: Record, fresh: int) -> list[float]:
    probes = record["probe_top1_percent"]
    return [probes[-1] - probes[-1 - fresh]]


def _gradients(record: Record, fresh: int) -> list[float]:
    norms = record["gradient_norm"]
    return [statistics.fmean(map(math.log10, norms[-fresh:])) - statistics.fmean(map(math.log10, norms[:fresh]))]


@dataclass(frozen=True)
class Statistic:
    """of: one value a repeat, of a record and the number of fresh blocks. expected: the effect worth looking for."""

    name: str
    unit: str
    of: Callable[[Record, int], list[float]]
    expected: float | None = None


STATISTICS = (
    Statistic("fine-tuned, at the end", "points", lambda record, _: _curves(record, lambda c: c["top1_percent"][-1]),
              PAPER_POINTS),
    Statistic("fine-tuned, mean over the curve", "points",
              lambda record, _: _curves(record, lambda c: statistics.fmean(c["top1_percent"])), PAPER_POINTS),
    Statistic("fine-tuned, cross-entropy over the curve", "nats",
              lambda record, _: _curves(record, lambda c: -statistics.fmean(c["cross_entropy"]))),
    Statistic("probe, last block over the one before those", "points", _probe, PAPER_POINTS),
    Statistic("gradient norm, last third over first", "decades", _gradients),
)  # fmt: skip


def repeats_by_seed(records: list[Record], statistic: Statistic, fresh: int, asked: str) -> dict[int, list[float]]:
    """{seed: a value for each repeat} of a method, or of MIRL minus MAE for the seeds that both have."""
    found = {
        (record["method"], record["seed"]): statistic.of(record, fresh)
        for record in records
        if record["method"] != NONE
    }
    if asked in METHODS:
        return {seed: values for (method, seed), values in sorted(found.items()) if method == asked}
    return {
        seed: [mine - other for mine, other in zip(values, found["mae", seed], strict=True)]
        for (method, seed), values in sorted(found.items())
        if method == "mirl" and ("mae", seed) in found
    }


def read(records: list[Record], statistic: Statistic, fresh: int, asked: str) -> tuple[Estimate, Parts | None] | None:
    """The mean over seeds with its spread, and the parts of the spread; None without a seed."""
    repeats = repeats_by_seed(records, statistic, fresh, asked)
    if not repeats:
        return None
    return estimate([statistics.fmean(values) for values in repeats.values()]), variance_parts(list(repeats.values()))


def gain(records: list[Record], method: str) -> Estimate | None:
    """Points that ``method``, all blocks as pre-trained, has over no pre-training, mean over the curve, by seed."""
    kept = {
        (record["method"], record["seed"]): statistics.fmean(
            statistics.fmean(curve["top1_percent"]) for curve in record["finetune"] if not curve["fresh_blocks"]
        )
        for record in records
    }
    values = [
        value - kept[NONE, seed] for (name, seed), value in kept.items() if name == method and (NONE, seed) in kept
    ]
    return estimate(values) if values else None


def table(records: list[Record], fresh: int) -> str:
    """Markdown: a line for each statistic and each of `ASKED`."""
    lines = [
        "| what the last blocks are worth | of | mean, 95 % interval | deviation of a seed | seeds | verdict |",
        "|---|---|---|---|---|---|",
    ]
    asked = [
        (f"{statistic.name}, {statistic.unit}", of, read(records, statistic, fresh, of))
        for statistic in STATISTICS
        for of in ASKED
    ]
    estimates = [(name, of, found[0]) for name, of, found in asked if found is not None]
    gains = [("all blocks: over no pre-training, mean over the curve, points", of, gain(records, of)) for of in METHODS]
    estimates += [(name, of, one) for name, of, one in gains if one is not None]
    for name, of, one in estimates:
        spread = f"({one.low:+.3f} to {one.high:+.3f}) | {one.deviation:.3f}" if one.n > 1 else "(one seed) | "
        lines.append(f"| {name} | {of} | {one.mean:+.3f} {spread} | {one.n} | {one.verdict} |")
    return "\n".join(lines)


def draw(records: list[Record], fresh: int, path: Path) -> None:
    """Accuracy of a probe block by block, the fine-tuning curves, and what the last blocks are worth, seed by seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (probes, curves, worth) = pyplot.subplots(1, 3, figsize=(14, 3.8))
    colours = dict(zip((*METHODS, NONE), ("tab:blue", "tab:orange", "tab:grey"), strict=True))
    for method, colour in colours.items():
        own = [record for record in records if record["method"] == method]
        for number, record in enumerate(own):
            label = method if not number else None
            blocks = range(1, 1 + len(record["probe_top1_percent"]))
            probes.plot(blocks, record["probe_top1_percent"], color=colour, alpha=0.6, label=label)
        for style, fresh_blocks in (("-", 0), ("--", fresh)):
            found = [
                c["top1_percent"] for record in own for c in record["finetune"] if c["fresh_blocks"] == fresh_blocks
            ]
            if found:
                mean = [statistics.fmean(look) for look in zip(*found, strict=True)]
                label = f"{method}, last {fresh} fresh" if fresh_blocks else method
                curves.plot(range(1, 1 + len(mean)), mean, style, color=colour, label=label)
    for place, asked in enumerate(ASKED):
        values = [statistics.fmean(v) for v in repeats_by_seed(records, STATISTICS[1], fresh, asked).values()]
        if values:
            one = estimate(values)
            worth.plot([place] * len(values), values, "k.", alpha=0.5)
            error = one.half_width if math.isfinite(one.half_width) else 0
            worth.errorbar(place + 0.15, one.mean, error, fmt="o", color="tab:red", capsize=4)
    worth.margins(x=0.15)
    worth.axhline(0, color="grey", linewidth=0.8)
    worth.set_xticks(range(len(ASKED)), ASKED)
    worth.set_title(f"worth of the last {fresh} blocks over the curve, points; mean, 95 %", fontsize=9)
    probes.set_title("linear probe block by block, held-out top-1 %, a line a seed", fontsize=9)
    curves.set_title("fine-tuning, held-out top-1 %, mean over seeds", fontsize=9)
    curves.set_xlabel("look, of equal numbers of steps")
    curves.xaxis.get_major_locator().set_params(integer=True)
    probes.set_xlabel("block")
    for axis in (probes, curves):
        axis.legend(fontsize=8)
    for axis in (probes, curves, worth):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
