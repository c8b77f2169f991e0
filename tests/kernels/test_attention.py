import importlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mirl import kernels
from mirl.errors import UserError
from mirl.kernels.attention import CANDIDATES, implementation, own_refusal
from tests.kernels.support import assert_near, leaf, randn, unit_roundoff

attention_module = importlib.import_module("mirl.kernels.attention")
resolve = kernels.resolve_attention_backend

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BACKENDS = ["math", "sdpa", pytest.param("xformers", marks=pytest.mark.gpu)]


def truth(q, k, v):
    weights = torch.einsum("bshd,bthd->bhst", q, k).div(q.shape[-1] ** 0.5).softmax(-1)
    return torch.einsum("bhst,bthd->bshd", weights, v)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "queries, keys, heads, size", [(50, 50, 2, 32), (7, 93, 3, 64), (1, 1, 1, 32), (20, 33, 2, 24)]
)
def test_against_float64(device, backend, dtype, queries, keys, heads, size):
    if backend == "xformers" and device == "cpu":
        pytest.skip("xformers runs on CUDA only")
    q, q_64 = leaf(randn(2, queries, heads, size, device=device, dtype=dtype, seed=1))
    k, k_64 = leaf(randn(2, keys, heads, size, device=device, dtype=dtype, seed=2))
    v, v_64 = leaf(randn(2, keys, heads, size, device=device, dtype=dtype, seed=3))
    grad = randn(2, queries, heads, size, device=device, dtype=dtype, seed=4)
    out, expected = kernels.attention(q, k, v, backend=backend), truth(q_64, k_64, v_64)
    out.backward(grad)
    expected.backward(grad.double().cpu())
    # Scores, weights and output are rounded to the dtype on the way: a few roundings of the largest value; scores of
    # size 5 turn a rounding of u into 5 u of the weight.
    loose = 4e-6 + 12 * unit_roundoff(dtype)
    assert_near(out, expected, sums=loose, name="out")
    for name, x, x_64 in (("dq", q, q_64), ("dk", k, k_64), ("dv", v, v_64)):
        assert_near(x.grad, x_64.grad, sums=2 * loose, size=0.1, name=name)  # one key: dq is a difference of equals, 0


@pytest.mark.parametrize("backend", ["math", "sdpa"])
def test_strided_views(backend):
    """q, k, v sliced from one qkv projection, keys a prefix of a longer kv buffer."""
    qkv = randn(2, 12, 3, 2, 16, device="cpu", dtype=torch.float32, seed=1)
    q, k, v = qkv[:, :, 0], qkv[:, :9, 1], qkv[:, :9, 2]
    expected = kernels.attention(q.contiguous(), k.contiguous(), v.contiguous(), backend=backend)
    assert torch.allclose(
        kernels.attention(q, k, v, backend=backend), expected, atol=1e-6
    )  # another order of float32 sums


def test_large_scores_stay_finite():
    q = torch.full((1, 4, 1, 32), 60.0, dtype=torch.float16)
    out = kernels.attention(q, q, torch.ones_like(q), backend="math")
    assert torch.equal(out, torch.ones_like(out))  # scores of 20000 in float16 range, whose exponentials are not


@pytest.mark.parametrize("purpose", ["self", "cross"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_auto_on_cpu_follows_the_measurement(purpose, dtype):
    backend = resolve("auto", device="cpu", dtype=dtype, head_dim=32, purpose=purpose)
    assert backend.name == "math"
    assert "first choice" in str(backend)


def test_auto_falls_back_and_says_why(monkeypatch):
    def broken(*_):
        raise NotImplementedError("no kernel\nsecond line")

    monkeypatch.setitem(attention_module._IMPLEMENTATIONS, "math", broken)
    attention_module._resolve.cache_clear()
    try:
        backend = resolve("auto", device="cpu", dtype=torch.float32, head_dim=48)
    finally:
        attention_module._resolve.cache_clear()
    assert backend.name == "sdpa"
    assert backend.reason == "auto: fell back, math: NotImplementedError: no kernel"


def test_a_backend_with_wrong_results_is_not_chosen(monkeypatch):
    monkeypatch.setitem(attention_module._IMPLEMENTATIONS, "math", lambda q, k, v: q * 0 + 2 * v[:, :1])
    attention_module._resolve.cache_clear()
    try:
        assert resolve("auto", device="cpu", dtype=torch.float32, head_dim=48).name == "sdpa"
        with pytest.raises(UserError, match="wrong result"):
            resolve("math", device="cpu", dtype=torch.float32, head_dim=48)
    finally:
        attention_module._resolve.cache_clear()


def test_explicit_xformers_that_cannot_run_names_the_pip_line():
    with pytest.raises(UserError) as error:
        resolve("xformers", device="cpu", dtype=torch.float32, head_dim=32, purpose="cross")
    assert 'pip install "xformers>=0.0.35" "nvidia-cuda-runtime-cu12>=12.8"' in str(error.value)


@pytest.mark.gpu
def test_cross_attention_takes_xformers_on_a_gpu():
    """Where xformers runs when it is asked for by name, auto takes it; where it does not, auto says why not."""
    settings = {"device": "cuda", "dtype": torch.bfloat16, "head_dim": 32, "purpose": "cross"}
    try:
        runs = resolve("xformers", **settings).name == "xformers"
    except UserError:
        runs = False
    backend = resolve("auto", **settings)
    assert (backend.name == "xformers") == runs
    assert runs or "xformers:" in backend.reason


def test_refuses():
    x = torch.zeros(1, 4, 2, 8)
    with pytest.raises(ValueError, match="'flash'"):
        kernels.attention(x, x, x, backend="flash")
    with pytest.raises(ValueError, match="purpose is 'did'"):
        resolve("auto", device="cpu", dtype=torch.float32, head_dim=8, purpose="did")
    with pytest.raises(ValueError, match="do not fit together"):
        kernels.attention(x, x[:, :, :1], x)
    with pytest.raises(ValueError, match="cast them to one dtype"):
        kernels.attention(x, x.half(), x)


def test_our_kernels_refuse_what_they_are_not_made_for_and_say_why():
    with FakeTensorMode():
        for dtype, queries, keys, size, reason in (
            (torch.float32, 197, 50, 32, "its products are of bfloat16 or float16, not torch.float32"),
            (torch.bfloat16, 577, 50, 32, "it holds 1 to 256 queries, not 577"),
            (torch.bfloat16, 197, 321, 32, "it holds 1 to 320 keys, not 321"),
            (torch.bfloat16, 197, 197, 64, "its heads have a size of 32, not 64"),
        ):
            q = torch.empty(2, queries, 4, size, device="cuda", dtype=dtype)
            kv = torch.empty(2, keys, 2, 4, size, device="cuda", dtype=dtype)
            with pytest.raises(ValueError, match=f"own attention has limits: {reason}"):
                implementation("own")(q, kv[:, :, 0], kv[:, :, 1])
        # Packed and short, heads of 64 are fine; the model computes the rest with SDPA.
        packed = torch.empty(2, 64, 3 * 256, device="cuda", dtype=torch.bfloat16)
        own = kernels.AttentionBackend("own", "for a test")
        assert own_refusal(packed, None, 4) is None
        assert kernels.packed_attention(packed, None, 8, backend=own).shape == (2, 64, 256)
        assert kernels.packed_attention(packed.repeat(1, 9, 1), None, 8, backend=own).shape == (2, 576, 256)


def test_kernels_of_sdpa_by_name_take_what_the_model_gives_them():
    """On fake tensors of a GPU: arguments and shapes are checked, nothing is computed."""
    with FakeTensorMode():
        q = torch.empty(4, 197, 12, 32, device="cuda", dtype=torch.bfloat16)
        kv = torch.empty(4, 147, 2, 12, 32, device="cuda", dtype=torch.bfloat16)
        for name in set(CANDIDATES["cuda"]) - {"xformers"}:
            out = implementation(name)(q, kv[:, :, 0], kv[:, :, 1])
            assert (out.shape, out.dtype, out.device) == (q.shape, q.dtype, q.device), name
