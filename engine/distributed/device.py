"""Choose the device on which a process computes, and explain why torch may not see a GPU that the machine has."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from mirl.errors import UserError

DEVICES = ("auto", "cpu")
# The oldest Linux driver for the builds of a CUDA version (NVIDIA, CUDA Compatibility, tables 1 and 2).
OLDEST_DRIVER = {13: 580, 12: 525}


def choose_device(asked: str = "auto", local_rank: int = 0) -> torch.device:
    """Return the GPU numbered ``local_rank``, or the CPU if there is no GPU or ``asked`` is "cpu".

    The GPU becomes torch's current device.

    Raises:
        UserError: the machine has a GPU that torch cannot use, or fewer GPUs than ranks.
    """
    if asked == "cpu":
        if torch.cuda.is_available():  # `hide_gpus` came too late, or a notebook has computed on it before
            raise UserError("device is cpu, but this process has found a GPU: start it with CUDA_VISIBLE_DEVICES= set")
        return torch.device("cpu")
    if not torch.cuda.is_available():
        reason = why_no_gpu()
        if reason is not None:
            raise UserError(f"device is {asked}, but {reason}; or give --device cpu to compute without it")
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {local_rank} has no GPU: this host shows {torch.cuda.device_count()}; start at most that "
            "many ranks on it"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def why_no_gpu(root: Path = Path("/")) -> str | None:
    """Say why torch sees none of this machine's GPUs, with the mend; None if it has none, or they are hidden.

    root: the folder with /dev and /proc. CUDA_VISIBLE_DEVICES hides GPUs if it is empty or -1.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1"):
        return None
    # A container gets the device files only with its GPUs, but sees the driver's version in any case.
    if not any(re.fullmatch(r"nvidia\d+", path.name) for path in (root / "dev").glob("nvidia*")):
        return None
    version = driver_version(root)
    driver = f"a GPU with driver {version}" if version else "a GPU"
    built = torch.version.cuda
    if built is None:
        return f"this machine has {driver} and torch {torch.__version__} was built without CUDA: {_wheel(version)}"
    needed = OLDEST_DRIVER.get(int(built.split(".")[0]))
    if version is not None and needed is not None and int(version.split(".")[0]) < needed:
        wheel = _wheel(version)
        return (
            f"this machine has {driver} and torch {torch.__version__} needs {needed} or newer for its CUDA {built}: "
            + (wheel if wheel.startswith("renew") else f"renew the driver, or {wheel}")
        )
    return f"this machine has {driver} and torch {torch.__version__} sees none: find out why with nvidia-smi"


def driver_version(root: Path = Path("/")) -> str | None:
    """Return the version of the NVIDIA driver that is loaded, such as 535.129.03; None if none is."""
    try:
        text = (root / "proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)", text)
    return found[1] if found else None


def _wheel(driver: str | None) -> str:
    """Name the build of torch that a driver can serve."""
    if driver is None:
        return "install a CUDA build of torch (pip install --force-reinstall 'torch>=2.11,<2.16')"
    major = int(driver.split(".")[0])
    fitting = [cuda for cuda, oldest in OLDEST_DRIVER.items() if major >= oldest]
    if not fitting:
        return f"renew the driver to {min(OLDEST_DRIVER.values())} or newer"
    cuda = max(fitting)
    return f"install a build of torch for CUDA {cuda} (its name ends in +cu{cuda}N; pytorch.org lists them)"
