"""Every launch compiled for Hopper in bfloat16, without a GPU: it compiles, spills nothing, moves 16 bytes at once.

Triton's compiler and its ptxas need no driver; a stand-in for it answers the questions for the target. Launches then
stop after compilation. Shapes are those of training at 224 px, so the launch configs are the real ones.
"""

import importlib
import math
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from mirl.kernels.triton_import import HAS_TRITON, INTERPRETED, triton

pytestmark = [
    pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed: pip install triton"),
    pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: the other tests compile for it"),
]

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin" if HAS_TRITON else Path()
B, N, K, PAIRS = 256, 196, 49, 3
M = N - K
B_K, B_M, B_N, B_KEPT, B_ALL = B * K, B * M, B * N, B * (1 + K), B * (1 + N)
VALUES = 50_000_000  # of a rank's share of a parameter group
STATISTICS = ([0.02] * 3, [-1.0] * 3)
HOPPER_MULTIPROCESSORS = 132
# Of an H100 SXM: warp instructions that four schedulers of each multiprocessor issue in a second at the boost clock,
# and the bytes that its memory really moves.
INSTRUCTIONS_PER_S, BYTES_PER_S = HOPPER_MULTIPROCESSORS * 4 * 1.755e9, 3.0e12
# A kernel whose instructions take this share of the time of its bytes, or more, does not run at the memory's speed.
BOUND = 0.8
# Persistent kernels keep sums in registers, the loss keeps a patch; others have 37 % at least.
LEAST_OCCUPANCY = {
    "residual_layer_norm_backward": 0.25, "masked_residual_mse": 0.35,
    "masked_residual_mse_three_pairs": 0.32,
}  # fmt: skip
# Bytes that each launch of a training step moves at least: bfloat16 at width 768, or 512 in decoders, uint8 pixels.
BYTES = {
    "gather_patches": (0, 3 * B_K * 768),
    "gather_tokens": (512, 2 * 2 * B_M * 512),
    "gather_tokens_backward": (512, 2 * (B_M + B_N) * 512),
    "gather_tokens_backward_and_add": (512, 2 * (B_M + 2 * B_N) * 512),
    "assemble_tokens": (768, 2 * (B_K + B_KEPT) * 768),
    "scatter_tokens": (512, 2 * (B_KEPT + B_ALL) * 512),
    "scatter_tokens_backward": (512, 2 * (B_KEPT + B_ALL) * 512),
    "residual_layer_norm": (768, 4 * 2 * B_KEPT * 768),
    "residual_layer_norm_backward": (768, 4 * 2 * B_KEPT * 768),
    "bias_gelu": (768, 2 * 2 * B_KEPT * 3072),
    "bias_gelu_backward": (768, 3 * 2 * B_KEPT * 3072),
    "masked_residual_mse": (0, (3 * 2 + 1) * B_M * 768),
    "masked_residual_mse_three_pairs": (0, (3 * 3 * 2 + 1) * B_M * 768),
    "flat_adamw": (0, 28 * VALUES),
    "flat_adamw_clipping": (0, 28 * VALUES),
}  # fmt: skip


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


def adamw(clip: float):
    state = [fp32(VALUES) for _ in range(3)]
    numbers = (0.9999, 0.9, 0.95, 1e-3, 0.5, 1e-8, 0.125, clip)
    launch("flat_adamw", "_flat_adamw", bf16(VALUES), *state, bf16(VALUES), fp32(), *numbers)


LAUNCHES = {
    "gather_patches": lambda d: launch(
        "gather_patches", "_gather_patches", images(), ids(K), 16, *STATISTICS, "BHWC", torch.bfloat16
    ),
    "gather_tokens": lambda d: launch("gather_tokens", "_gather_tokens", bf16(B, N, d), ids(M)),
    "gather_tokens_backward": lambda d: launch(
        "gather_tokens", "_gather_tokens_backward", bf16(B, M, d), ids(M), N, None
    ),
    "gather_tokens_backward_and_add": lambda d: launch(
        "gather_tokens", "_gather_tokens_backward", bf16(B, M, d), ids(M), N, bf16(B, N, d)
    ),
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
        "residual_layer_norm", "_residual_layer_norm", bf16(B, 50, d), bf16(B, 50, d), fp32(d), fp32(d), fp32(d), 1e-6
    ),
    "residual_layer_norm_backward": lambda d: launch(
        "residual_layer_norm", "_residual_layer_norm_backward",
        bf16(B, 50, d), fp32(B * 50), fp32(B * 50), fp32(d), bf16(B, 50, d), bf16(B, 50, d), True,
    ),
    "bias_gelu": lambda d: launch("bias_gelu", "_bias_gelu", bf16(B, 50, 4 * d), fp32(4 * d)),
    "bias_gelu_backward": lambda d: launch(
        "bias_gelu", "_bias_gelu_backward", bf16(B, 50, 4 * d), fp32(4 * d), bf16(B, 50, 4 * d)
    ),
    "masked_residual_mse": lambda d: loss(1, M, full=False),
    "masked_residual_mse_three_pairs": lambda d: loss(PAIRS, M, full=False),
    "masked_residual_mse_full": lambda d: loss(1, N, full=True),
    "flat_adamw": lambda d: adamw(clip=0.0),
    "flat_adamw_clipping": lambda d: adamw(clip=1.0),
}  # fmt: skip
WIDTHS = {"gather_patches": [0], "masked_residual_mse": [0], "masked_residual_mse_three_pairs": [0]}
WIDTHS |= {name: [0] for name in ("masked_residual_mse_full", "flat_adamw", "flat_adamw_clipping")}


@dataclass(frozen=True)
class Launch:
    """One launch: its kernel, its programs, and its arguments by name."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]

    @property
    def warps(self) -> int:
        return self.kernel.metadata.num_warps

    @property
    def turns(self) -> int:
        """How often the programs together go round their loop, where a persistent kernel has one."""
        if "tiles" in self.arguments and "partial_ptr" in self.arguments:
            column_tiles = -(-self.arguments["features"] // 256) if "features" in self.arguments else 1
            return self.arguments["tiles"] * column_tiles
        if "groups" in self.arguments:
            return self.arguments["batches"] * (self.programs // self.arguments["groups"])
        return 0


launches: list[Launch] = []


@pytest.fixture
def compiled(monkeypatch, tmp_path) -> list:
    """Kernels compiled during the test, as Triton's CompiledKernel objects."""
    jit, runtime = (importlib.import_module(f"triton.runtime.{name}") for name in ("jit", "driver"))
    kernels = []
    launches.clear()

    def compile_only(self, *args, grid, warmup, **kwargs):
        # Meta tensors have no address: Triton is told of a 16-byte aligned one, as every allocation is.
        kernel = original(self, *args, grid=grid, warmup=True, **kwargs)
        kernels.append(kernel)
        launches.append(Launch(kernel, math.prod(grid), dict(zip(self.arg_names, args, strict=False))))

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
    LAUNCHES[name](width)
    assert compiled
    for kernel in compiled:
        binary = tmp_path / "kernel.cubin"
        binary.write_bytes(kernel.asm["cubin"])
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", binary], capture_output=True, text=True, check=True
        ).stdout
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
        assert found, usage
        registers, stack, local = (int(group) for group in found.groups())
        assert stack == local == 0, f"{name} spills: {found.group(0)}"
        assert registers <= 168, f"{name} uses {registers} registers a thread: too few programs fit a multiprocessor"
    # The first kernel is the one that moves the data (the second stages read a few partial sums).
    assembly = compiled[0].asm["ptx"]
    # A load of 16 bytes, or a copy to shared memory, of which this kind is always that large.
    assert re.search(r"ld\.global\S*\.v4\.b32|cp\.async\.cg\.", assembly)
    assert re.search(r"st\.global\S*\.v4\.b32", assembly)


def resources(kernel: Any, folder: Path) -> tuple[int, int]:
    """Registers of a thread and bytes of shared memory of a program."""
    binary = folder / "resources.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    usage = subprocess.run(
        [TOOLS / "cuobjdump", "-res-usage", binary], capture_output=True, text=True, check=True
    ).stdout
    found = re.search(r"REG:(\d+) STACK:\d+ SHARED:(\d+)", usage)
    assert found, usage
    return int(found[1]), max(int(found[2]), kernel.metadata.shared)


def resident_programs(kernel: Any, folder: Path) -> int:
    """Programs that a multiprocessor of an H100 holds: 64 warps, 65536 registers in units of 256 a warp, 228 KiB."""
    registers, shared = resources(kernel, folder)
    warps = kernel.metadata.num_warps
    by_registers = 65536 // (-(-32 * registers // 256) * 256) // warps
    return min(32, 64 // warps, by_registers, 233472 // (shared + 1024))


def instructions(kernel: Any, folder: Path) -> tuple[int, int]:
    """Instructions of a warp from beginning to end, and of its longest loop, 0 where there is none."""
    binary = folder / "instructions.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    text = subprocess.run([TOOLS / "nvdisasm", "-c", binary], capture_output=True, text=True, check=True).stdout
    place, labels, branches = 0, {}, []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = place
        elif re.match(r"\s+/\*[0-9a-f]{4,5}\*/\s+\S", line) and "NOP" not in line:
            if branch := re.search(r"\bBRA\b.*?(\.L_x_\d+)", line):
                branches.append((place, branch[1]))
            place += 1
    loops = [last - labels[target] for last, target in branches if target in labels]
    # The last instruction branches to itself; shorter loops are those of libdevice.
    return place, max((length for length in loops if length > 40), default=0)


@pytest.mark.parametrize("name", BYTES)
def test_programs_fill_the_gpu_and_no_kernel_is_bound_by_its_instructions(name, compiled, tmp_path):
    width, moved = BYTES[name]
    LAUNCHES[name](width)
    first = launches[0]
    assert first.programs >= HOPPER_MULTIPROCESSORS, "some multiprocessors have nothing to do"
    occupancy = resident_programs(first.kernel, tmp_path) * first.warps / 64
    assert occupancy >= LEAST_OCCUPANCY.get(name, 0.37)
    whole, loop = instructions(first.kernel, tmp_path)
    assert (loop > 0) == (first.turns > 0), "a loop of which the test does not know how often it turns"
    executed = first.warps * (loop * first.turns if first.turns else whole * first.programs)
    ratio = executed / INSTRUCTIONS_PER_S / (moved / BYTES_PER_S)
    print(f"{name}: {whole} instructions, loop {loop}, {ratio:.2f} of the bytes' time, occupancy {occupancy:.0%}")
    assert ratio < BOUND, f"{name} needs {ratio:.2f} of the time of its bytes"
