"""Losses, their terms and gradient norms of the first steps of whole runs: tiny models, fp32, one thread of a CPU."""

from __future__ import annotations

import hashlib
import os
import platform
import signal
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from PIL import Image
from skimage import data
from torchvision.models import vgg16

from mirl.dataloaders import prepare_demo
from tests.support.runs import TINY, records
from tests.support.started_ranks import RankServer

STEPS = 30
THREADS = ["--cpu-threads", "1", "--loader-threads", "1"]
# A whole recipe as it is, but for the precision, which depends on the machine.
# The record is older than heads that begin at zero.
HEADS = ["--head-init", "xavier"]
DEMO = [
    "--recipe", "tiny", *THREADS, *HEADS, "--precision", "fp32", "--log-every", "1", "--pictures", "0",
    "--no-tensorboard",
]  # fmt: skip
COMMON = [
    *TINY, *HEADS, "--cpu-threads", "1", "--pictures", "0", "--steps", str(STEPS), "--lr", "1e-3",
    "--warmup-steps", "5", "--checkpoint-every", str(STEPS),
]  # fmt: skip
SYSTEMS = {
    "mirl": [],
    "mirl_release": ["--variant", "release"],
    "mirl_without_did": ["--no-did"],
    "mirl_normalised_pixels_clipped": ["--norm-pix", "--clip-grad", "0.5"],
    "mirl_one_segment": ["--segments", "1"],
    "mirl_segment_a_block": ["--segments", "4", "--drop-path", "0.2"],
    "mae": ["--objective", "mae", "--segments", "1", "--no-did", "--decoder-depth", "2"],
    "truncated": ["--objective", "truncated", "--truncated-depth", "2", "--segments", "1", "--no-did"],
    "multi_decoder": ["--objective", "multi_decoder"],
    "coarse_to_fine": ["--objective", "coarse_to_fine"],
    "fine_to_coarse": ["--objective", "fine_to_coarse"],
    "feature_loss": ["--feature-loss", "0.5"],
    "vgg_loss": ["--vgg-loss", "0.1"],
}
FINETUNE = [
    *THREADS, "--precision", "fp32", "--log-every", "1", "--no-tensorboard", "--steps", str(STEPS), "--batch-size", "8",
    "--warmup-steps", "5", "--lr", "1e-3", "--drop-path", "0.1", "--ema", "0.99", "--eval-every", "0",
    # What the recipe scales to the length of a run, as it was when the figures were recorded.
    "--head-init", "random", "--rand-augment", "rand-m9-mstd0.5-inc1", "--random-erase", "0.25", "--mixup", "0.8",
    "--cutmix", "1", "--crop-scale", "0.2", "1", "--centre-crops", "0", "--label-smoothing",
    "0.1",
]  # fmt: skip

LIBRARIES = (
    "torch", "torchvision", "numpy", "nvidia-dali-cuda130", "deepspeed", "timm", "pillow", "scikit-image",
)  # fmt: skip
# By these a user makes a library compute with other instructions than it would choose.
SWITCHES = (
    "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA",
    "NPY_DISABLE_CPU_FEATURES", "OPENBLAS_CORETYPE",
)  # fmt: skip


def machine() -> dict[str, str]:
    """What bit-equal figures depend on: processor, vector unit and instructions in use, and the libraries.

    Virtual machines of one processor name differ in features and cache, by which MKL and oneDNN choose their code.
    """
    fields = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines())
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    found = {"processor": fields.get("model name", platform.machine())}
    found |= {key: fields.get(key, "") for key in ("cpu family", "model", "stepping", "cache size")}
    found["features"] = hashlib.sha256(fields.get("flags", "").encode()).hexdigest()
    found["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    found |= {name: os.environ[name] for name in SWITCHES if name in os.environ}
    return found | {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES}


def write_images(folder: Path) -> Path:
    """44 lossless crops of photographs in two classes, so that no JPEG decoder has a say."""
    pictures = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket()]
    for number in range(44):
        picture = Image.fromarray(pictures[number % 4])
        left, top = (number * 37) % (picture.width - 96), (number * 23) % (picture.height - 96)
        home = folder / ("fur", "things")[number % 4 in (0, 2)]
        home.mkdir(parents=True, exist_ok=True)
        picture.crop((left, top, left + 96, top + 96)).save(home / f"{number:03d}.png")
    return folder


def write_vgg(path: Path) -> Path:
    """A file as torchvision names its weights; random ones do for training."""
    torch.manual_seed(0)
    state = vgg16(weights=None).features.state_dict()
    torch.save({f"features.{key}": value for key, value in state.items()}, path)
    return path


def record_runs(folder: Path, say: Callable[[str], None] = print) -> dict[str, list[dict[str, float]]]:
    """For each run a record a step: loss, its terms and the gradient norm. ``folder`` is empty and stays full."""
    # On the CPU where there is a GPU too, and with demo photographs that the present Pillow makes.
    with mock.patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": "", "MIRL_CACHE": str(folder / "cache")}):
        server = RankServer()
    try:
        return _record_runs(server, folder, say)
    finally:
        server.close()


def _record_runs(server: RankServer, folder: Path, say: Callable[[str], None]) -> dict[str, list[dict[str, float]]]:
    images, vgg = write_images(folder / "images"), write_vgg(folder / "vgg16.pth")
    found = {"demo": _demo(server, folder)}
    for name, flags in SYSTEMS.items():
        weights = ["--vgg-weights", vgg] if name == "vgg_loss" else []
        found[name] = _run(server, folder, name, [*COMMON, "--data", images, *flags, *weights])
        say(f"{name}: loss {found[name][0]['loss']:.4f} ... {found[name][-1]['loss']:.4f}")
    two = [*COMMON, "--data", images, "--deepspeed_config", "zero2", "--micro-batch", "2"]
    found["two_ranks_zero2"] = _run(server, folder, "two_ranks_zero2", two, ranks=2)
    start = ["--checkpoint", folder / "mirl", "--data", images, "--val", images]
    found["finetune"] = _run(server, folder, "finetune", [*start, *FINETUNE], entry="finetune")
    return found


def _run(
    server: RankServer, folder: Path, name: str, arguments: list[Any], *, ranks: int = 1, entry: str = "pretrain"
) -> list[dict[str, float]]:
    run = server.start(folder, *arguments, "--out", name, ranks=ranks, entry=entry, tiny=False)
    codes = run.end(240)
    assert codes == [0] * ranks, run.output()[-3000:]
    return _figures(folder / name)


def _demo(server: RankServer, folder: Path) -> list[dict[str, float]]:
    """The first steps of the whole run, whose schedule is one of 600 steps; a signal ends it."""
    photographs = prepare_demo(folder / "cache", many=True)
    run = server.start(folder, *DEMO, "--data", photographs, "--out", "demo", ranks=1, tiny=False)
    deadline = time.monotonic() + 240
    while f"step {STEPS}/" not in " ".join(run.output().split()) and f"step  {STEPS}/" not in run.output():
        assert time.monotonic() < deadline and run.end(0) == [None], run.output()[-3000:]
        time.sleep(0.2)
    os.kill(run.pids[0], signal.SIGTERM)
    assert run.end(60) == [75], run.output()[-3000:]
    return _figures(folder / "demo")


def _figures(out: Path) -> list[dict[str, float]]:
    """One record a step; the last has the losses of an evaluation too, if there was one, of the weights and of their
    average. No counts of right answers: an image on the edge between two classes would change them beyond a tolerance.
    """
    steps = [record for record in records(out) if "loss" in record and "lr" in record][:STEPS]
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
    figures = [
        {key: value for key, value in record.items() if key.startswith("loss") or key in ("lr", "gradient_norm")}
        for record in steps
    ]
    for record in records(out):
        figures[-1] |= {key: record[key] for key in ("val_loss", "val_ema_loss") if key in record}
    return figures
