"""`mirl evaluate` prints these lines, and writes tables and a picture of which class is taken for which."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from mirl.engine.checkpoints.best import NAMES as WEIGHTS
from mirl.engine.checkpoints.files import aside

SHOWN = 30  # classes in the lines on the terminal; if there are more, the worst
NUMBERED = 25  # classes whose counts are legible in the picture
COLUMNS = ("images", "correct", "correct_in_5", "predicted", "recall_percent", "precision_percent")


def tell(report: dict[str, Any]) -> list[str]:
    """Return the lines for the terminal. By class they show the last of the evaluated weights."""
    lines = [
        f"checkpoint {report['chosen']}",
        f"{report['images']} images evaluated ({report['data']}), {len(report['classes'])} classes, fp32; crop: "
        f"{report['crop']}",
    ]
    for weights, found in report["weights"].items():
        lines.append(
            f"{weights:<4}  top-1 {found['top1_percent']:6.2f} %  top-5 {found['top5_percent']:6.2f} %  loss "
            f"{found['loss']:.4f}  ({WEIGHTS[weights]})"
        )
    weights, found = list(report["weights"].items())[-1]
    by_class = sorted(found["by_class"].items(), key=lambda item: _or_100(item[1]["recall_percent"]))
    kept = by_class[:SHOWN]
    width = max(len(name) for name, _ in kept)
    chosen = f", the {SHOWN} worst of {len(by_class)}" if len(by_class) > SHOWN else ", the worst first"
    lines.append(f"by class ({weights}{chosen}):")
    lines.append(f"  {'class':<{width}}  recall %  found / images  precision %  right / named so  most often taken for")
    names = report["classes"]
    for name, values in kept:
        row = found["confusion"][names.index(name)]
        others = [(count, other) for other, count in zip(names, row, strict=True) if other != name and count]
        taken = "{1} ({0})".format(*max(others, key=lambda pair: pair[0])) if others else "-"
        lines.append(
            f"  {name:<{width}}  {_percent(values['recall_percent']):>8}  {values['correct']:>5} / "
            f"{values['images']:<6}  {_percent(values['precision_percent']):>11}  {values['correct']:>6} / "
            f"{values['predicted']:<7}  {taken}"
        )
    if report["broken"]:
        lines.append(f"left out: {len(report['broken'])} broken images, the first {report['broken'][0]}")
    return lines


def write_report(report: dict[str, Any], out: Path) -> list[Path]:
    """Make folder ``out``, whole or not at all; return its files. UserError if it exists."""
    with aside(out) as folder:
        folder.mkdir()
        (folder / "evaluation.json").write_text(json.dumps(report, indent=1) + "\n")
        for weights, found in report["weights"].items():
            _write_csv(
                folder / f"by_class-{weights}.csv",
                [
                    ["class", *COLUMNS],
                    *([name, *map(values.get, COLUMNS)] for name, values in found["by_class"].items()),
                ],
            )
            rows = zip(report["classes"], found["confusion"], strict=True)
            _write_csv(
                folder / f"confusion-{weights}.csv",
                [["class \\ taken for", *report["classes"]], *([name, *row] for name, row in rows)],
            )
            title = f"{WEIGHTS[weights]}: top-1 {found['top1_percent']:.2f} % of {report['images']} images"
            draw_confusion(folder / f"confusion-{weights}.png", report["classes"], found["confusion"], title)
    return sorted(out.iterdir())


def draw_confusion(path: Path, names: list[str], confusion: list[list[int]], title: str) -> None:
    """Draw a square for each pair of classes: its blue is the share of the row's images, its number their count."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shares = [[count / max(1, sum(row)) for count in row] for row in confusion]
    side = min(16.0, max(4.0, 2.0 + 0.45 * len(names)))
    figure, axis = pyplot.subplots(figsize=(side + 0.8, side))
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axis, label="share of the images of the class", shrink=0.8)
    if len(names) <= 4 * NUMBERED:
        axis.set_xticks(range(len(names)), names, rotation=90, fontsize=8 if len(names) <= NUMBERED else 4)
        axis.set_yticks(range(len(names)), names, fontsize=8 if len(names) <= NUMBERED else 4)
    if len(names) <= NUMBERED:
        for label, row in enumerate(confusion):
            for taken, count in enumerate(row):
                if count:
                    colour = "white" if shares[label][taken] > 0.5 else "black"
                    axis.text(taken, label, str(count), ha="center", va="center", fontsize=7, color=colour)
    axis.set_xlabel("taken for")
    axis.set_ylabel("class")
    axis.set_title(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _write_csv(path: Path, rows: list[list[Any]]) -> None:
    with path.open("w", newline="") as stream:
        csv.writer(stream, lineterminator="\n").writerows(rows)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _or_100(value: float | None) -> float:
    """Return the sorting key of a recall: a class without images is no bad one."""
    return 101.0 if value is None else value
