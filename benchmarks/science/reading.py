"""From records to a table, to paired comparisons with their spread, and to a picture.

The rule of reading: runs of one seed are a pair, and a difference counts where its mean lies outside of the 95 %
interval of Student's t; anything less is called undecided. One in twenty comparisons of nothing passes it, and a table
holds more than a dozen.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

# Two-sided, by degrees of freedom; more than nine are taken for nine.
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
Key = tuple[str, int, int]  # method, labels, fresh blocks


def by_setting(records: list[dict[str, Any]]) -> dict[Key, dict[int, float]]:
    """{(method, labels, fresh blocks): {seed: top-1 in per cent}}."""
    found: dict[Key, dict[int, float]] = defaultdict(dict)
    for record in records:
        found[record["method"], record["labels"], record["fresh_blocks"]][record["seed"]] = record["top1_percent"]
    return dict(found)


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and standard error of the mean; the error of a single value is not known: infinity."""
    if len(values) < 2:
        return values[0], float("inf")
    return statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5


def difference(found: dict[Key, dict[int, float]], one: Key, other: Key) -> tuple[float, float]:
    """Mean and standard error of ``one`` minus ``other``, paired by seed."""
    seeds = sorted(set(found[one]) & set(found[other]))
    return mean_and_error([found[one][seed] - found[other][seed] for seed in seeds])


def verdict(mean: float, error: float, pairs: int) -> str:
    """``mean`` against its standard ``error`` over so many ``pairs``."""
    if pairs < 2 or abs(mean) <= T_95.get(pairs - 1, 2.262) * error:
        return "undecided"
    return "higher" if mean > 0 else "lower"


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: a line a method, mean +- standard deviation over the seeds."""
    found = by_setting(records)
    counts = sorted({labels for _, labels, _ in found})
    fresh = max(blocks for _, _, blocks in found)
    columns = [(labels, blocks) for labels in counts for blocks in (0, fresh)]
    names = [f"{labels} labels{f', last {blocks} blocks fresh' if blocks else ''}" for labels, blocks in columns]
    lines = ["| method | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    for method in dict.fromkeys(method for method, _, _ in found):
        cells = []
        for labels, blocks in columns:
            values = list(found.get((method, labels, blocks), {}).values())
            spread = f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.2f}{spread}" if values else "")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def comparisons(records: list[dict[str, Any]]) -> list[str]:
    """One line for each question that the paper answers."""
    found = by_setting(records)
    fresh = max(blocks for _, _, blocks in found)
    lines = []
    for labels in sorted({labels for _, labels, _ in found}):
        asked = [
            (f"Fig. 2, {method}: last {fresh} blocks fresh against as pre-trained", (method, labels, fresh),
             (method, labels, 0))
            for method in dict.fromkeys(method for method, _, _ in found)
        ]  # fmt: skip
        asked += [
            ("Table 2c: MIRL with DID against without", ("mirl", labels, 0), ("mirl_without_did", labels, 0)),
            ("Table 2d: MIRL against multi-decoder", ("mirl", labels, 0), ("multi_decoder", labels, 0)),
            ("MIRL against MAE", ("mirl", labels, 0), ("mae", labels, 0)),
            ("MAE against no pre-training", ("mae", labels, 0), ("scratch", labels, 0)),
        ]
        for name, one, other in asked:
            if one in found and other in found and set(found[one]) & set(found[other]):
                mean, error = difference(found, one, other)
                said = verdict(mean, error, len(set(found[one]) & set(found[other])))
                lines.append(f"{labels} labels, {name}: {mean:+.2f} +- {error:.2f} points, {said}")
    return lines


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Bars of every method, as pre-trained and with the last third afresh, a dot a seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = by_setting(records)
    counts = sorted({labels for _, labels, _ in found})
    fresh = max(blocks for _, _, blocks in found)
    methods = list(dict.fromkeys(method for method, _, _ in found))
    figure, axes = pyplot.subplots(1, len(counts), figsize=(5.5 * len(counts), 3.8), squeeze=False)
    for axis, labels in zip(axes[0], counts, strict=True):
        for offset, blocks, label in ((-0.2, 0, "as pre-trained"), (0.2, fresh, f"last {fresh} blocks fresh")):
            for place, method in enumerate(methods):
                values = list(found.get((method, labels, blocks), {}).values())
                if values:
                    color = "tab:blue" if blocks == 0 else "tab:orange"
                    axis.bar(
                        place + offset, statistics.fmean(values), 0.38, color=color, alpha=0.6,
                        label=label if place == 0 or blocks else None,
                    )  # fmt: skip
                    axis.plot([place + offset] * len(values), values, "k.", markersize=4)
        handles = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
        axis.legend(handles.values(), handles.keys(), fontsize=8, loc="upper right")
        axis.set_xticks(range(len(methods)), methods, rotation=20, fontsize=8)
        low = min(value for key, values in found.items() if key[1] == labels for value in values.values())
        axis.set_ylim(bottom=max(0, low - 3))
        axis.set_ylabel("test top-1 %")
        axis.set_title(f"fine-tuned on {labels} labels")
        axis.grid(alpha=0.3, axis="y")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
