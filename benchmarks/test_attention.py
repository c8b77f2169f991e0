"""Which attention backend wins at the lengths of this model: 50 (encoder), 197 (decoder), 197 on 50..300 (DID).

Counted bytes: q, k, v read and the output written once forward; backward reads those and the output's gradient, and
writes three gradients. A kernel that holds all keys and values of a head on chip moves no more than that.
"""

import pytest
import torch

from benchmarks.measure import device, rotated, time_calls
from mirl import kernels
from mirl.errors import UserError

ON_GPU = device().type == "cuda"
# A CPU without AMX trains in float32: bfloat16 there takes most of a minute, and nobody waits for it.
IN_BF16 = [torch.bfloat16] if ON_GPU or torch.cpu._is_amx_tile_supported() else []
DTYPES = (*([] if ON_GPU else [torch.float32]), *IN_BF16)
HEAD_DIMS = (32, 64) if ON_GPU else (32,)
BATCH = 256 if ON_GPU else 4
WIDTH = 384
DID_KEYS = (50, 100, 150, 200, 250, 300) if ON_GPU else (50, 300)
LENGTHS = [(50, 50), (197, 197), *((197, keys) for keys in DID_KEYS), *((147, keys) for keys in DID_KEYS if ON_GPU)]
BACKENDS = ("math", "sdpa", "xformers") if ON_GPU else ("math", "sdpa")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("queries, keys", LENGTHS)
def test_attention(benchmark, results, queries, keys, head_dim, dtype, direction, backend):
    torch.manual_seed(0)
    heads = WIDTH // head_dim
    benchmark.group = f"attention {direction} {queries}x{keys} d{head_dim} {dtype}"
    try:
        resolved = kernels.resolve_attention_backend(backend, device=device(), dtype=dtype, head_dim=head_dim)
    except UserError as error:
        pytest.skip(str(error))
    # Views of a qkv and a kv projection, as in the model.
    qkv = torch.randn(BATCH, queries, 3, heads, head_dim, device=device(), dtype=dtype)
    kv = torch.randn(BATCH, keys, 2, heads, head_dim, device=device(), dtype=dtype)
    grad = torch.randn(BATCH, queries, heads, head_dim, device=device(), dtype=dtype)
    backward = direction == "forward_backward"

    def run(qkv, kv, grad):
        q, k, v = (x.detach().requires_grad_(backward) for x in (qkv[:, :, 0], kv[:, :, 0], kv[:, :, 1]))
        out = kernels.attention(q, k, v, backend=resolved)
        return torch.autograd.grad(out, (q, k, v), grad) if backward else out

    # Forward: q, k, v in, out. Backward: q, k, v, the output and its gradient in, three gradients out.
    tokens = 2 * queries + 2 * keys + (4 * queries + 4 * keys if backward else 0)
    moved = BATCH * tokens * WIDTH * dtype.itemsize
    timing = time_calls(benchmark, run, rotated((qkv, kv, grad)), moved)
    results.add_attention(queries, keys, head_dim, BATCH, dtype, direction, backend, moved, timing)
