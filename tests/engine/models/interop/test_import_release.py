"""`mirl import` of the release: its own figures from its file and from conversions of it to PyTorch."""

from __future__ import annotations

import argparse
import pickle
import re
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mirl.engine.checkpoints.pretrained import load_pretrained
from mirl.engine.checkpoints.reader import verify
from mirl.engine.commands.import_weights import run as import_weights
from mirl.engine.models import read_release_checkpoint
from mirl.errors import UserError
from tests.support.launch import CHECKOUT
from tests.support.runs import ENTRY, TINY

FIXTURES = CHECKOUT / "tests" / "fixtures"
RELEASE_FILE = FIXTURES / "release_mirl_tiny.pd"
RELEASE_HEADS = ["--heads", "4", "--decoder-heads", "4"]
# float32: sums in another order, of numbers near 1
FLOAT32 = 1e-5


def converted(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """The release's arrays as PyTorch would have them: matrices [out, in]."""
    return {key: torch.from_numpy(array.T.copy() if array.ndim == 2 else array) for key, array in arrays.items()}


@pytest.fixture(scope="module")
def release() -> dict[str, Tensor]:
    return converted(read_release_checkpoint(RELEASE_FILE))


def assert_computes_what_the_release_did(checkpoint: Path) -> None:
    with np.load(FIXTURES / "release_mirl_tiny.npz", allow_pickle=False) as file:
        expected = {key: torch.from_numpy(value) for key, value in file.items() if not key.startswith(("w/", "grad/"))}
    model = load_pretrained(checkpoint)
    with torch.no_grad():
        output = model(expected["imgs"], noise=expected["noise"], full=True)
    torch.testing.assert_close(output.loss, expected["loss"].reshape(()).float(), rtol=0, atol=FLOAT32)
    torch.testing.assert_close(output.terms, expected["terms"].float(), rtol=0, atol=FLOAT32)
    assert torch.equal(output.mask.mask_BN, expected["mask"] == 1)
    assert len(output.predictions) == 6
    for index, prediction in enumerate(output.predictions):
        torch.testing.assert_close(prediction, expected[f"pred{index}"], rtol=0, atol=FLOAT32)


def test_the_releases_file(tmp_path, capsys):
    assert import_weights([str(RELEASE_FILE), "--out", str(tmp_path / "imported"), *RELEASE_HEADS]) == 0
    assert_computes_what_the_release_did(tmp_path / "imported")
    assert verify(tmp_path / "imported") is None
    told = capsys.readouterr().out
    assert re.search(r"encoder +77 matched +0 missing", told)
    assert re.search(r"decoders +300 matched +0 missing", told)
    assert re.search(r"fixed positions +7 equal to ours", told)
    assert "G 6, decoders 2 x 16, heads 4, DID, release variant" in told


@pytest.mark.parametrize("kind", ["wrapped", "module.", "safetensors", "training", "old pickle", "weight_g [1, E]"])
def test_a_conversion_of_the_release_to_pytorch(kind, release, tmp_path):
    path = tmp_path / "converted.pth"
    if kind == "wrapped":
        torch.save({"model": release, "epoch": 799}, path)
    elif kind == "module.":
        torch.save({f"module.{key}": value for key, value in release.items()}, path)
    elif kind == "safetensors":
        path = path.with_suffix(".safetensors")
        save_file(release, path)
    elif kind == "training":
        torch.save(
            {"model": release, "optimizer": {"state": {0: torch.ones(2)}}, "args": argparse.Namespace(a=1)}, path
        )
    elif kind == "old pickle":
        torch.save(release, path, _use_new_zipfile_serialization=False)
    else:  # torch's own weight norm keeps its dimensions
        torch.save({key: value[None] if key.endswith("weight_g") else value for key, value in release.items()}, path)
    import_weights([str(path), "--out", str(tmp_path / "imported"), *RELEASE_HEADS])
    assert_computes_what_the_release_did(tmp_path / "imported")


def test_the_releases_training_checkpoint(tmp_path):
    """With optimiser, scaler and command line beside the weights, as its training loop saves them."""
    arrays = read_release_checkpoint(RELEASE_FILE)
    content = {
        "model": OrderedDict((key, (f"parameter_{key}", array)) for key, array in arrays.items()),
        "optimizer": {"moment_0": ("moment_0", np.ones(3, np.float32)), "LR_Scheduler": {"last_lr": np.float64(0.1)}},
        "scaler": {"scale": np.ones(1, np.float32), "use_dynamic_loss_scaling": True},
        "args": argparse.Namespace(model="mirl", norm_pix_loss=True, data_path=None),
    }
    (tmp_path / "latest.pd").write_bytes(pickle.dumps(content, protocol=4))
    import_weights([str(tmp_path / "latest.pd"), "--out", str(tmp_path / "imported"), *RELEASE_HEADS])
    assert_computes_what_the_release_did(tmp_path / "imported")


def test_a_magnitude_other_than_1_is_refused(release, tmp_path):
    torch.save(release | {"decoder_pred3.weight_g": torch.full((16,), 1.5)}, tmp_path / "file.pth")
    with pytest.raises(UserError, match=r"decoders\.4\.head\.weight_g is not 1"):
        import_weights([str(tmp_path / "file.pth"), "--out", str(tmp_path / "imported"), *RELEASE_HEADS])


def test_matrices_left_as_paddle_has_them_are_refused(release, tmp_path):
    untransposed = {key: value.T.contiguous() if value.ndim == 2 else value for key, value in release.items()}
    torch.save(untransposed, tmp_path / "file.pth")
    with pytest.raises(UserError, match=r"has shape \[24, 72\], .*qkv\.weight needs \[72, 24\] \(it is transposed\)"):
        import_weights([str(tmp_path / "file.pth"), "--out", str(tmp_path / "imported"), *RELEASE_HEADS])


@pytest.mark.slow
def test_a_run_starts_from_it(tmp_path, photographs, run):
    import_weights([str(RELEASE_FILE), "--out", str(tmp_path / "imported"), *RELEASE_HEADS])
    model = ["--variant", "release", "--depth", "6", "--width", "24", "--heads", "4", "--segments", "6",
             "--decoder-width", "16", "--decoder-heads", "4", "--image-size", "64", "--patch-size", "16"]  # fmt: skip
    flags = ["--data", str(photographs), *TINY, *model, "--steps", "2", "--warmup-steps", "1"]
    result = run(sys.executable, ENTRY, *flags, "--out", "started", "--init-from", "imported")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "weights from imported, everything else fresh" in result.stdout
    assert load_pretrained(tmp_path / "started").config.variant == "release"
