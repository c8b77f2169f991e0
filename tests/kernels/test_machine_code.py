"""Every launch compiled for Hopper in bfloat16, without a GPU: it compiles, spills nothing, moves 16 bytes at once.

Triton's compiler and its ptxas need no driver; a stand-in for it answers the questions for the target. Launches then
stop after compilation. Shapes are those of training at 224 px, so the launch configs are the real ones.
"""

import importlib
import re
import subprocess
from pathlib import Path

import pytest
import torch

from mirl.kernels.triton_import import HAS_TRITON, INTERPRETED, triton

pytestmark = [
    pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed: pip install triton"),
    pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: the other tests compile for it"),
]

B, N, K, PAIRS = 256, 196, 49, 3
M = N - K
STATISTICS = ([0.02] * 3, [-1.0] * 3)
HOPPER_MULTIPROCESSORS = 132


class _HopperDriver:
    """What Triton asks of a driver before it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_current_target(self):
        return importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)


def bf16(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def fp32(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float32, device="meta")


def ids(count: int) -> torch.Tensor:
    return torch.empty(B, count, dtype=torch.int64, device="meta")


def images() -> torch.Tensor:
    return torch.empty(B, 224, 224, 3, dtype=torch.uint8, device="meta")


def launch(module: str, name: str, *arguments):
    getattr(importlib.import_module(f"mirl.kernels.{module}"), name)(*arguments)


def loss(pairs: int, rows: int, full: bool):
    predictions = [bf16(B, rows, 768) for _ in range(pairs)]
    tail = (images(), ids(M), 16, *STATISTICS, "BHWC", True, [1.0] * pairs, full, True)
    launch("masked_residual_mse_triton", "_masked_residual_mse", predictions, predictions, *tail)


LAUNCHES = {
    "gather_patches": lambda d: launch(
        "gather_patches", "_gather_patches", images(), ids(K), 16, *STATISTICS, "BHWC", torch.bfloat16
    ),
    "gather_tokens": lambda d: launch("gather_tokens", "_gather_tokens", bf16(B, N, d), ids(M)),
    "gather_tokens_backward": lambda d: launch("gather_tokens", "_gather_tokens_backward", bf16(B, M, d), ids(M), N),
    "assemble_tokens": lambda d: launch(
        "gather_tokens", "_assemble_tokens", bf16(B, K, d), ids(K), fp32(N, d), fp32(d)
    ),
    "scatter_tokens": lambda d: launch(
        "scatter_tokens", "_scatter_tokens", bf16(B, 1 + K, d), ids(N), fp32(d), fp32(1 + N, d)
    ),
    "scatter_tokens_backward": lambda d: launch(
        "scatter_tokens", "_scatter_tokens_backward", bf16(B, 1 + N, d), ids(N), K, False, torch.float32, True
    ),
    "residual_layer_norm": lambda d: launch(
        "residual_layer_norm", "_residual_layer_norm", bf16(B, 50, d), bf16(B, 50, d), fp32(d), fp32(d), 1e-6
    ),
    "residual_layer_norm_backward": lambda d: launch(
        "residual_layer_norm", "_residual_layer_norm_backward",
        bf16(B, 50, d), fp32(B * 50), fp32(B * 50), fp32(d), bf16(B, 50, d), bf16(B, 50, d),
    ),
    "bias_gelu": lambda d: launch("bias_gelu", "_bias_gelu", bf16(B, 50, 4 * d), fp32(4 * d)),
    "bias_gelu_backward": lambda d: launch(
        "bias_gelu", "_bias_gelu_backward", bf16(B, 50, 4 * d), fp32(4 * d), bf16(B, 50, 4 * d)
    ),
    "masked_residual_mse": lambda d: loss(1, M, full=False),
    "masked_residual_mse_three_pairs": lambda d: loss(PAIRS, M, full=False),
    "masked_residual_mse_full": lambda d: loss(1, N, full=True),
}  # fmt: skip
WIDTHS = {"gather_patches": [0], "masked_residual_mse": [0], "masked_residual_mse_three_pairs": [0]}
WIDTHS["masked_residual_mse_full"] = [0]


@pytest.fixture
def compiled(monkeypatch, tmp_path) -> list:
    """Kernels compiled during the test, as Triton's CompiledKernel objects."""
    jit, runtime = (importlib.import_module(f"triton.runtime.{name}") for name in ("jit", "driver"))
    kernels = []

    def compile_only(self, *args, grid, warmup, **kwargs):
        # Meta tensors have no address: Triton is told of a 16-byte aligned one, as every allocation is.
        kernels.append(original(self, *args, grid=grid, warmup=True, **kwargs))

    original = jit.JITFunction.run
    monkeypatch.setattr(jit.JITFunction, "run", compile_only)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda self: 0)
    for module in ("residual_layer_norm", "bias_gelu", "scatter_tokens"):
        loaded = importlib.import_module(f"mirl.kernels.{module}")  # the attribute of the package is the function
        monkeypatch.setattr(loaded, "multiprocessors", lambda device: HOPPER_MULTIPROCESSORS)
    monkeypatch.setattr(runtime.driver, "_active", _HopperDriver())
    return kernels


@pytest.mark.parametrize("name, width", [(name, d) for name in LAUNCHES for d in WIDTHS.get(name, [384, 512, 768])])
def test_compiles_for_hopper(name, width, compiled, tmp_path):
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    LAUNCHES[name](width)
    assert compiled
    for kernel in compiled:
        binary = tmp_path / "kernel.cubin"
        binary.write_bytes(kernel.asm["cubin"])
        usage = subprocess.run([cuobjdump, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
        assert found, usage
        registers, stack, local = (int(group) for group in found.groups())
        assert stack == local == 0, f"{name} spills: {found.group(0)}"
        assert registers <= 168, f"{name} uses {registers} registers a thread: too few programs fit a multiprocessor"
    # The first kernel is the one that moves the data (the second stages read a few partial sums).
    assembly = compiled[0].asm["ptx"]
    assert re.search(r"ld\.global\S*\.v4\.b32", assembly) and re.search(r"st\.global\S*\.v4\.b32", assembly)
