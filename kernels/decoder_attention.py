"""Compute the attention of the decoders, self and cross: up to 256 queries over up to 320 keys, heads of 32, on chip.

Letters: B batch, R queries, T keys, H heads, d head size, D = H d. Queries are [B, R, D]; keys and values are
[B, T, 2D], with any strides in B and T; or all three are packed, [B, S, 3D], with R = T = S. The gradient of keys and
values has their strides.

In the forward pass a program takes one head of one image, keeps its keys and values on chip, and goes through the
queries. In the backward pass it keeps the queries, the output's gradient and the gradient of q on chip and goes through
the keys. The gradients of a tile of keys are complete when the program leaves it. So each tensor is read and written
once, and no gradient is added up in memory.

Bytes at least, in D: forward R + 2 T read, R written, a float32 value a row and head; backward 3 R + 2 T read, R + 2 T
written. B = 256, R = T = 197, D = 512, bfloat16: 206 and 413 MB.

The gradients of the biases in q, k and v come in the backward pass: 3 D float32 values an image, added up by a second
stage. Each is a sum over all rows. For q the gradients are added up. For k the sum is zero, because a constant added to
all scores of a query changes no weight. For v it is the sum of the output's gradient, because a query's weights add up
to one.
"""

import functools

import torch
from torch import Tensor

from mirl.kernels.checks import check_device, check_float, check_shape
from mirl.kernels.column_sum import column_sum
from mirl.kernels.dispatch import uses_triton
from mirl.kernels.launch import ceil_div, on_device_of, rows_contiguous
from mirl.kernels.registration import KernelOp, wrap_triton
from mirl.kernels.triton_import import tl, triton

MOST_QUERIES = 256
MOST_KEYS = 320
HEAD_SIZE = 32
LOG2_E = 1.4426950408889634
KEYS = 64  # keys of a tile


def with_bias_gradient(
    q: Tensor, kv_BT2D: Tensor | None, bias: Tensor | None, kv_bias_2D: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the same values, with the biases in the graph: each is added as a zero, in float32 at least."""
    if bias is None:
        return q, kv_BT2D
    width = q.shape[-1]
    if kv_BT2D is None:
        return _add_zero(q, bias), None
    q_bias, kv_bias = (bias[:width], bias[width:]) if kv_bias_2D is None else (bias, kv_bias_2D)
    return _add_zero(q, q_bias), _add_zero(kv_BT2D, kv_bias)


def _add_zero(x: Tensor, bias: Tensor) -> Tensor:
    compute = torch.promote_types(x.dtype, torch.float32)
    return (x.to(compute) + (bias - bias.detach()).to(compute)).to(x.dtype)


def decoder_attention_reference(
    q: Tensor, kv_BT2D: Tensor | None, heads: int, bias: Tensor | None = None, kv_bias_2D: Tensor | None = None
) -> Tensor:
    """Compute two products with a softmax between them."""
    q, kv_BT2D = with_bias_gradient(q, kv_BT2D, bias, kv_bias_2D)
    q_BRD, k_BTD, v_BTD = q.chunk(3, dim=-1) if kv_BT2D is None else (q, *kv_BT2D.chunk(2, dim=-1))
    q_BHRd, k_BHTd, v_BHTd = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q_BRD, k_BTD, v_BTD))
    scores_BHRT = (q_BHRd * q_BHRd.shape[-1] ** -0.5) @ k_BHTd.transpose(-1, -2)
    return (torch.softmax(scores_BHRT, dim=-1) @ v_BHTd).transpose(1, 2).flatten(2)


@triton.jit
def _forward_kernel(
    q_ptr, kv_ptr, out_ptr, lse_ptr, queries, keys, q_stride_b, q_stride_r, kv_stride_b, kv_stride_t, exponent_scale,
    HEADS: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCKS: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    image, head = (tl.program_id(0) // HEADS).to(tl.int64), tl.program_id(0) % HEADS
    width = HEADS * SIZE
    row, key_row, column = tl.arange(0, ROWS), tl.arange(0, KEYS), tl.arange(0, SIZE)
    k_ptr = q_ptr + width if PACKED else kv_ptr
    k_ptr += image * kv_stride_b + head * SIZE
    all_k, all_v = (), ()
    for j in tl.static_range(BLOCKS):
        key = j * KEYS + key_row[:, None]
        source = k_ptr + key.to(tl.int64) * kv_stride_t + column[None, :]
        all_k = all_k + (tl.load(source, mask=key < keys, other=0.0),)
        all_v = all_v + (tl.load(source + width, mask=key < keys, other=0.0),)
    for start in range(0, queries, ROWS):
        query = start + row[:, None]
        q_source = q_ptr + image * q_stride_b + query * q_stride_r + head * SIZE + column[None, :]
        q = tl.load(q_source, mask=query < queries, other=0.0)
        largest = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((ROWS,), dtype=tl.float32)
        out = tl.zeros((ROWS, SIZE), dtype=tl.float32)
        for j in tl.static_range(BLOCKS):
            scores = tl.dot(q, tl.trans(all_k[j]), input_precision="ieee")
            if j == BLOCKS - 1:
                scores = tl.where(j * KEYS + key_row[None, :] < keys, scores, float("-inf"))
            larger = tl.maximum(largest, tl.max(scores, axis=1))
            weights = tl.exp2(scores * exponent_scale - (larger * exponent_scale)[:, None])
            before = tl.exp2((largest - larger) * exponent_scale)
            total = total * before + tl.sum(weights, axis=1)
            out = tl.dot(weights.to(q.dtype), all_v[j], out * before[:, None], input_precision="ieee")
            largest = larger
        target = out_ptr + (image * queries + query) * width + head * SIZE + column[None, :]
        tl.store(target, (out / total[:, None]).to(out_ptr.dtype.element_ty), mask=query < queries)
        lse = largest * exponent_scale + tl.log2(total)
        lse_target = lse_ptr + tl.program_id(0).to(tl.int64) * queries + start + row
        tl.store(lse_target, lse, mask=start + row < queries)


@triton.jit
def _backward_kernel(
    q_ptr, kv_ptr, out_ptr, lse_ptr, grad_ptr, grad_q_ptr, grad_kv_ptr, partial_ptr, queries, keys,
    q_stride_b, q_stride_r, kv_stride_b, kv_stride_t, grad_stride_b, grad_stride_r, gkv_stride_b, gkv_stride_t,
    exponent_scale, scale,
    HEADS: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCKS: tl.constexpr,
    PACKED: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    image, head = (tl.program_id(0) // HEADS).to(tl.int64), tl.program_id(0) % HEADS
    width = HEADS * SIZE
    row, key_row, column = tl.arange(0, ROWS), tl.arange(0, KEYS), tl.arange(0, SIZE)
    q_ptr += image * q_stride_b + head * SIZE
    sum_target = partial_ptr + image * (3 * width) + head * SIZE + column
    sum_grad = tl.zeros((ROWS, SIZE), dtype=tl.float32)
    all_q, all_grad, all_lse, all_delta, all_grad_q = (), (), (), (), ()
    for i in tl.static_range(BLOCKS):
        query = i * ROWS + row[:, None]
        inside = query < queries
        all_q = all_q + (tl.load(q_ptr + query * q_stride_r + column[None, :], mask=inside, other=0.0),)
        grad_source = grad_ptr + image * grad_stride_b + query * grad_stride_r + head * SIZE + column[None, :]
        grad = tl.load(grad_source, mask=inside, other=0.0)
        out_source = out_ptr + (image * queries + query) * width + head * SIZE + column[None, :]
        out = tl.load(out_source, mask=inside, other=0.0)
        all_grad = all_grad + (grad,)
        if BIAS:
            sum_grad += grad.to(tl.float32)
        all_delta = all_delta + (tl.sum(grad.to(tl.float32) * out.to(tl.float32), axis=1),)
        lse_source = lse_ptr + tl.program_id(0).to(tl.int64) * queries + i * ROWS + row
        # Rows past the last query get no weight: exp2 of minus infinity.
        all_lse = all_lse + (tl.load(lse_source, mask=i * ROWS + row < queries, other=float("inf")),)
        all_grad_q = all_grad_q + (tl.zeros((ROWS, SIZE), dtype=tl.float32),)
    if BIAS:
        # A bias of the values reaches each query once, because its weights add up to one. A bias of the keys adds the
        # same to all scores of a query, and the softmax takes it away again.
        tl.store(sum_target + width, tl.zeros((SIZE,), dtype=tl.float32))
        tl.store(sum_target + 2 * width, tl.sum(sum_grad, axis=0))
    k_ptr = (q_ptr + width) if PACKED else (kv_ptr + image * kv_stride_b + head * SIZE)
    gk_ptr = (grad_q_ptr + width) if PACKED else grad_kv_ptr
    gk_ptr += image * gkv_stride_b + head * SIZE
    for start in range(0, keys, KEYS):
        key = start + key_row[:, None]
        source = k_ptr + key.to(tl.int64) * kv_stride_t + column[None, :]
        k = tl.load(source, mask=key < keys, other=0.0)
        v = tl.load(source + width, mask=key < keys, other=0.0)
        grad_k = tl.zeros((KEYS, SIZE), dtype=tl.float32)
        grad_v = tl.zeros((KEYS, SIZE), dtype=tl.float32)
        summed = ()
        for i in tl.static_range(BLOCKS):
            scores = tl.dot(all_q[i], tl.trans(k), input_precision="ieee")
            # A weight is at most 1. The score of a key past the last means nothing, so its exponent has to be bounded.
            exponent = tl.minimum(scores * exponent_scale - all_lse[i][:, None], 0.0)
            weights = tl.exp2(exponent)
            grad_v = tl.dot(tl.trans(weights.to(k.dtype)), all_grad[i], grad_v, input_precision="ieee")
            grad_weights = tl.dot(all_grad[i], tl.trans(v), input_precision="ieee")
            grad_scores = (weights * (grad_weights - all_delta[i][:, None])).to(k.dtype)
            grad_k = tl.dot(tl.trans(grad_scores), all_q[i], grad_k, input_precision="ieee")
            # Keys past the last are zeros, so they add nothing here.
            summed = summed + (tl.dot(grad_scores, k, all_grad_q[i], input_precision="ieee"),)
        all_grad_q = summed
        target = gk_ptr + key.to(tl.int64) * gkv_stride_t + column[None, :]
        tl.store(target, (grad_k * scale).to(grad_q_ptr.dtype.element_ty), mask=key < keys)
        tl.store(target + width, grad_v.to(grad_q_ptr.dtype.element_ty), mask=key < keys)
    sum_q = tl.zeros((ROWS, SIZE), dtype=tl.float32)
    for i in tl.static_range(BLOCKS):
        query = i * ROWS + row[:, None]
        target = grad_q_ptr + (image * queries + query) * (3 * width if PACKED else width) + head * SIZE
        rounded = (all_grad_q[i] * scale).to(grad_q_ptr.dtype.element_ty)
        tl.store(target + column[None, :], rounded, mask=query < queries)
        if BIAS:
            sum_q += all_grad_q[i]
    if BIAS:
        tl.store(sum_target, tl.sum(sum_q, axis=0) * scale)


def _sizes(q: Tensor, kv: Tensor | None, heads: int) -> tuple[int, int, int, int]:
    """Return B, R, T, D."""
    batch, queries, width = q.shape
    return (batch, queries, queries, width // 3) if kv is None else (batch, queries, kv.shape[1], width)


def _tile(rows: int, blocks: int, warps: int, heads: int, width: int, packed: bool) -> dict[str, int | bool]:
    return {
        "HEADS": heads, "SIZE": width // heads, "ROWS": rows, "KEYS": KEYS, "BLOCKS": blocks, "PACKED": packed,
        "num_warps": warps, "num_stages": 2,
    }  # fmt: skip


def _decoder_attention(
    q: Tensor, kv_BT2D: Tensor | None, heads: int, bias: Tensor | None, kv_bias_2D: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return out [B, R, D], and in float32 [B, H, R] the logarithms, base 2, of the sums that the softmax divides by.

    `q` is [B, R, D], or [B, S, 3D] if `kv_BT2D` is None. The biases are in `q` and `kv_BT2D` already and are not read.
    """
    q = rows_contiguous(q)
    packed = kv_BT2D is None
    kv = q if kv_BT2D is None else rows_contiguous(kv_BT2D)
    batch, queries, keys, width = _sizes(q, kv_BT2D, heads)
    out_BRD = torch.empty(batch, queries, width, device=q.device, dtype=q.dtype)
    lse_BHR = torch.empty(batch, heads, queries, device=q.device, dtype=torch.float32)
    tile = _tile(64, ceil_div(keys, KEYS), 4, heads, width, packed)
    with on_device_of(q):
        wrap_triton(_forward_kernel)[(batch * heads,)](
            q, None if packed else kv, out_BRD, lse_BHR, queries, keys, q.stride(0), q.stride(1),
            kv.stride(0), kv.stride(1), LOG2_E * (width // heads) ** -0.5, **tile,
        )  # fmt: skip
    return out_BRD, lse_BHR


def _decoder_attention_backward(
    q: Tensor,
    kv_BT2D: Tensor | None,
    out_BRD: Tensor,
    lse_BHR: Tensor,
    grad_BRD: Tensor,
    heads: int,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `q`, of `kv_BT2D` with its strides (empty if it is None), and of the biases.

    The last is the sum of the gradients of q, k and v over B and rows, [3D] in `bias_dtype`; empty if that is None.
    """  # fmt: skip
    q, grad_BRD = rows_contiguous(q), rows_contiguous(grad_BRD)
    packed = kv_BT2D is None
    kv = q if kv_BT2D is None else rows_contiguous(kv_BT2D)
    batch, queries, keys, width = _sizes(q, kv_BT2D, heads)
    grad_q = torch.empty(q.shape, device=q.device, dtype=q.dtype)
    grad_kv = torch.empty(0, device=q.device, dtype=q.dtype) if packed else torch.empty_like(kv)
    # 192 queries are three tiles of 64 in the registers of four warps; more are two tiles of 128 in those of eight.
    rows, warps = (64, 4) if queries <= 192 else (128, 8)
    tile = _tile(rows, ceil_div(queries, rows), warps, heads, width, packed)
    scale = (width // heads) ** -0.5
    grad_keys = grad_q if packed else grad_kv
    images = batch if bias_dtype is not None else 0
    partial_1B3D = torch.empty(1, images, 3 * width, device=q.device, dtype=torch.float32)
    with on_device_of(q):
        wrap_triton(_backward_kernel)[(batch * heads,)](
            q, None if packed else kv, out_BRD, lse_BHR, grad_BRD, grad_q, None if packed else grad_kv, partial_1B3D,
            queries, keys, q.stride(0), q.stride(1), kv.stride(0), kv.stride(1), grad_BRD.stride(0), grad_BRD.stride(1),
            grad_keys.stride(0), grad_keys.stride(1), LOG2_E * scale, scale, BIAS=bias_dtype is not None, **tile,
        )  # fmt: skip
    if bias_dtype is None:
        return grad_q, grad_kv, torch.empty(0, device=q.device, dtype=torch.float32)
    return grad_q, grad_kv, column_sum(partial_1B3D, bias_dtype)[0]


def _backward_fake(q, kv, out, lse, grad, heads, bias_dtype):
    grad_kv = q.new_empty(0) if kv is None else torch.empty_like(rows_contiguous(kv))
    grad_bias = q.new_empty(0 if bias_dtype is None else 3 * out.shape[2], dtype=bias_dtype or torch.float32)
    return q.new_empty(q.shape), grad_kv, grad_bias


decoder_attention_backward_op = KernelOp(_decoder_attention_backward, _backward_fake, inline=True)


def _setup(ctx, inputs, output):
    q, kv_BT2D, heads, bias, kv_bias_2D = inputs
    out_BRD, lse_BHR = output
    ctx.mark_non_differentiable(lse_BHR)
    ctx.set_materialize_grads(False)
    ctx.heads, ctx.bias_dtypes = heads, [b.dtype for b in (bias, kv_bias_2D) if b is not None]
    ctx.save_for_backward(q, kv_BT2D, out_BRD, lse_BHR)


def _backward(ctx, grad_BRD, _):
    q, kv_BT2D, out_BRD, lse_BHR = ctx.saved_tensors
    if grad_BRD is None:
        return None, None, None, None, None
    dtypes, bias_dtype = ctx.bias_dtypes, None
    if ctx.needs_input_grad[3] or ctx.needs_input_grad[4]:
        bias_dtype = functools.reduce(torch.promote_types, dtypes)
    grad_q, grad_kv, grad_bias = decoder_attention_backward_op(
        q, kv_BT2D, out_BRD, lse_BHR, grad_BRD, ctx.heads, bias_dtype
    )
    grads: list[Tensor | None] = [None, None]
    if bias_dtype is not None:
        width = out_BRD.shape[2]
        sums = [grad_bias] if len(dtypes) == 1 else [grad_bias[:width], grad_bias[width:]]
        grads[: len(sums)] = [x.to(dtype) for x, dtype in zip(sums, dtypes, strict=True)]
    return grad_q, None if kv_BT2D is None else grad_kv, None, *grads


decoder_attention_op = KernelOp(
    _decoder_attention,
    lambda q, kv, heads, bias, kv_bias: (
        q.new_empty(*q.shape[:2], q.shape[2] // (3 if kv is None else 1)),
        q.new_empty(q.shape[0], heads, q.shape[1], dtype=torch.float32),
    ),
    setup_context=_setup,
    backward=_backward,
    inline=True,
)


def decoder_attention_refusal(queries: int, keys: int, head_size: int) -> str | None:
    """Say why these sizes are past the limits of `decoder_attention`; None if they are within."""
    if not 1 <= queries <= MOST_QUERIES:
        return f"it holds 1 to {MOST_QUERIES} queries, not {queries}"
    if not 1 <= keys <= MOST_KEYS:
        return f"it holds 1 to {MOST_KEYS} keys, not {keys}"
    return None if head_size == HEAD_SIZE else f"its heads have a size of {HEAD_SIZE}, not {head_size}"


def decoder_attention(
    q: Tensor, kv_BT2D: Tensor | None, heads: int, bias: Tensor | None = None, kv_bias_2D: Tensor | None = None
) -> Tensor:
    """Compute softmax(q k^T / sqrt(d)) v of every head -> [B, R, D], in the dtype of `q`.

    q           [B, R, D], or queries, keys and values [B, S, 3D] if `kv_BT2D` is None
    kv_BT2D     keys, then values, along the last axis; other strides are free, and its gradient has them too
    bias        [3D], the bias of queries, keys and values; or [D], the bias of the queries alone, beside `kv_bias_2D`
    kv_bias_2D  the bias of keys and values

    The biases are in the buffers already, detached there, and are not added again. They are given so that they get
    their gradients here. Statistics and sums are float32; the weights are rounded to the dtype before they meet v.
    Differentiable in all.
    Raises: ValueError for wrong shapes, dtypes, devices and for sizes past the limits.
    """
    check_float("q", q)
    check_shape("q", q, (None, None, None), "[B, R, D]")
    batch, queries, width = q.shape
    if kv_BT2D is None:
        width //= 3
    else:
        check_shape("kv_BT2D", kv_BT2D, (batch, None, 2 * width), "[B, T, 2D]")
        if kv_BT2D.dtype != q.dtype:
            raise ValueError(f"kv_BT2D has dtype {kv_BT2D.dtype}, q {q.dtype}; cast one of them")
    if heads < 1 or q.shape[2] % (heads * (3 if kv_BT2D is None else 1)):
        raise ValueError(f"heads is {heads}, which does not divide {q.shape[2]} channels of q")
    keys = queries if kv_BT2D is None else kv_BT2D.shape[1]
    refusal = decoder_attention_refusal(queries, keys, width // heads)
    if refusal is not None:
        raise ValueError(f"decoder_attention has limits: {refusal}")
    if kv_bias_2D is not None:
        check_shape("kv_bias_2D", kv_bias_2D, (2 * width,), "[2D]")
        if bias is None or kv_BT2D is None:
            raise ValueError("kv_bias_2D goes beside kv_BT2D and the bias of the queries; give both")
    if bias is not None:
        check_shape("bias", bias, (width if kv_bias_2D is not None else 3 * width,), "[3D], or [D] beside kv_bias_2D")
    check_device(q, kv_BT2D=kv_BT2D, bias=bias, kv_bias_2D=kv_bias_2D)
    if not uses_triton(q):
        return decoder_attention_reference(q, kv_BT2D, heads, bias, kv_bias_2D)
    return decoder_attention_op(q, kv_BT2D, heads, bias, kv_bias_2D)[0]
