import subprocess
import sys

import pytest
import torch

from mirl import kernels
from mirl.kernels.dispatch import uses_triton
from mirl.kernels.triton_import import INTERPRETED, TRITON_VERSION
from tests.support.launch import CHECKOUT


def test_description_names_every_op():
    described = kernels.describe_dispatch("cpu")
    assert {"gather_patches", "scatter_tokens", "masked_residual_mse"} <= described.keys() <= set(kernels.__all__)
    expected = f"triton {TRITON_VERSION} interpreted" if INTERPRETED else "torch on cpu"
    assert all(chosen.startswith(expected) for chosen in described.values())
    assert uses_triton(torch.zeros(1)) is INTERPRETED
    assert not uses_triton(torch.zeros(1, dtype=torch.float64))


def test_set_debug_is_a_switch():
    kernels.set_debug(True)
    with pytest.raises(ValueError):
        kernels.gather_tokens(torch.zeros(1, 2, 3), torch.tensor([[0, 0]]))
    kernels.set_debug(False)
    assert kernels.gather_tokens(torch.zeros(1, 2, 3), torch.tensor([[0, 0]])).shape == (1, 2, 3)


def test_imports_without_triton_and_xformers():
    """CPU use needs neither; a kernel launched all the same ends with the pip line, xformers is not even looked for."""
    program = """
import sys
sys.modules["triton"] = None
import torch, mirl.kernels
from mirl.errors import UserError
from mirl.kernels.gather_tokens import gather_tokens_op
x, ids = torch.ones(1, 2, 3), torch.tensor([[1]])
assert mirl.kernels.gather_tokens(x, ids).shape == (1, 1, 3)
assert "not installed" in mirl.kernels.describe_dispatch("cuda")["gather_tokens"]
try:
    gather_tokens_op(x, ids)
except UserError as error:
    assert "pip install triton" in str(error), error
else:
    raise AssertionError("launched without triton")
mirl.kernels.attention(x[None], x[None], x[None])
assert "xformers" not in sys.modules, "imported before anybody asked for it"
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(INTERPRETED, reason="the interpreter's ops are covered by test_registered_ops.py")
def test_compiles_on_a_cpu_without_a_graph_break():
    def step(x, ids, restore, fill):
        kept = kernels.gather_tokens(x, ids)
        return (
            kernels.scatter_tokens(torch.cat([fill.expand(len(x), 1, -1), kept], 1), ids, restore, fill).square().sum()
        )

    x, fill = torch.randn(2, 4, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    ids, restore = torch.tensor([[0, 1], [1, 3]]), torch.tensor([[0, 1, 2, 3], [2, 0, 3, 1]])
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    loss, expected = compiled(x, ids, restore, fill), step(x, ids, restore, fill)
    grads = [torch.autograd.grad(value, (x, fill)) for value in (loss, expected)]
    assert torch.allclose(loss, expected)
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b)
