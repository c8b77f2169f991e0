"""Write runs as one HTML page that needs nothing else: curves over each other, pictures by step, settings, events.

Every text that comes from a run is escaped. Curves are SVG, pictures JPEG inside of the page; the one script moves the
slider. The page can be printed.
"""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from mirl.dataloaders.sources.paths import shown
from mirl.engine.analysis.run_record import RunRecord, differences
from mirl.engine.version import __version__

MOST_PICTURES, PICTURE_WIDTH, QUALITY = 16, 1000, 85
MOST_EVENTS = 200
# These measurements only count, or the page tells them in another way.
NO_CURVE = frozenset(
    {"step", "images", "epoch", "seconds_left", "skipped_steps", "bad_images", "micro_batches", "val_images"}
)
FIRST = (
    "loss",
    "val_loss",
    "probe_top1_percent",
    "top1_percent",
    "gradient_norm",
    "lr",
    "images_per_s",
    "data_wait_percent",
    "step_ms",
    "memory_gib",
)
COLOURS = ("#1668a8", "#c2571a", "#3f8f3a", "#8a4fa3", "#a3872b", "#4a4a4a", "#c2417c", "#2a9d96")

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff; margin: 0 auto; max-width: 1100px;
  padding: 1rem; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
.note { color: #555; font-size: .9rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); gap: 1rem; }
figure { margin: 0; } figure svg, figure img { width: 100%; height: auto; display: block; }
figcaption { font-size: .85rem; color: #555; }
table { border-collapse: collapse; font-size: .85rem; } td, th { border-bottom: 1px solid #ddd; padding: .25rem .6rem;
  text-align: left; vertical-align: top; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
.figures td, .figures th { white-space: nowrap; overflow-wrap: normal; }
pre { font-size: .8rem; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; }
input[type=range] { width: 100%; } .key { display: inline-block; width: .8em; height: .8em; margin-right: .4em; }
@media print { body { max-width: none; } details > * { display: block; } input[type=range] { display: none; }
  figure, tr { break-inside: avoid; } }
"""
SCRIPT = """
for (const box of document.querySelectorAll("[data-slider]")) {
  const range = box.querySelector("input"), image = box.querySelector("img"), label = box.querySelector("output");
  const sources = JSON.parse(box.querySelector("script").textContent);
  const show = () => {
    image.src = sources[range.value].src; image.alt = label.textContent = "step " + sources[range.value].step;
  };
  range.addEventListener("input", show); show();
}
"""


def page(runs: Sequence[RunRecord], *, made: str) -> str:
    """Return the page of ``runs``, the first of which is compared with the others; ``made``: date and time, as text."""
    title = ", ".join(shown(run.name) for run in runs)
    parts = [
        "<!doctype html><html lang=en><head><meta charset=utf-8>",
        '<meta name=viewport content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1><p class=note>MIRL engine {__version__}, {escape(made)}</p>",
        _summary(runs), _curves(runs), _pictures(runs), _settings(runs), _data(runs), _depth(runs), _events(runs),
        f"<script>{SCRIPT}</script></body></html>",
    ]  # fmt: skip
    return "\n".join(part for part in parts if part)


def _summary(runs: Sequence[RunRecord]) -> str:
    rows = []
    for number, run in enumerate(runs):
        last = run.records[-1] if run.records else {}
        of = [("steps", last.get("step")), ("images", last.get("images")), ("loss", _last(run, "loss"))]
        of += [("top-1 %", _last(run, "top1_percent")), ("images/s", _median(run, "images_per_s"))]
        of += [("waited for data %", _median(run, "data_wait_percent")), ("memory GiB", _last(run, "memory_gib"))]
        rows.append((number, run, dict(of)))
    names = [name for name in rows[0][2] if any(values[name] is not None for _, _, values in rows)]
    head = "".join(f"<th>{escape(name)}</th>" for name in ("run", *names))
    body = "".join(
        f"<tr><td>{_key(number)}{escape(shown(run.name))}</td>"
        + "".join(f"<td>{_number(values[name])}</td>" for name in names)
        + "</tr>"
        for number, run, values in rows
    )
    note = "<p class=note>Last values; of images/s and waiting the median of all log lines but the first.</p>"
    return f"<div class='wide figures'><table><tr>{head}</tr>{body}</table></div>{note}"


def _curves(runs: Sequence[RunRecord]) -> str:
    keys = dict.fromkeys(key for run in runs for key in run.keys if key not in NO_CURVE)
    ordered = [*(key for key in FIRST if key in keys), *(key for key in keys if key not in FIRST)]
    figures = [_curve(key, runs) for key in ordered if any(len(run.series(key)[0]) > 1 for run in runs)]
    return f"<h2>Curves</h2><div class=grid>{''.join(figures)}</div>" if figures else ""


def _curve(key: str, runs: Sequence[RunRecord]) -> str:
    """Draw one measurement over the steps, a line a run, as SVG whose text stays text."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": key, "font.family": "sans-serif"}):
        figure = Figure(figsize=(4.4, 2.7))
        FigureCanvasSVG(figure)
        axis = figure.add_subplot()
        for number, run in enumerate(runs):
            axis.plot(*run.series(key), color=COLOURS[number % len(COLOURS)], linewidth=1.4)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        figure.tight_layout()
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None}, transparent=True)
    text = stream.getvalue()
    svg = text[text.index("<svg") :]
    return f"<figure><figcaption>{escape(key)}</figcaption>{svg}</figure>"


def _pictures(runs: Sequence[RunRecord]) -> str:
    boxes = []
    for number, run in enumerate(runs):
        steps = _spread(list(run.pictures))
        if not steps:
            continue
        sources = ",".join(f'{{"step":{step},"src":"{_embedded(run.pictures[step])}"}}' for step in steps)
        last = len(steps) - 1
        boxes.append(
            f"<figure data-slider><figcaption>{_key(number)}{escape(shown(run.name))}: <output></output></figcaption>"
            f'<input type=range min=0 max={last} value={last} aria-label="step of the picture"><img alt="">'
            f"<script type=application/json>[{sources}]</script></figure>"
        )
    note = "<p class=note>The slider goes through the steps of which there are pictures.</p>"
    return f"<h2>Pictures</h2>{note}{''.join(boxes)}" if boxes else ""


def _settings(runs: Sequence[RunRecord]) -> str:
    head = "<tr><th>setting</th>" + "".join(
        f"<th>{_key(i)}{escape(shown(run.name))}</th>" for i, run in enumerate(runs)
    )
    parts = ["<h2>Settings</h2>"]
    if len(runs) > 1:
        rows = _rows(differences(list(runs)))
        parts.append(f"<p>What differs:</p><div class=wide><table>{head}</tr>{rows}</table></div>")
    for run in runs:
        for step, before in run.history:
            changed = {name: [value] for name, value in before.items() if run.settings.get(name) != value}
            if changed:
                parts.append(f"<p>{escape(shown(run.name))} until step {step}:</p><table>{_rows(changed)}</table>")
    names = dict.fromkeys(name for run in runs for name in run.settings)
    every = _rows({name: [run.settings.get(name) for run in runs] for name in names})
    parts.append(
        f"<details><summary>All settings</summary><div class=wide><table>{head}</tr>{every}</table></div></details>"
    )
    return "".join(parts)


def _data(runs: Sequence[RunRecord]) -> str:
    parts = ["<h2>Data, machine and start</h2>"]
    for number, run in enumerate(runs):
        lines = "\n".join(run.opening)
        parts.append(f"<p>{_key(number)}{escape(shown(run.name))}</p><pre>{escape(shown_lines(lines))}</pre>")
    return "".join(parts) if any(run.opening for run in runs) else ""


def _depth(runs: Sequence[RunRecord]) -> str:
    figures = [
        f'<figure><img src={_embedded(run.depth_report)} alt="depth report"><figcaption>{escape(shown(run.name))}'
        "</figcaption></figure>"
        for run in runs
        if run.depth_report is not None
    ]
    return f"<h2>Depth</h2>{''.join(figures)}" if figures else ""


def _events(runs: Sequence[RunRecord]) -> str:
    parts = []
    for number, run in enumerate(runs):
        if not run.events:
            continue
        counts = Counter(str(event["event"]) for event in run.events)
        told = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
        rows = "".join(
            f"<tr><td>{event['step']}</td><td>{escape(str(event['event']))}</td><td>{escape(shown(_detail(event)))}</td></tr>"
            for event in run.events[-MOST_EVENTS:]
        )
        parts.append(
            f"<details><summary>{_key(number)}{escape(shown(run.name))}: {escape(told)}</summary>"
            f"<table><tr><th>step</th><th>event</th><th></th></tr>{rows}</table></details>"
        )
    return f"<h2>Events</h2>{''.join(parts)}" if parts else ""


def _rows(values: dict[str, list[Any]]) -> str:
    cells = {name: "".join(f"<td>{escape(shown(_text(value)))}</td>" for value in row) for name, row in values.items()}
    return "".join(f"<tr><td>{escape(shown(name))}</td>{row}</tr>" for name, row in cells.items())


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else "" if value is None else str(value)


def shown_lines(text: str) -> str:
    """Return each line as it may be shown; see `shown`."""
    return "\n".join(map(shown, text.splitlines()))


def _detail(event: dict[str, Any]) -> str:
    rest = {name: value for name, value in event.items() if name not in ("event", "step", "time")}
    return ", ".join(f"{name} {_text(value)}" for name, value in rest.items())


def _key(number: int) -> str:
    return f'<span class=key style="background:{COLOURS[number % len(COLOURS)]}"></span>'


def _last(run: RunRecord, key: str) -> float | None:
    values = run.series(key)[1]
    return values[-1] if values else None


def _median(run: RunRecord, key: str) -> float | None:
    values = sorted(run.series(key)[1][1:])
    return values[len(values) // 2] if values else None


def _number(value: Any) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _spread(steps: list[int]) -> list[int]:
    """Choose at most `MOST_PICTURES` of the steps, first and last among them."""
    if len(steps) <= MOST_PICTURES:
        return steps
    return [steps[round(i * (len(steps) - 1) / (MOST_PICTURES - 1))] for i in range(MOST_PICTURES)]


def _embedded(path: Path) -> str:
    """Return the picture as a data URL, no wider than `PICTURE_WIDTH`."""
    with Image.open(path) as image:
        image = image.convert("RGB")
        if image.width > PICTURE_WIDTH:
            image = image.resize((PICTURE_WIDTH, round(image.height * PICTURE_WIDTH / image.width)))
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
