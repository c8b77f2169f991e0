"""A compiled block as Inductor would run it on an H100: kernels, bytes, and what it keeps for the backward pass."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache
from unittest import mock

import pytest
import torch
from torch._library.triton import get_triton_kernels_for_op

from mirl.engine.accounting.activations import encoder_block_values
from mirl.engine.accounting.fake_step import FLASH, OWN
from mirl.engine.models import Execution, model_config
from mirl.engine.models.layers import Block
from mirl.engine.training.compiling import RECOMPUTE_BUDGET
from mirl.kernels import set_inlined
from mirl.kernels.attention import AttentionBackend
from mirl.kernels.dispatch import as_on_a_gpu
from mirl.kernels.triton_import import HAS_TRITON, INTERPRETED
from tests.dry_run.lowering import TORCH, Region, lower_region

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed: pip install triton"),
    pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here, which Inductor would ask"),
    pytest.mark.skipif(
        not torch.__version__.startswith(TORCH), reason=f"its figures and its inside are those of torch {TORCH}"
    ),
]
BATCH = 256
# One block of ViT-B-48 at batch 256 under torch 2.14: kernels forward and backward, megabytes that they move, megabytes
# kept. With recomputation the inputs of LayerNorm and GELU are kept alone, for one more pass over each.
BUDGET = {False: (8, 25, 723, 1510, 316), True: (8, 25, 723, 1628, 198)}
# The same block with our norm and GELU in place of what Inductor writes.
BUDGET_OF_OURS = (8, 18, 723, 1399, 316)
KERNELS_OF_OURS = Counter(
    _forward_kernel=2, _gelu_kernel=1, _backward_kernel=2, _gelu_backward_kernel=1, _column_sum_kernel=3
)
# With our attention kernels alone.
BUDGET_OF_OWN_ATTENTION = (8, 23, 723, 1316, 315)


@cache
def block(recompute: bool, ours: bool = False, attention: AttentionBackend = FLASH) -> Region:
    config = model_config("vit_b_48")
    module = Block(config.width, config.heads, config.mlp_width).to(torch.bfloat16).train()
    module.attn.backend = attention
    for part in (module.norm1, module.norm2, module.mlp):
        part.execution = Execution(norm_in_regions=ours, gelu_in_regions=ours, bias_in_norm=ours)
    x, delta = (
        torch.zeros(BATCH, 1 + config.num_kept, config.width, dtype=torch.bfloat16, requires_grad=True)
        for _ in range(2)
    )
    arguments = (module, x, delta, module.mlp.fc2.bias if ours else None, ours, None, None)
    with on_a_hopper_gpu() if ours or attention is not FLASH else nullcontext():
        return lower_region(Block.compute, arguments, results=2, budget=RECOMPUTE_BUDGET if recompute else 1.0)


@contextmanager
def on_a_hopper_gpu() -> Iterator[None]:
    """Our kernels are called as on a GPU, and taken apart."""
    modules = [importlib.import_module(f"mirl.kernels.{name}") for name in ("bias_gelu", "residual_layer_norm")]
    with ExitStack() as entered:
        for module in modules:
            entered.enter_context(mock.patch.object(module, "multiprocessors", lambda device: 132))
        entered.enter_context(as_on_a_gpu())
        assert set_inlined(True)
        entered.callback(set_inlined, False)
        yield


def check_budget(region: Region, budget: tuple[int, ...]) -> None:
    found = (
        len(region.forward.kernels), len(region.backward.kernels), region.forward.bytes / 1e6,
        region.backward.bytes / 1e6, region.saved / 1e6,
    )  # fmt: skip
    for figure, allowed in zip(found, budget, strict=True):
        assert 0.97 * allowed <= figure <= allowed, f"{found} for {budget}"


@pytest.mark.parametrize("recompute", [False, True])
def test_a_block_keeps_its_budget(recompute):
    check_budget(block(recompute), BUDGET[recompute])


def test_inductor_launches_our_kernels_itself_and_copies_nothing_for_them():
    region = block(False, ours=True)
    check_budget(region, BUDGET_OF_OURS)
    assert region.forward.fallbacks == region.backward.fallbacks == []
    found = Counter(name for name, _ in region.forward.kernels + region.backward.kernels)
    assert {name: found[name] for name in KERNELS_OF_OURS} == KERNELS_OF_OURS
    # torch keys its cache of compiled graphs with the source of the kernels that it knows an operator to have.
    for name, kernels in (("bias_gelu", 1), ("layer_norm", 1), ("residual_layer_norm", 1), ("bias_gelu_backward", 2)):
        assert len(get_triton_kernels_for_op(f"mirl_kernels::{name}_inlined")) == kernels
    assert len(get_triton_kernels_for_op("mirl_kernels::residual_layer_norm_backward_inlined")) == 2


@pytest.mark.parametrize("recompute", [False, True])
def test_nothing_but_products_and_attention_is_left_to_aten(recompute):
    region = block(recompute)
    assert region.forward.fallbacks == region.backward.fallbacks == []
    products = [name for name, _ in region.forward.kernels + region.backward.kernels if "mm" in name]
    assert len(products) == 3 * 4


def test_our_attention_is_launched_by_compiled_code_with_neither_copies_nor_second_reads():
    region = block(False, attention=OWN)
    check_budget(region, BUDGET_OF_OWN_ATTENTION)
    assert region.forward.fallbacks == region.backward.fallbacks == []
    names = [name for name, _ in region.forward.kernels + region.backward.kernels]
    # One forward, two backward, of which the second adds up the bias.
    ours = ("_short_attention_kernel", "_short_attention_backward_kernel", "_column_sum_kernel")
    assert [names.count(name) for name in ours] == [1, 1, 1]
    # Three gradients that a copy brings into one buffer, and that buffer read again for the bias.
    assert not any("cat" in name or "copy" in name or "clone" in name for name in names)
    assert sum("cat" in name for name, _ in block(False).backward.kernels) == 3


def test_recomputation_keeps_fewer_bytes_in_a_compiled_block():
    config = model_config("vit_b_48")
    spared = block(False).saved - block(True).saved
    # The outputs of two norms and of the GELU: 6 of 16 values a token and width, in bfloat16.
    assert spared == pytest.approx(6 * 2 * BATCH * (1 + config.num_kept) * config.width, rel=0.01)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_memory_estimate_is_what_a_compiled_block_keeps(recompute):
    config = model_config("vit_b_48")
    estimate = 2 * BATCH * encoder_block_values(config, recompute=recompute)
    assert block(recompute).saved == pytest.approx(estimate, rel=0.01)


def test_an_operator_that_inductor_cannot_fuse_is_seen():
    def sorts(x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.solve_triangular(x.exp(), x, upper=True)

    x = torch.zeros(64, 64, requires_grad=True)
    assert lower_region(sorts, (x,), results=1).forward.fallbacks
