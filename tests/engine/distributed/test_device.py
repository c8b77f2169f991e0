"""A GPU that torch cannot use is no silent run on the CPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from mirl.engine.commands.doctor import ERROR, check_gpu
from mirl.engine.distributed import device as devices
from mirl.engine.distributed.environment import hide_gpus
from mirl.errors import UserError
from tests.support.runs import ENTRY, TINY

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine whose GPU torch cannot use")
BANNER = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Thu Oct 26 05:42:45 UTC 2023\nGCC version: gcc 12.3.0\n"
NODES = ("nvidia0", "nvidiactl")


def machine(root: Path, version: str | None, *, nodes: tuple[str, ...] = NODES, banner: str = BANNER) -> Path:
    """The files of a machine with this driver, as NVIDIA's kernel module writes them."""
    (root / "dev").mkdir()
    for name in nodes:
        (root / "dev" / name).touch()
    if version is not None:
        (root / "proc/driver/nvidia").mkdir(parents=True)
        (root / "proc/driver/nvidia/version").write_text(banner.format(version))
    return root


@pytest.mark.parametrize(
    ("driver", "built", "told"),
    [
        ("535.129.03", "13.0", r"driver 535.129.03 and torch .* needs 580 or newer for its CUDA 13.0: renew the "
                               r"driver, or install a build of torch for CUDA 12 \(its name ends in \+cu12N"),
        ("570.86.15", "13.0", "needs 580 or newer .* build of torch for CUDA 12 "),
        ("470.82.01", "12.8", "needs 525 or newer for its CUDA 12.8: renew the driver to 525 or newer$"),
        ("580.65.06", "13.0", "sees none: find out why with nvidia-smi"),
        ("580.65.06", None, r"was built without CUDA: install a build of torch for CUDA 13 "),
        (None, "13.0", "a GPU and torch .* sees none: find out why with nvidia-smi"),
    ],
)  # fmt: skip
def test_a_driver_that_torch_cannot_use_is_named_with_the_build_that_fits(driver, built, told, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    reason = devices.why_no_gpu(machine(tmp_path, driver))
    with pytest.raises(UserError, match=told):
        raise UserError(reason)


@pytest.mark.parametrize("hidden", ["", "-1", " "])
def test_gpus_that_are_hidden_are_none(hidden, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert devices.why_no_gpu(machine(tmp_path, "535.129.03")) is None


@pytest.mark.parametrize("nodes", [(), ("nvidiactl", "nvidia-uvm", "nvidia-caps")])
def test_a_container_without_a_gpu_of_its_host_has_none(nodes, tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert devices.why_no_gpu(machine(tmp_path, "535.129.03", nodes=nodes)) is None


@pytest.mark.parametrize(
    "banner",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023\n",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  535.129.03  Release Build  (dvs-builder@U16)\n",
        "NVRM version: NVIDIA UNIX aarch64 Kernel Module  535.129.03  Wed Mar  5\n",
    ],
)
def test_both_kernel_modules_say_their_version(banner, tmp_path):
    assert devices.driver_version(machine(tmp_path, "x", banner=banner)) == "535.129.03"


@NO_GPU
def test_runs_and_doctor_refuse_what_torch_cannot_use(tmp_path, monkeypatch):
    root = machine(tmp_path, "535.129.03")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(devices.why_no_gpu, "__defaults__", (root,))
    with pytest.raises(
        UserError, match="device is auto, but this machine has a GPU with driver 535.*or give --device cpu"
    ):
        devices.choose_device("auto")
    assert devices.choose_device("cpu") == torch.device("cpu")
    finding = check_gpu()
    assert finding.level == ERROR and "535.129.03" in finding.text and "CUDA 12" in finding.mend


def test_the_cpu_is_taken_where_a_gpu_is_and_refused_where_it_was_found_before(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    hide_gpus("auto")
    assert devices.os.environ["CUDA_VISIBLE_DEVICES"] == "0"
    hide_gpus("cpu")
    assert devices.os.environ["CUDA_VISIBLE_DEVICES"] == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match="has found a GPU: start it with CUDA_VISIBLE_DEVICES= set"):
        devices.choose_device("cpu")


def test_a_run_on_the_cpu_by_its_flag(run, photographs, tmp_path):
    done = run(
        sys.executable, ENTRY, *TINY, "--data", str(photographs), "--steps", "1", "--device", "cpu", "--out", "out"
    )
    assert done.returncode == 0, done.stderr[-2000:]
