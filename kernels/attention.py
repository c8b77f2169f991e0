"""Compute attention by one of several backends, resolved at start by running it forward and backward.

Letters: B batch, S queries, T keys, H heads, d head size. All tensors are [B, S or T, H, d]; scale 1/sqrt(d); no mask,
no dropout. Softmax statistics are float32 in every backend.

Orders tried by `auto`:

| device | purpose | order |
|---|---|---|
| GPU | "cross" (DID) | xformers, sdpa, math |
| GPU | "self" | sdpa, xformers, math |
| CPU | both | math, sdpa |

On a CPU `math` is never far behind and mostly ahead. Forward + backward, batch 4, H * d = 384, one thread of a Xeon,
torch 2.13, medians in milliseconds, math / sdpa (benchmarks/results/Intel-R-Xeon-R-Processor_2026-11-22.md):

| queries x keys | float32 d 32 | float32 d 64 | bfloat16 d 32 | bfloat16 d 64 |
|---|---|---|---|---|
| 50 x 50 | 1.59 / 1.83 | 1.87 / 2.01 | 2.05 / 11.6 | 1.99 / 5.34 |
| 197 x 197 | 13.6 / 18.8 | 10.3 / 10.6 | 8.3 / 29.6 | 5.5 / 16.5 |
| 197 x 50 | 4.7 / 5.5 | 3.7 / 5.1 | 4.8 / 24.9 | 3.3 / 11.1 |
| 197 x 300 | 18.8 / 16.6 | 16.7 / 18.2 | 11.8 / 30.3 | 8.0 / 18.4 |

SDPA's fused CPU kernel is mostly ahead in the forward pass alone, and needs no S * T buffer: ask for it by name when
memory is short. `pytest benchmarks/` measures again.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from mirl.errors import UserError
from mirl.kernels.decoder_attention import decoder_attention, decoder_attention_refusal, with_bias_gradient
from mirl.kernels.short_attention import short_attention, short_attention_refusal
from mirl.kernels.triton_import import HAS_TRITON

BACKENDS = ("auto", "xformers", "sdpa", "math")
XFORMERS_INSTALL = 'pip install "xformers>=0.0.35" "nvidia-cuda-runtime-cu12>=12.8"'

_AUTO_ORDER = {
    ("cuda", "cross"): ("xformers", "sdpa", "math"),
    ("cuda", "self"): ("sdpa", "xformers", "math"),
    ("cpu", "cross"): ("math", "sdpa"),
    ("cpu", "self"): ("math", "sdpa"),
}


@dataclass(frozen=True)
class AttentionBackend:
    """A backend is told by its `name`: xformers, sdpa, math, or a candidate of a choice.

    `reason` says why it was chosen and which backends failed before it. `otherwise` names the backend that computes
    what is past the limits of "own".
    """

    name: str
    reason: str
    otherwise: str = "sdpa"

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def math_attention(q_BSHd: Tensor, k_BTHd: Tensor, v_BTHd: Tensor) -> Tensor:
    """Write attention out as matmul, softmax, matmul: two batched GEMMs over B * H.

    torch's softmax of bfloat16 and float16 keeps its maximum and sum in float32. Asking it for a float32 result as well
    costs two more passes over S * T and changes 1e-5 of the values (a unit in the last place).
    """
    batch, queries, heads, size = q_BSHd.shape
    q_NSd, k_NTd, v_NTd = (
        x.transpose(1, 2).reshape(batch * heads, x.shape[1], size) for x in (q_BSHd * size**-0.5, k_BTHd, v_BTHd)
    )
    weights_NST = torch.softmax(torch.bmm(q_NSd, k_NTd.transpose(1, 2)), dim=-1)
    return torch.bmm(weights_NST, v_NTd).view(batch, heads, queries, size).transpose(1, 2)


def sdpa_attention(q_BSHd: Tensor, k_BTHd: Tensor, v_BTHd: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(
        q_BSHd.transpose(1, 2), k_BTHd.transpose(1, 2), v_BTHd.transpose(1, 2)
    ).transpose(1, 2)


def flash_attention(q_BSHd: Tensor, k_BTHd: Tensor, v_BTHd: Tensor) -> Tensor:
    """Call SDPA's FlashAttention by its own name: SDPA itself would choose by the device of the tensors."""
    return torch.ops.aten._scaled_dot_product_flash_attention(
        q_BSHd.transpose(1, 2), k_BTHd.transpose(1, 2), v_BTHd.transpose(1, 2), 0.0, False, return_debug_mask=False
    )[0].transpose(1, 2)


def _named_kernel(operator: str, *arguments: object) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return one of SDPA's kernels by its own name. It raises if it cannot run; SDPA itself would take another."""

    def run(q_BSHd: Tensor, k_BTHd: Tensor, v_BTHd: Tensor) -> Tensor:
        function = getattr(torch.ops.aten, operator)
        q, k, v = (x.transpose(1, 2) for x in (q_BSHd, k_BTHd, v_BTHd))
        return function(q, k, v, *arguments)[0].transpose(1, 2)

    return run


@lru_cache(maxsize=1)
def _xformers_function() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return importlib.import_module("xformers.ops").memory_efficient_attention


def xformers_attention(q_BSHd: Tensor, k_BTHd: Tensor, v_BTHd: Tensor) -> Tensor:
    return _xformers_function()(q_BSHd, k_BTHd, v_BTHd)


def own_refusal(q: Tensor, kv_BT2D: Tensor | None, heads: int) -> str | None:
    """Say why our kernels do not take these tensors (see `packed_attention`); None if they take them."""
    packed = kv_BT2D is None
    queries, keys = q.shape[1], (q if kv_BT2D is None else kv_BT2D).shape[1]
    size = q.shape[-1] // (heads * (3 if packed else 1))
    if q.device.type == "cuda" and q.dtype not in (torch.bfloat16, torch.float16):
        return f"its products are of bfloat16 or float16, not {q.dtype}"
    if q.device.type == "cuda" and not HAS_TRITON:
        return "triton is not installed"
    if packed and short_attention_refusal(queries, size) is None:
        return None
    return decoder_attention_refusal(queries, keys, size)


def own_packed_attention(
    q: Tensor, kv_BT2D: Tensor | None, heads: int, bias: Tensor | None = None, kv_bias_2D: Tensor | None = None
) -> Tensor:
    """Compute `packed_attention` by our kernels. Raises ValueError, with the reason, for tensors past their limits."""
    refusal = own_refusal(q, kv_BT2D, heads)
    if refusal is not None:
        raise ValueError(f"own attention has limits: {refusal}")
    if kv_BT2D is None and short_attention_refusal(q.shape[1], q.shape[-1] // (3 * heads)) is None:
        return short_attention(q, heads, bias)
    return decoder_attention(q, kv_BT2D, heads, bias, kv_bias_2D)


def _own_attention(q_BSHd: Tensor, k_BTHd: Tensor, v_BTHd: Tensor) -> Tensor:
    """Compute attention by our kernels for callers without buffers: keys and values are copied into one."""
    kv_BT2D = torch.cat([k_BTHd.flatten(2), v_BTHd.flatten(2)], dim=-1)
    return own_packed_attention(q_BSHd.flatten(2), kv_BT2D, q_BSHd.shape[2]).unflatten(-1, q_BSHd.shape[2:])


_IMPLEMENTATIONS = {"xformers": xformers_attention, "sdpa": sdpa_attention, "math": math_attention}
# A caller cannot ask for the rest by name. "flash" is the dry run's (mirl.engine.accounting.fake_step). A run may
# choose the others by measuring them (mirl.engine.training.choices). Their arguments say: no mask, compute the sums
# that the backward pass reads, no dropout.
_IMPLEMENTATIONS["flash"] = flash_attention
_IMPLEMENTATIONS["own"] = _own_attention
_IMPLEMENTATIONS["sdpa_cudnn"] = _named_kernel("_scaled_dot_product_cudnn_attention", None, True)
_IMPLEMENTATIONS["sdpa_flash"] = _named_kernel("_scaled_dot_product_flash_attention")
_IMPLEMENTATIONS["sdpa_efficient"] = _named_kernel("_scaled_dot_product_efficient_attention", None, True)
_IMPLEMENTATIONS["sdpa_cpu"] = _named_kernel("_scaled_dot_product_flash_attention_for_cpu")
_IMPLEMENTATIONS["sdpa_math"] = _named_kernel("_scaled_dot_product_attention_math")
# The candidates of a choice by measurement, by device. All give the same result, up to rounding.
CANDIDATES = {
    "cuda": ("sdpa", "sdpa_cudnn", "sdpa_flash", "sdpa_efficient", "xformers", "own", "math"),
    "cpu": ("math", "sdpa", "sdpa_cpu", "sdpa_math"),
}


def implementation(name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return the function behind a backend's name or behind one of `CANDIDATES`; KeyError for another name."""
    return _IMPLEMENTATIONS[name]


def probe_backend(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Run `name` forward and backward on tiny tensors, keys and values strided as in the model.

    Returns None when it works, else the reason in one line. Every exception becomes a reason: an extension that cannot
    load raises anything from ImportError to NotImplementedError.
    """
    q_BSHd = torch.ones(1, 8, 1, head_dim, device=device, dtype=dtype, requires_grad=True)
    kv_BT2Hd = torch.ones(1, 24, 2, 1, head_dim, device=device, dtype=dtype, requires_grad=True)
    try:
        with torch.enable_grad():
            out = _IMPLEMENTATIONS[name](q_BSHd, kv_BT2Hd[:, :, 0], kv_BT2Hd[:, :, 1])
            out.float().sum().backward()
        # Equal values under any softmax weights come back as they are.
        if not torch.allclose(out.float(), torch.ones_like(out, dtype=torch.float32), atol=2e-2):
            return f"{name} gave a wrong result for {dtype}, head size {head_dim}"
    except Exception as error:  # noqa: BLE001 - reported to the caller, who raises or prints it
        first_line = (str(error).strip() or "no message").splitlines()[0]
        return f"{name}: {type(error).__name__}: {first_line[:200]}"
    return None


@lru_cache(maxsize=64)
def _resolve(requested: str, device: torch.device, dtype: torch.dtype, head_dim: int, purpose: str) -> AttentionBackend:
    if requested != "auto":
        failure = probe_backend(requested, device, dtype, head_dim)
        if failure is None:
            return AttentionBackend(requested, "asked for")
        if requested == "xformers":
            raise UserError(
                f"attention backend 'xformers' cannot run {dtype}, head size {head_dim} on {device} ({failure}). "
                f"It needs a CUDA GPU and: {XFORMERS_INSTALL} - or choose auto, sdpa or math"
            )
        raise UserError(f"attention backend {requested!r} cannot run on {device} ({failure}); choose auto")
    failures = []
    for name in _AUTO_ORDER["cpu" if device.type == "cpu" else "cuda", purpose]:
        failure = probe_backend(name, device, dtype, head_dim)
        if failure is None:
            why = f"auto: first choice for {purpose} attention on {device.type}"
            return AttentionBackend(name, why if not failures else f"auto: fell back, {'; '.join(failures)}")
        failures.append(failure)
    raise UserError(f"no attention backend runs {dtype}, head size {head_dim} on {device}: {'; '.join(failures)}")


def resolve_attention_backend(
    requested: str = "auto",
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    purpose: str = "self",
) -> AttentionBackend:
    """Choose the backend once, at start, by a tiny forward + backward of the run's dtype and head size.

    `purpose` is "self" or "cross" (the DID's cross-attention, for which xformers is the first choice on a GPU).
    Raises: ValueError for an unknown name or purpose; UserError when a backend asked for by name cannot run (for
    xformers with the pip line), never for `auto` while anything runs: it falls back and says why in `reason`.
    """
    if requested not in BACKENDS:
        raise ValueError(f"attention backend is {requested!r}; it must be one of {', '.join(BACKENDS)}")
    if purpose not in ("self", "cross"):
        raise ValueError(f"purpose is {purpose!r}; it must be 'self' or 'cross'")
    return _resolve(requested, torch.device(device), dtype, int(head_dim), purpose)


def attention(q_BSHd: Tensor, k_BTHd: Tensor, v_BTHd: Tensor, *, backend: AttentionBackend | str = "auto") -> Tensor:
    """Compute softmax(q k^T / sqrt(d)) v -> [B, S, H, d]. q, k, v may be strided views (slices of a qkv or kv buffer).

    `backend` is best the result of `resolve_attention_backend`; a name is resolved here on first use.
    Raises: ValueError when shapes or dtypes do not fit together; for a name also what resolving it raises.
    """
    if (
        q_BSHd.dim() != 4
        or k_BTHd.shape != v_BTHd.shape
        or k_BTHd.dim() != 4
        or q_BSHd.shape[0] != k_BTHd.shape[0]
        or q_BSHd.shape[2:] != k_BTHd.shape[2:]
    ):
        raise ValueError(
            f"q {list(q_BSHd.shape)}, k {list(k_BTHd.shape)}, v {list(v_BTHd.shape)} do not fit together; "
            "[B, S, H, d], [B, T, H, d] and [B, T, H, d] are needed"
        )
    if not q_BSHd.dtype == k_BTHd.dtype == v_BTHd.dtype:
        raise ValueError(f"q is {q_BSHd.dtype}, k {k_BTHd.dtype}, v {v_BTHd.dtype}; cast them to one dtype")
    if not isinstance(backend, AttentionBackend):
        backend = resolve_attention_backend(
            backend, device=q_BSHd.device, dtype=q_BSHd.dtype, head_dim=q_BSHd.shape[-1]
        )
    return _IMPLEMENTATIONS[backend.name](q_BSHd, k_BTHd, v_BTHd)


def sums_bias(backend: str, queries: int, keys: int, head_size: int) -> bool:
    """Say whether the backward pass of `packed_attention` sums the gradients of given biases without a further pass."""
    if backend != "own":
        return False
    if queries == keys and short_attention_refusal(queries, head_size) is None:
        return True
    return decoder_attention_refusal(queries, keys, head_size) is None


def packed_attention(
    q: Tensor,
    kv_BT2D: Tensor | None,
    heads: int,
    *,
    backend: AttentionBackend | str = "auto",
    bias: Tensor | None = None,
    kv_bias_2D: Tensor | None = None,
) -> Tensor:
    """Compute `attention` of buffers as matrix products leave them -> [B, R, D], with D = heads * d.

    q           queries [B, R, D]; or queries, keys and values [B, S, 3D] if `kv_BT2D` is None
    kv_BT2D     keys and values; any strides in B and T
    bias        [3D], the bias of queries, keys and values; or [D], the bias of the queries alone, beside `kv_bias_2D`
    kv_bias_2D  the bias of keys and values

    The biases are in the buffers already, detached there, and are not added again. They are given so that they get
    their gradients here, without a further pass if `sums_bias` says so.

    Our kernels ("own") take the buffers as they are, within their limits. Other backends take views.
    """
    if isinstance(backend, AttentionBackend) and backend.name == "own":
        if own_refusal(q, kv_BT2D, heads) is None:
            return own_packed_attention(q, kv_BT2D, heads, bias, kv_bias_2D)
        backend = AttentionBackend(backend.otherwise, "past the limits of own")
    q, kv_BT2D = with_bias_gradient(q, kv_BT2D, bias, kv_bias_2D)
    parts = q.chunk(3, dim=-1) if kv_BT2D is None else (q, *kv_BT2D.chunk(2, dim=-1))
    q_BRHd, k_BTHd, v_BTHd = (x.unflatten(-1, (heads, -1)) for x in parts)
    return attention(q_BRHd, k_BTHd, v_BTHd, backend=backend).flatten(2)
