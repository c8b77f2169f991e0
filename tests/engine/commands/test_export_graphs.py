"""`mirl export --to onnx|torch-export`: the graph gives what our own model gives, for any batch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mirl.engine.commands import export_graphs
from mirl.engine.commands.export import SUFFIXES, run
from mirl.engine.commands.export_formats import Exported
from mirl.engine.models.interop.timm_keys import timm_state_dict
from mirl.engine.transfer.classification.classifier import Classifier
from mirl.errors import UserError
from tests.engine.commands.test_export import checkpoint_of, images_of, our_tokens
from tests.engine.models.helpers import make_model, tiny_config

SIZE = (32, 16)  # positions of another grid than the trained one
LOADED = """
import sys, numpy, torch
assert not any(name.split(".")[0] in ("mirl", "timm") for name in sys.modules)
extra = {"mirl.json": ""}
out = torch.export.load(sys.argv[1], extra_files=extra).module()(torch.from_numpy(numpy.load("images.npy")))
numpy.savez("out.npz", *[x.detach().numpy() for x in (out if isinstance(out, tuple) else (out,))])
print(extra["mirl.json"])
"""


def outputs(kind: str, path: Path, images: Tensor) -> tuple[list[Tensor], dict]:
    """What the graph in ``path`` gives, and what it says of itself."""
    if kind == "onnx":
        session = pytest.importorskip("onnxruntime").InferenceSession(str(path))
        found = session.run(None, {"images": images.numpy()})
        told = session.get_modelmeta().custom_metadata_map
        return [torch.from_numpy(x) for x in found], {name: json.loads(text) for name, text in told.items()}
    np.save(path.parent / "images.npy", images.numpy())
    done = subprocess.run(
        [sys.executable, "-c", LOADED, path.name], cwd=path.parent, capture_output=True, text=True, check=True
    )
    with np.load(path.parent / "out.npz") as file:
        return [torch.from_numpy(file[name]) for name in file.files], json.loads(done.stdout)


@pytest.mark.parametrize("kind", ["onnx", "torch-export"])
def test_an_encoder_as_a_graph(kind, tmp_path, capsys):
    pytest.importorskip("onnxruntime", reason="needs: pip install onnx onnxscript onnxruntime")
    model = make_model(tiny_config(), dtype=torch.float32).eval()
    path = tmp_path / ("x" + SUFFIXES[kind])
    flags = ["--to", kind, "--out", str(path), "--image-size", "32x16", "--pool", "token"]
    run([str(checkpoint_of(model, tmp_path)), *flags])
    assert str(path) in capsys.readouterr().out.splitlines()[-1]
    expected = our_tokens(tmp_path / "checkpoint", images_of(model.config, SIZE))
    images = images_of(model.config, SIZE).repeat(3, 1, 1, 1)[:5]  # a batch that nothing was traced or tried with
    (tokens, features), told = outputs(kind, path, images)
    torch.testing.assert_close(tokens, expected.repeat(3, 1, 1)[:5], rtol=0, atol=1e-4)
    torch.testing.assert_close(features, expected[:, 0].repeat(3, 1)[:5], rtol=0, atol=1e-4)
    assert told["image_size"] == list(SIZE) and told["mean"] == list(model.config.mean) and told["classes"] == []


@pytest.mark.parametrize(("kind", "pool"), [("onnx", "token"), ("onnx", "avg"), ("torch-export", "avg")])
def test_a_classifier_as_a_graph(kind, pool, tmp_path):
    pytest.importorskip("onnxruntime", reason="needs: pip install onnx onnxscript onnxruntime")
    config = tiny_config(segments=1, did=False)
    torch.manual_seed(0)
    model = Classifier(config, num_classes=3, pool=pool).eval()
    torch.nn.init.normal_(model.head.weight)
    state = model.state_dict()
    encoder = {key.removeprefix("encoder."): value for key, value in state.items() if key.startswith("encoder.")}
    encoder["pos_embed"] = model.encoder.pos_embed.detach()
    head = {key: value for key, value in state.items() if not key.startswith("encoder.")}
    size = (config.image_height, config.image_width)
    exported = Exported(encoder=encoder, config=config, image_size=size, pool=pool, head=head, classes=("a", "b", "c"))
    path = tmp_path / ("x" + SUFFIXES[kind])
    (export_graphs.export_onnx if kind == "onnx" else export_graphs.export_torch)(path, exported)
    images = images_of(config, size)
    (logits,), told = outputs(kind, path, images)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(images), rtol=1e-4, atol=1e-4)
    assert told["classes"] == ["a", "b", "c"] and timm_state_dict(encoder, config, image_size=size, head=head)


def test_a_graph_that_gives_something_else_is_not_written(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime", reason="needs: pip install onnx onnxscript onnxruntime")
    checkpoint = checkpoint_of(make_model(tiny_config(), dtype=torch.float32).eval(), tmp_path)
    monkeypatch.setattr(export_graphs, "TOLERANCE", 0.0)
    monkeypatch.setattr(export_graphs.Graph, "forward", lambda self, images: (images.sum(1), torch.rand(1)))
    with pytest.raises(RuntimeError, match="differs by"):
        run([str(checkpoint), "--to", "onnx", "--out", str(tmp_path / "x.onnx")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


def test_what_is_missing_or_misnamed_is_said(tmp_path, monkeypatch):
    checkpoint = checkpoint_of(make_model(tiny_config(), dtype=torch.float32).eval(), tmp_path)
    for kind in ("onnx", "torch-export"):
        with pytest.raises(UserError, match=f"give a file name that ends in {SUFFIXES[kind]}"):
            run([str(checkpoint), "--to", kind, "--out", str(tmp_path / "x")])
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match="--to onnx needs packages that are not here .*: pip install onnx onnxscript"):
        run([str(checkpoint), "--to", "onnx", "--out", str(tmp_path / "x.onnx")])
