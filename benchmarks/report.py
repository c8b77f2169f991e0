"""Results of one benchmark run as JSON, a Markdown table and a picture; the schema is in benchmarks/README.md."""

import json
import os
import re
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Timing, commit, device, device_name, versions


def gbps(moved: int, timing: Timing) -> float:
    return moved / timing.ms / 1e6


@dataclass
class _Kernel:
    name: str
    shape: str
    dtype: str
    bytes: int
    timings: dict[str, Timing] = field(default_factory=dict)

    def row(self) -> dict[str, Any] | None:
        """None until ours was measured; a ratio is None where its other side was not measured."""
        if "ours" not in self.timings:
            return None
        ours = self.timings["ours"]

        def times_ours(other: str) -> float | None:
            return round(self.timings[other].ms / ours.ms, 4) if other in self.timings else None

        clone = times_ours("clone")
        return {
            "name": self.name,
            "shape": self.shape,
            "dtype": self.dtype,
            "bytes": self.bytes,
            "ms": round(ours.ms, 6),
            "spread_percent": round(ours.spread_percent, 2),
            "gbps": round(gbps(self.bytes, ours), 2),
            "percent_of_clone": None if clone is None else round(100 * clone, 2),
            "ratio_eager": times_ours("eager"),
            "ratio_compile": times_ours("compile"),
            "all": {name: asdict(timing) for name, timing in self.timings.items()},
        }


class Results:
    """Filled by the benchmarks, case by case; `keep` has the JSON on disk after each, whatever ends the run."""

    def __init__(self) -> None:
        self._kept: tuple[Path, datetime, str] | None = None
        self._header: dict[str, Any] | None = None
        self._kernels: dict[tuple[str, str], _Kernel] = {}
        self._attention: list[dict[str, Any]] = []
        self._steps: list[dict[str, Any]] = []
        self._memory: list[dict[str, Any]] = []

    @property
    def empty(self) -> bool:
        return not (self._kernels or self._attention or self._steps or self._memory)

    def add_step(self, row: dict[str, Any]) -> None:
        """A case of `bench_step`, as it stands in the results."""
        self._steps.append(row)
        self._write_kept()

    def add_memory(self, row: dict[str, Any]) -> None:
        """A case of `bench_memory`, as it stands in the results."""
        self._memory.append(row)
        self._write_kept()

    def add_kernel(
        self, name: str, shape: str, dtype: torch.dtype, moved: int, implementation: str, timing: Timing
    ) -> None:
        kernel = self._kernels.setdefault((name, shape), _Kernel(name, shape, _short(dtype), moved))
        kernel.timings[implementation] = timing
        self._write_kept()

    def add_attention(
        self, queries: int, keys: int, head_dim: int, batch: int, dtype: torch.dtype, direction: str, backend: str,
        moved: int, timing: Timing,
    ) -> None:  # fmt: skip
        self._attention.append(
            {
                "queries": queries,
                "keys": keys,
                "head_dim": head_dim,
                "batch": batch,
                "dtype": _short(dtype),
                "direction": direction,
                "backend": backend,
                "ms": round(timing.ms, 6),
                "spread_percent": round(timing.spread_percent, 2),
                "gbps": round(gbps(moved, timing), 2),
            }
        )
        self._write_kept()

    def rows(self) -> list[dict[str, Any]]:
        return [row for kernel in self._kernels.values() if (row := kernel.row()) is not None]

    def as_json(self, when: datetime) -> dict[str, Any]:
        if self._header is None:
            self._header = {"versions": versions(), "commit": commit()}
        return {
            "device": device_name(),
            "device_type": device().type,
            "date": when.strftime("%Y-%m-%dT%H:%M:%SZ"),
            **self._header,
            "cases": self.rows() + self._steps,
            "attention": self._attention,
            "memory": self._memory,
        }

    def table(self) -> str:
        """Markdown: kernels, then attention with the fastest backend of each line in bold."""
        sections = [self._kernel_table(), self._attention_table(), self._step_table(), self._memory_table()]
        return "\n\n".join("\n".join(section) for section in sections if section)

    def _kernel_table(self) -> list[str]:
        if not self._kernels:
            return []
        lines = ["| kernel | shape | ms | spread | GB/s | of clone | eager / ours | compile / ours |", "|---" * 8 + "|"]
        for r in self.rows():
            clone = "-" if r["percent_of_clone"] is None else f"{r['percent_of_clone']:.0f} %"
            ratios = ["-" if r[key] is None else f"{r[key]:.2f}" for key in ("ratio_eager", "ratio_compile")]
            cells = [r["name"], r["shape"], f"{r['ms']:.4f}", f"{r['spread_percent']:.0f} %", f"{r['gbps']:.1f}", clone]
            lines.append(f"| {' | '.join(cells + ratios)} |")
        return lines

    def _step_table(self) -> list[str]:
        if not self._steps:
            return []
        head = "| step | batch | precision | images/s | MFU | plain MFU | peak GiB | eager math / ours | "
        head += "eager SDPA / ours | compile / ours | MAE / ours | host ms | device ms | spread |"
        lines = [head, "|---" * 14 + "|"]
        for row in self._steps:
            ratios = ("ratio_eager_math", "ratio_eager_sdpa", "ratio_compile", "ratio_mae")
            keys = ("mfu_percent", "plain_mfu_percent", "peak_memory_gib", *ratios, "host_ms", "device_ms")
            values = [row[key] for key in keys]
            cells = [row["name"].removeprefix("step "), str(row["batch"]), row["precision"]]
            cells.append(f"{row['images_per_s']:.2f}")
            cells += ["-" if value is None else f"{value:.2f}" for value in values]
            cells.append(f"{row['all'][row['measured_as']]['spread_percent']:.0f} %")
            lines.append(f"| {' | '.join(cells)} |")
        return lines

    def step_line(self, index: int) -> str:
        """One measured step in words."""
        row = self._steps[index]
        times = "  ".join(f"{name} {value['ms']:.1f} ms" for name, value in row["all"].items())
        notes = "".join(f"; no {name}: {reason}" for name, reason in row["left_out"].items())
        case = f"{row['name']} batch {row['batch']} {row['precision']}"
        return f"{case}: {row['images_per_s']:.2f} images/s  {times}{notes}"

    def _memory_table(self) -> list[str]:
        if not self._memory:
            return []
        lines = ["| memory | batch | depth | recompute | activations GiB | kind |", "|---" * 6 + "|"]
        for row in self._memory:
            cells = [row["model"], str(row["batch"]), str(row["depth"]), row["recompute"]]
            lines.append(f"| {' | '.join(cells)} | {row['activations_gib']:.4f} | {row['kind']} |")
        return lines

    def _attention_table(self) -> list[str]:
        if not self._attention:
            return []
        backends = list(dict.fromkeys(row["backend"] for row in self._attention))
        by_case: dict[tuple[Any, ...], dict[str, float]] = {}
        for row in self._attention:
            case = (row["direction"], f"{row['queries']} x {row['keys']}", row["head_dim"], row["batch"], row["dtype"])
            by_case.setdefault(case, {})[row["backend"]] = row["ms"]
        head = ["direction", "queries x keys", "head size", "batch", "dtype", *(f"{name} ms" for name in backends)]
        lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for case, measured in by_case.items():
            best = min(measured.values())
            cells = [f"{measured[b]:.4f}" if b in measured else "-" for b in backends]
            cells = [
                f"**{cell}**" if measured.get(b) == best else cell for b, cell in zip(backends, cells, strict=True)
            ]
            lines.append(f"| {' | '.join([*map(str, case), *cells])} |")
        return lines

    def keep(self, folder: Path, when: datetime, label: str = "") -> None:
        """From now on write the JSON of `write` after each case, whole or not at all."""
        self._kept = folder, when, label

    def _write_kept(self) -> None:
        if self._kept is not None:
            self._write_json(self.as_json(self._kept[1]), *self._kept)

    @staticmethod
    def _write_json(content: dict[str, Any], folder: Path, when: datetime, label: str) -> Path:
        """Returns the path without a suffix."""
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{re.sub(r'[^A-Za-z0-9]+', '-', device_name()).strip('-')}_{when:%Y-%m-%d}"
        stem = folder / (f"{name}_{label}" if label else name)
        unfinished = folder / f".{stem.name}.{os.getpid()}.tmp"
        unfinished.write_text(json.dumps(content, indent=1) + "\n")
        unfinished.replace(stem.with_suffix(".json"))
        return stem

    def write(self, folder: Path, when: datetime, label: str = "") -> list[Path]:
        """Write DEVICE_DATE[_LABEL].json, .md and, where matplotlib is installed, .png; returns what was written."""
        content = self.as_json(when)
        stem = self._write_json(content, folder, when, label)
        title = (
            f"{content['device']}, torch {content['versions']['torch']}, {content['date']}, commit {content['commit']}"
        )
        note = "" if content["device_type"] == "cuda" else "\nMeasures the plain-torch path of CPU users.\n"
        stem.with_suffix(".md").write_text(f"{title}\n{note}\n{self.table()}\n")
        written = [stem.with_suffix(".json"), stem.with_suffix(".md")]
        if picture(content, stem.with_suffix(".png")):
            written.append(stem.with_suffix(".png"))
        return written


def picture(content: dict[str, Any], path: Path) -> bool:
    """Bars of the share of a same-bytes clone that ours, torch.compile and eager reach. False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print('no picture: matplotlib is not installed (pip install "matplotlib>=3.9")')
        return False
    rows = [row for row in content["cases"] if "clone" in row["all"]]
    if not rows:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.45 * len(rows)), layout="constrained")
    implementations = ("eager", "compile", "ours")
    for place, name in enumerate(implementations):
        positions = [index + 0.27 * (1 - place) for index in range(len(rows))]
        shares = [100 * r["all"]["clone"]["ms"] / r["all"][name]["ms"] if name in r["all"] else 0 for r in rows]
        axes.barh(positions, shares, height=0.25, label=name)
    axes.axvline(100, color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), [f"{row['name']}  {row['shape']}" for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("percent of the bandwidth of a clone of the same bytes (higher is better)")
    axes.set_title(f"{content['device']} ({content['device_type']}), torch {content['versions']['torch']}", fontsize=10)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
