"""Every command takes its device as runs do: a GPU that torch cannot use is an error, and --device cpu a way round."""

from __future__ import annotations

import pytest
import torch

from mirl.engine.cli import COMMANDS, dispatch
from mirl.engine.distributed import device as devices
from mirl.errors import UserError
from tests.engine.conftest import write_classes
from tests.support.launch import FIXTURES

RUNS = FIXTURES / "run_0_1_0"
DATA = ["--data", "{classes}", "--val", "{classes}"]
ARGUMENTS = {
    "visualize": ["{pretrain}", "{classes}/even/00.png", "--out", "{folder}/grid.png"],
    "probe": ["{pretrain}", *DATA, "--epochs", "1", "--knn-k", "2", "--threads", "1"],
    "embed": ["{pretrain}", "--data", "{classes}", "--out", "{folder}/features.npz", "--threads", "1"],
    "depth-report": ["{pretrain}", "--data", "{classes}", "--images", "4", "--out", "{folder}/report"],
    "bench-loader": ["{classes}", "--image-size", "16", "--threads", "1", "--micro-batch", "4", "--seconds", "0.1"],
    "evaluate": ["{finetune}", "--val", "{classes}", "--threads", "1"],
    "predict": ["{finetune}", "{classes}", "--threads", "1"],
    "summary": ["--depth", "2", "--width", "32", "--heads", "2", "--segments", "2", "--decoder-width", "32",
                "--decoder-heads", "2", "--image-size", "32", "--patch-size", "8", "--no-time"],
}  # fmt: skip
# They compute nothing, or on any device that is named to them, or look for GPUs themselves to report on them.
WITHOUT = {
    "import",
    "export",
    "average",
    "validate-data",
    "prepare-data",
    "make-index",
    "plan",
    "doctor",
    "config",
    "report",
}
RUN_KINDS = {"pretrain", "finetune", "segment", "detect"}  # tests/engine/distributed/test_device.py
OF_A_RUN = {"replay"}  # takes a run with its data; its --device cpu: tests/engine/pretraining/test_replay.py
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine whose GPU torch cannot use")


@pytest.fixture
def command(tmp_path, monkeypatch):
    """``command(name, *more)``: the command of this name, on a machine whose GPU torch cannot use."""
    root = tmp_path / "machine"
    (root / "dev").mkdir(parents=True)
    (root / "dev/nvidia0").touch()
    monkeypatch.setattr(devices.why_no_gpu, "__defaults__", (root,))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("MIRL_CACHE", str(tmp_path / "cache"))
    places = {
        "folder": tmp_path, "pretrain": RUNS / "pretrain", "finetune": RUNS / "finetune",
        "classes": write_classes(tmp_path / "classes", {"even": 6, "odd": 6}),
    }  # fmt: skip
    return lambda name, *more: dispatch([name, *(part.format(**places) for part in ARGUMENTS[name]), *more])


def test_no_command_is_forgotten():
    assert set(COMMANDS) == set(ARGUMENTS) | WITHOUT | RUN_KINDS | OF_A_RUN


@NO_GPU
@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_gpu_that_torch_cannot_use_is_named_by_every_command(name, command):
    with pytest.raises(UserError, match="^device is auto, but this machine has a GPU .*; or give --device cpu") as told:
        command(name)
    assert "\n" not in str(told.value)


@NO_GPU
@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_command_goes_to_the_cpu_by_its_flag(name, command, monkeypatch):
    chosen = []
    real = devices.choose_device
    monkeypatch.setattr(devices, "choose_device", lambda *asked: chosen.append(asked[0]) or real(*asked))
    monkeypatch.setattr("mirl.engine.distributed.launch.choose_device", devices.choose_device)
    assert command(name, "--device", "cpu") == 0
    assert set(chosen) == {"cpu"}
    assert devices.os.environ["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize("name", ARGUMENTS)
def test_another_device_is_refused_by_the_flag(name, command):
    with pytest.raises(UserError, match="--device"):
        command(name, "--device", "gpu")
