"""A compiled block as Inductor would run it on an H100: kernels, bytes, and what it keeps for the backward pass."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from mirl.engine.accounting.activations import encoder_block_values
from mirl.engine.accounting.fake_step import FLASH, OWN
from mirl.engine.models import model_config
from mirl.engine.models.layers import Block
from mirl.engine.training.compiling import RECOMPUTE_BUDGET
from mirl.kernels.attention import AttentionBackend
from mirl.kernels.dispatch import as_on_a_gpu
from mirl.kernels.triton_import import HAS_TRITON, INTERPRETED
from tests.dry_run.lowering import TORCH, TRITON, Region, lower_region

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
# With our attention kernels, whose outputs Inductor counts twice, as it does for every kernel that it did not write.
OWN_BUDGET = (8, 23, 742, 1378, 315)


@cache
def block(recompute: bool, attention: AttentionBackend = FLASH) -> Region:
    config = model_config("vit_b_48")
    module = Block(config.width, config.heads, config.mlp_width).to(torch.bfloat16).train()
    module.attn.backend = attention
    x, delta = (
        torch.zeros(BATCH, 1 + config.num_kept, config.width, dtype=torch.bfloat16, requires_grad=True)
        for _ in range(2)
    )
    arguments = (module, x, delta, None, None)
    with as_on_a_gpu():
        return lower_region(Block.compute, arguments, results=2, budget=RECOMPUTE_BUDGET if recompute else 1.0)


def figures(region: Region) -> tuple[float, ...]:
    return (
        len(region.forward.kernels), len(region.backward.kernels), region.forward.bytes / 1e6,
        region.backward.bytes / 1e6, region.saved / 1e6,
    )  # fmt: skip


@pytest.mark.parametrize("recompute", [False, True])
def test_a_block_keeps_its_budget(recompute):
    found = figures(block(recompute))
    for figure, allowed in zip(found, BUDGET[recompute], strict=True):
        assert 0.97 * allowed <= figure <= allowed, f"{found} for {BUDGET[recompute]}"


@pytest.mark.parametrize("recompute", [False, True])
def test_nothing_but_products_and_attention_is_left_to_aten(recompute):
    region = block(recompute)
    assert region.forward.fallbacks == region.backward.fallbacks == []
    products = [name for name, _ in region.forward.kernels + region.backward.kernels if "mm" in name]
    assert len(products) == 3 * 4


def test_our_attention_is_launched_by_compiled_code_with_neither_copies_nor_second_reads():
    region = block(False, OWN)
    for figure, allowed in zip(figures(region), OWN_BUDGET, strict=True):
        assert 0.97 * allowed <= figure <= allowed, f"{figures(region)} for {OWN_BUDGET}"
    assert region.forward.fallbacks == region.backward.fallbacks == []
    names = [name for name, _ in region.forward.kernels + region.backward.kernels]
    assert names.count(TRITON) == 3  # one forward, two backward, of which the second adds up the bias
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
