"""`mirl depth-report` draws this picture: a panel for each measurement, its noise a band, segments by number."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

TITLES = {
    "gradient_norm": ("gradient norm of the pre-training loss", "block"),
    "probe_top1_percent": ("linear probe, top-1 %", "block"),
    "reinit_top1_percent": ("fine-tuned, top-1 %", "first fresh block (the depth: none)"),
}


def noise_of_accuracies(percent: float, images: int) -> float:
    """Return the points by which two accuracies near ``percent``, each on ``images`` images, may differ by chance.

    They are two standard errors of the difference; the effect of the seed comes on top.
    """
    return 2 * (2 * percent * (100 - percent) / images) ** 0.5


def bands(report: dict[str, Any], name: str) -> tuple[Sequence[float], Sequence[float], str] | None:
    """Return lower and upper end of the noise at each point of panel ``name``, and its name; None if it is unknown.

    A gradient's norm contains its sampling error, so the band goes down to the norm without it. An accuracy has two
    standard errors of a share of ``val_images``.
    """
    if name == "gradient_norm":
        noises = report.get("gradient_noise")
        if noises is None:
            return None
        norms = report[name]
        lower = [max(0.0, norm**2 - noise**2) ** 0.5 for norm, noise in zip(norms, noises, strict=True)]
        return lower, norms, f"without the noise of {report['gradient_images']} images"
    values = _points(report[name])[1]
    errors = [2 * (value * (100 - value) / report["val_images"]) ** 0.5 for value in values]
    lower = [value - error for value, error in zip(values, errors, strict=True)]
    upper = [value + error for value, error in zip(values, errors, strict=True)]
    return lower, upper, f"two standard errors on {report['val_images']} images"


def draw(report: dict[str, Any], path: Path) -> bool:
    """Write the panels that ``report`` has to ``path``, a PNG; return False if it has none."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [name for name in TITLES if name in report]
    if not panels:
        return False
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.8 * len(panels), 3.8), squeeze=False)
    for axis, name in zip(axes[0], panels, strict=True):
        points, values = _points(report[name])
        if name == "gradient_norm":
            axis.set_yscale("log")
        (line,) = axis.plot(points, values, marker="o", markersize=3)
        band = bands(report, name)
        if band is not None:
            lower, upper, what = band
            axis.fill_between(points, lower, upper, color=line.get_color(), alpha=0.2, linewidth=0, label=what)
        if name == "reinit_top1_percent":
            whole = values[-1]
            noise = noise_of_accuracies(whole, report["val_images"])
            axis.axhspan(
                whole - noise,
                whole + noise,
                color="grey",
                alpha=0.12,
                linewidth=0,
                label=f"less than {noise:.1f} points from the whole",
            )
        if band is not None:
            axis.legend(fontsize=7, loc="lower center", framealpha=0.8)
        axis.set_title(TITLES[name][0], fontsize=10, pad=16)
        axis.set_xlabel(TITLES[name][1])
        axis.grid(alpha=0.3)
        _name_segments(axis, report["depth"], report["segments"], crowded=report["segments"] > 8)
    figure.suptitle(f"{report['model']}, {report['objective']}, depth {report['depth']}", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def _points(values: Any) -> tuple[list[int], list[float]]:
    """Return blocks and values of a list by block, or of a mapping from block to value."""
    if isinstance(values, dict):
        return [int(key) for key in values], list(values.values())
    return list(range(len(values))), list(values)


def _name_segments(axis: Any, depth: int, segments: int, *, crowded: bool) -> None:
    """Draw a line between segments, and each one's number above the panel."""
    size = depth // segments
    for number in range(segments):
        if number:
            axis.axvline(number * size - 0.5, color="grey", linewidth=0.6, linestyle=":")
        text = f"{number + 1}" if crowded else f"segment {number + 1}"
        centre = number * size + (size - 1) / 2
        axis.text(
            centre, 1.01, text, fontsize=6 if crowded else 7, color="grey", ha="center", va="bottom",
            transform=axis.get_xaxis_transform(),
        )  # fmt: skip
