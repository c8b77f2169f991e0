"""`mirl export --to onnx|torch-export` writes an encoder or classifier as one graph that runs without this package.

The graph takes ``images`` float32 [B, C, H, W], (values in [0, 1] - mean) / std, for any B. A classifier gives
``logits`` [B, K], an encoder ``tokens`` [B, 1 + N, D], through the last norm, class token first, and ``features``
[B, D], pooled. The written file is run before it gets its name, and compared with the model that it was made from.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mirl.dataloaders.decoding.crops import evaluation_crop
from mirl.engine.checkpoints.files import aside
from mirl.engine.commands.export_formats import Exported, export_timm
from mirl.errors import UserError

# The largest difference of an output, relative to its largest number: float32 sums come in another order.
TOLERANCE = 1e-4
BATCHES = (1, 3)

ABOUT = "mirl.json"  # beside the graph in a .pt2 file
_LOAD = """
import sys, numpy, torch
graph = torch.export.load(sys.argv[1]).module()
for place in sys.argv[2:]:
    out = graph(torch.from_numpy(numpy.load(place)))
    numpy.savez(place + ".out.npz", *[x.detach().numpy() for x in (out if isinstance(out, tuple) else (out,))])
"""


class Graph(nn.Module):
    """The graph is timm's model with the outputs of the text above."""

    def __init__(self, model: Any, *, classifier: bool) -> None:
        super().__init__()
        self.model, self.classifier = model, classifier

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if self.classifier:
            return self.model(images)
        tokens = self.model.forward_features(images)
        return tokens, self.model.forward_head(tokens, pre_logits=True)

    @property
    def outputs(self) -> list[str]:
        return ["logits"] if self.classifier else ["tokens", "features"]


def export_onnx(out: Path, exported: Exported) -> None:
    """Write one .onnx file, its preprocessing and classes in the metadata.

    Raises:
        UserError: ``out`` exists; onnx, onnxscript or onnxruntime is not installed.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  torch.onnx needs it
    except ImportError as error:
        raise UserError(
            f"--to onnx needs packages that are not here ({error}): pip install onnx onnxscript onnxruntime"
        ) from error
    graph, example, size = _graph(exported)
    batch = torch.export.Dim("batch", min=1)
    with aside(out) as partial, tempfile.TemporaryDirectory() as folder:
        plain = Path(folder, "graph.onnx")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                graph, (example,), plain, input_names=["images"], output_names=graph.outputs, dynamo=True,
                dynamic_shapes={"images": {0: batch}}, external_data=False, verbose=False,
            )  # fmt: skip
        made = onnx.load(plain)
        onnx.helper.set_model_props(made, {name: json.dumps(value) for name, value in about(exported).items()})
        onnx.save(made, partial)
        session = onnxruntime.InferenceSession(str(partial), providers=["CPUExecutionProvider"])
        for images in _trials(exported, size):
            _compare(graph, images, session.run(None, {"images": images.numpy()}), "onnxruntime")


def export_torch(out: Path, exported: Exported) -> None:
    """Write one .pt2 file for torch.export.load, which is tried in a process of its own.

    Raises:
        UserError: ``out`` exists.
    """
    graph, example, size = _graph(exported)
    program = torch.export.export(graph, (example,), dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}})
    with aside(out) as partial, tempfile.TemporaryDirectory() as folder:
        # torch chooses the format by the suffix, which ``partial`` lacks.
        saved = Path(folder, "graph.pt2")
        torch.export.save(program, saved, extra_files={ABOUT: json.dumps(about(exported), indent=2)})
        trials = list(_trials(exported, size))
        places = [str(Path(folder, f"{len(images)}.npy")) for images in trials]
        for images, place in zip(trials, places, strict=True):
            np.save(place, images.numpy())
        done = subprocess.run(
            [sys.executable, "-c", _LOAD, str(saved), *places], cwd=folder, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"the exported program does not load in a process of its own:\n{done.stderr[-3000:]}")
        for images, place in zip(trials, places, strict=True):
            with np.load(place + ".out.npz") as found:
                _compare(graph, images, [found[name] for name in found.files], "torch.export.load")
        partial.write_bytes(saved.read_bytes())


def about(exported: Exported) -> dict[str, Any]:
    """Return what a user of the graph has to know, as JSON values."""
    config, size = exported.config, exported.image_size
    return {
        "model": config.label, "image_size": list(size), "channels": config.channels, "mean": list(config.mean),
        "std": list(config.std), "crop": str(evaluation_crop(size)), "classes": list(exported.classes),
        "input": "images float32 [B, C, H, W], (values in [0, 1] - mean) / std",
    }  # fmt: skip


def _graph(exported: Exported) -> tuple[Graph, Tensor, tuple[int, int]]:
    """Return the model, images to trace it with, and their size."""
    import timm

    with tempfile.TemporaryDirectory() as folder:
        export_timm(Path(folder, "model"), exported)
        model = timm.create_model(f"local-dir:{folder}/model", pretrained=True).eval().requires_grad_(False)
    graph = Graph(model, classifier=exported.is_classifier).eval()
    return graph, torch.zeros(2, exported.config.channels, *exported.image_size), exported.image_size


def _trials(exported: Exported, size: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, exported.config.channels, *size, generator=generator) for batch in BATCHES]


@torch.no_grad()
def _compare(graph: Graph, images: Tensor, found: list[np.ndarray], by: str) -> None:
    expected = graph(images)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for name, ours, theirs in zip(graph.outputs, expected, found, strict=True):
        difference = float((ours - torch.from_numpy(theirs)).abs().max() / ours.abs().max())
        if not difference <= TOLERANCE:
            raise RuntimeError(f"{name} of {len(images)} images differs by {difference:.1e} under {by}")
