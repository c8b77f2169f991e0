"""`mirl doctor` shows what this machine has, and whether each part really runs.

Every line is ok, warning or error, the latter two with their mend.
"""

from __future__ import annotations

import importlib.metadata
import io
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import mirl
from mirl.engine.distributed.environment import DEEPSPEED_INSTALL, integer, of_slurm, without_launcher

OK, WARNING, ERROR = "ok", "warning", "error"
SMALLEST_DISK_GIB = 20
SMALLEST_OPEN_FILES = 4096
DEFAULT_PORT = 29500


@dataclass(frozen=True)
class Finding:
    """A finding is one line of the report."""

    level: str
    part: str
    text: str
    mend: str = ""

    def __str__(self) -> str:
        mend = f"\n{'':>10}{'':<14} -> {self.mend}" if self.mend else ""
        return f"{self.level:<9} {self.part:<14} {self.text}{mend}"


def version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def one_line(error: BaseException) -> str:
    text = str(error).strip() or "no message"
    return f"{type(error).__name__}: {text.splitlines()[0][:160]}"


def check_python() -> Finding:
    return Finding(OK, "python", f"{platform.python_version()} on {platform.platform()}, {os.cpu_count()} cores")


def check_gpu() -> Finding:
    """Find driver and GPU, and run a matrix product with its gradient on it."""
    import torch

    from mirl.engine.distributed.device import why_no_gpu

    if not torch.cuda.is_available():
        reason = why_no_gpu()
        if reason is None:
            return Finding(OK, "gpu", "none: everything runs on the CPU, which is slow")
        text, _, mend = reason.partition(": ")
        return Finding(ERROR, "gpu", text, mend)
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.split()
    try:
        left = torch.randn(64, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        (left @ left).float().sum().backward()
        finite = bool(left.grad.isfinite().all())
    except RuntimeError as error:
        return Finding(ERROR, "gpu", one_line(error), "check the driver: nvidia-smi")
    text = f"{len(names)} x {names[0]}, driver {driver[0] if driver else '?'}, CUDA {torch.version.cuda}"
    if not finite:
        return Finding(
            ERROR, "gpu", f"{text}: a bf16 product gave non-finite gradients", "check the card: nvidia-smi -q"
        )
    return Finding(OK, "gpu", f"{text}: bf16 forward and backward ran")


def check_torch() -> Finding:
    import torch

    left = torch.randn(8, 8, requires_grad=True)
    (left @ left).sum().backward()
    bf16 = "AMX" if torch.cpu._is_amx_tile_supported() else "no AMX"
    return Finding(OK, "torch", f"{torch.__version__}: forward and backward ran on the CPU ({bf16})")


def check_triton() -> Finding:
    """Compare a kernel of ours with its reference, on a GPU."""
    import torch

    from mirl.kernels import gather_tokens
    from mirl.kernels.triton_import import HAS_TRITON, TRITON_VERSION

    if not HAS_TRITON:
        level = ERROR if torch.cuda.is_available() else OK
        mend = "it comes with torch: pip install triton" if level == ERROR else ""
        return Finding(level, "triton", "not installed: the kernels run as plain torch", mend)
    if not torch.cuda.is_available():
        return Finding(OK, "triton", f"{TRITON_VERSION}: installed, not used without a GPU")
    tokens = torch.randn(2, 9, 32, device="cuda", requires_grad=True)
    ids = torch.tensor([[0, 3], [1, 8]], device="cuda")
    try:
        picked = gather_tokens(tokens, ids)
        picked.sum().backward()
    except Exception as error:  # noqa: BLE001 - whatever a compiler raises is a finding
        return Finding(
            ERROR, "triton", f"{TRITON_VERSION}: {one_line(error)}", "Triton compiles with gcc: apt install gcc"
        )
    if not torch.equal(picked, tokens.gather(1, ids[..., None].expand(-1, -1, 32))):
        return Finding(
            ERROR, "triton", f"{TRITON_VERSION}: a kernel gave a wrong result", "report this, with this report"
        )
    return Finding(OK, "triton", f"{TRITON_VERSION}: a kernel compiled and ran forward and backward")


def check_attention() -> Finding:
    """Try which attention backends run, forward and backward."""
    import torch

    from mirl.kernels.attention import XFORMERS_INSTALL, probe_backend

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    failures = {name: probe_backend(name, device, dtype, 64) for name in ("xformers", "sdpa", "math")}
    working = [name for name, failure in failures.items() if failure is None]
    installed = version_of("xformers")
    text = f"runs: {', '.join(working)}; xformers {installed or 'not installed'}"
    if failures["xformers"] and device.type == "cuda":
        return Finding(WARNING, "attention", f"{text}; {failures['xformers']}", XFORMERS_INSTALL)
    return Finding(OK, "attention", text + ("; xformers needs a GPU" if device.type == "cpu" and installed else ""))


def check_dali() -> Finding:
    """Decode one JPEG through the pipeline that training uses."""
    import numpy as np
    from PIL import Image

    version = version_of("nvidia-dali-cuda130") or version_of("nvidia-dali-cuda120")
    if version is None:
        return Finding(
            ERROR, "dali", "not installed", "pip install nvidia-dali-cuda130 (or -cuda120 for an older driver)"
        )
    from mirl.dataloaders import load_images

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "grey.jpg"
        stream = io.BytesIO()
        Image.fromarray(np.full((48, 64, 3), 128, dtype=np.uint8)).save(stream, "JPEG")
        path.write_bytes(stream.getvalue())
        try:
            pixels = load_images([str(path)], image_size=(32, 32), channels=3)
        except Exception as error:  # noqa: BLE001 - DALI raises types of its own
            return Finding(
                ERROR, "dali", f"{version}: {one_line(error)}", "pip install --force-reinstall nvidia-dali-cuda130"
            )
    if abs(int(pixels.float().mean()) - 128) > 2:
        return Finding(
            ERROR, "dali", f"{version}: a grey JPEG was decoded to another colour", "report this, with this report"
        )
    return Finding(OK, "dali", f"{version}: decoded a JPEG")


def check_deepspeed() -> Finding:
    """Take one optimiser step under ZeRO-2, with its all-reduce, in a process of its own."""
    code = (
        "import torch\n"
        "from mirl.engine.distributed.launch import join, leave\n"
        "from mirl.engine.distributed.ds_engine import DEEPSPEED_VERSION, TrainEngine\n"
        "ranks = join()\n"
        "model = torch.nn.Linear(4, 1).to(ranks.device)\n"
        "config = {'train_batch_size': 2, 'zero_optimization': {'stage': 2}, 'steps_per_print': 10**9}\n"
        "engine = TrainEngine(model, torch.optim.AdamW(model.parameters()), config)\n"
        "engine.backward(engine.forward(torch.ones(2, 4, device=ranks.device)).sum())\n"
        "total = torch.ones(1, device=ranks.device)\n"
        "torch.distributed.all_reduce(total)\n"
        "assert engine.step(0.1) and total.item() == 1\n"
        "leave()\n"
        "print('RAN', DEEPSPEED_VERSION)\n"
    )
    version = version_of("deepspeed")
    if version is None:
        return Finding(ERROR, "deepspeed", "not installed", DEEPSPEED_INSTALL)
    environment = without_launcher(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(Path(mirl.__file__).resolve().parents[1]), environment.get("PYTHONPATH", "")]
    )
    try:
        result = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=180, check=False
        )
    except subprocess.TimeoutExpired:
        return Finding(
            ERROR, "deepspeed", f"{version}: one step took over 180 s", "is it compiling? set MAX_JOBS, or report this"
        )
    if result.returncode or "RAN" not in result.stdout:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        if (mark := "mirl.errors.UserError: ") in last:  # the process could not start as it should
            return Finding(ERROR, "deepspeed", f"{version}: was not tried", last.split(mark)[1])
        return Finding(ERROR, "deepspeed", f"{version}: {last[:160]}", DEEPSPEED_INSTALL)
    return Finding(OK, "deepspeed", f"{version}: a ZeRO-2 step and an all-reduce ran")


def check_launch() -> Finding:
    """Say what a run that is typed into this shell would wait for."""
    if of_slurm(os.environ):
        name, mend = "SLURM_NTASKS", "start runs with srun (docs/clusters.md), or for one process: unset SLURM_NTASKS"
    else:
        name, mend = "WORLD_SIZE", "a launcher sets it for its ranks; for one process: unset RANK WORLD_SIZE"
    ranks = integer(name, 1)
    if ranks == 1:
        return Finding(OK, "launch", "a run from this shell is one process")
    return Finding(WARNING, "launch", f"{name} is {ranks}: a run typed into this shell waits for other ranks", mend)


def check_compiler() -> Finding:
    """Look for gcc and ninja: Triton and torch.compile build small C files; DeepSpeed's own extensions are not used."""
    compiler = next(
        (name for name in (os.environ.get("CC"), "cc", "gcc", "clang") if name and shutil.which(name)), None
    )
    ninja = shutil.which("ninja") or shutil.which("ninja", path=os.path.dirname(sys.executable))
    text = f"C compiler {compiler or 'none'}, ninja {'found' if ninja else 'none'}"
    if compiler is None:
        return Finding(WARNING, "compiler", text, "Triton and torch.compile need one on a GPU: apt install gcc")
    return Finding(OK, "compiler", text)


def check_port() -> Finding:
    with socket.socket() as probe:
        try:
            probe.bind(("", DEFAULT_PORT))
        except OSError:
            return Finding(
                WARNING,
                "ports",
                f"{DEFAULT_PORT}, the launchers' default, is taken",
                "no matter on one machine; across machines give --master_port another number",
            )
    return Finding(OK, "ports", f"{DEFAULT_PORT}, the launchers' default, is free")


def check_disk() -> Finding:
    free = {str(path): shutil.disk_usage(path).free / 2**30 for path in (Path.cwd(), Path(tempfile.gettempdir()))}
    text = ", ".join(f"{gib:.0f} GiB free at {path}" for path, gib in free.items())
    if next(iter(free.values())) < SMALLEST_DISK_GIB:
        return Finding(
            WARNING, "disk", text, "a checkpoint of ViT-B-48 takes 5 GiB, four are on disk at once; use --out elsewhere"
        )
    return Finding(OK, "disk", text)


def check_shared_memory() -> Finding:
    path = Path("/dev/shm")
    if not path.is_dir():
        return Finding(OK, "shared memory", "no /dev/shm on this system")
    gib = shutil.disk_usage(path).free / 2**30
    if gib < 1:
        return Finding(
            WARNING, "shared memory", f"{gib:.2f} GiB free in /dev/shm", "in Docker: --shm-size 8g (NCCL uses it)"
        )
    return Finding(OK, "shared memory", f"{gib:.1f} GiB free in /dev/shm")


def check_open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"limit {soft} (can be raised to {hard})"
    if soft < SMALLEST_OPEN_FILES and soft < hard:
        return Finding(WARNING, "open files", text, f"tar shards stay open: ulimit -n {min(hard, 65536)}")
    return Finding(OK, "open files", text)


CHECKS: tuple[Callable[[], Finding], ...] = (
    check_python, check_gpu, check_torch, check_triton, check_attention, check_dali, check_deepspeed,
    check_launch, check_compiler, check_port, check_disk, check_shared_memory, check_open_files,
)  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Print every finding; exit code 1 if one is an error."""
    from mirl.engine.configuration.flags import Parser

    Parser(prog="mirl doctor", description="Check that every part the engine needs runs on this machine.").parse_args(
        argv
    )
    worst = OK
    for check in CHECKS:
        try:
            finding = check()
        except Exception as error:  # noqa: BLE001 - a part that cannot even be imported is what this command is for
            finding = Finding(
                ERROR,
                check.__name__.removeprefix("check_"),
                one_line(error),
                "`pip check` names what does not fit",
            )
        print(finding, flush=True)
        worst = ERROR if ERROR in (worst, finding.level) else worst
    print(
        "something does not run: see the lines marked error"
        if worst == ERROR
        else "everything that is needed here runs"
    )
    return 1 if worst == ERROR else 0
