"""Compute self-attention of at most 64 tokens; queries, keys and values are packed as their matrix product left them.

Letters: B batch, S tokens, H heads, d head size, D = H d. A program holds one head of one image: q, k and v, the S x S
weights, and in the backward pass all three gradients. So nothing is read twice, no softmax statistics go through
memory, and neither a concatenation nor a float32 gradient of q is written.

Bytes at least, forward: 3 D read and D written a token; backward: 4 D read, 3 D written. B = 256, S = 50, D = 768,
bfloat16: 79 and 138 MB.

The gradient of the product's bias is the sum of the packed gradient over all tokens. It comes with the backward pass:
3 D float32 values an image, added up by a second stage.
"""

import torch
from torch import Tensor

from mirl.kernels.checks import check_device, check_float, check_shape
from mirl.kernels.column_sum import column_sum
from mirl.kernels.dispatch import uses_triton
from mirl.kernels.launch import on_device_of, rows_contiguous
from mirl.kernels.registration import KernelOp, wrap_triton
from mirl.kernels.triton_import import tl, triton

MOST_TOKENS = 64
HEAD_SIZES = (32, 64)
LOG2_E = 1.4426950408889634
_WARPS = 4


def short_attention_reference(qkv_BS3D: Tensor, bias_3D: Tensor | None, heads: int) -> Tensor:
    """Compute two products with a softmax between them. The bias gets its gradient by a zero added in float32."""
    if bias_3D is not None:
        compute = torch.promote_types(qkv_BS3D.dtype, torch.float32)
        zero_3D = (bias_3D - bias_3D.detach()).to(compute)
        qkv_BS3D = (qkv_BS3D.to(compute) + zero_3D).to(qkv_BS3D.dtype)
    q_BHSd, k_BHSd, v_BHSd = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in qkv_BS3D.chunk(3, dim=-1))
    scores_BHSS = (q_BHSd * q_BHSd.shape[-1] ** -0.5) @ k_BHSd.transpose(-1, -2)
    return (torch.softmax(scores_BHSS, dim=-1) @ v_BHSd).transpose(1, 2).flatten(2)


@triton.jit
def _short_attention_kernel(
    qkv_ptr, out_ptr, tokens, stride_b, stride_s, exponent_scale,
    HEADS: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    image, head = (tl.program_id(0) // HEADS).to(tl.int64), tl.program_id(0) % HEADS
    row, column = tl.arange(0, ROWS), tl.arange(0, SIZE)
    inside = row[:, None] < tokens
    source = qkv_ptr + image * stride_b + row[:, None] * stride_s + head * SIZE + column[None, :]
    q = tl.load(source, mask=inside, other=0.0)
    k = tl.load(source + HEADS * SIZE, mask=inside, other=0.0)
    v = tl.load(source + 2 * HEADS * SIZE, mask=inside, other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    scores = tl.where(row[None, :] < tokens, scores, float("-inf"))
    weights = tl.exp2((scores - tl.max(scores, axis=1)[:, None]) * exponent_scale)
    out = tl.dot(weights.to(v.dtype), v, input_precision="ieee") / tl.sum(weights, axis=1)[:, None]
    target = out_ptr + (image * tokens + row[:, None]) * (HEADS * SIZE) + head * SIZE + column[None, :]
    tl.store(target, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _store_gradient(target, gradient, inside, sum_target, BIAS: tl.constexpr):
    """Write the gradient, and the sum of the rounded values over all rows."""
    rounded = gradient.to(target.dtype.element_ty)
    tl.store(target, rounded, mask=inside)
    if BIAS:
        tl.store(sum_target, tl.sum(rounded.to(tl.float32), axis=0))


@triton.jit
def _short_attention_backward_kernel(
    qkv_ptr, grad_ptr, grad_qkv_ptr, partial_ptr, tokens, stride_b, stride_s, grad_stride_b, grad_stride_s,
    exponent_scale, scale,
    HEADS: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    image, head = (tl.program_id(0) // HEADS).to(tl.int64), tl.program_id(0) % HEADS
    width = HEADS * SIZE
    row, column = tl.arange(0, ROWS), tl.arange(0, SIZE)
    inside = row[:, None] < tokens
    source = qkv_ptr + image * stride_b + row[:, None] * stride_s + head * SIZE + column[None, :]
    grad_source = grad_ptr + image * grad_stride_b + row[:, None] * grad_stride_s + head * SIZE + column[None, :]
    q = tl.load(source, mask=inside, other=0.0)
    k = tl.load(source + width, mask=inside, other=0.0)
    v = tl.load(source + 2 * width, mask=inside, other=0.0)
    grad = tl.load(grad_source, mask=inside, other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    scores = tl.where(row[None, :] < tokens, scores, float("-inf"))
    weights = tl.exp2((scores - tl.max(scores, axis=1)[:, None]) * exponent_scale)
    weights = weights / tl.sum(weights, axis=1)[:, None]
    target = grad_qkv_ptr + (image * tokens + row[:, None]) * (3 * width) + head * SIZE + column[None, :]
    sum_target = partial_ptr + image * (3 * width) + head * SIZE + column
    # Rows past the last token have no gradient, so they add nothing to any product or sum.
    grad_v = tl.dot(tl.trans(weights.to(grad.dtype)), grad, input_precision="ieee")
    _store_gradient(target + 2 * width, grad_v, inside, sum_target + 2 * width, BIAS)
    grad_weights = tl.dot(grad, tl.trans(v), input_precision="ieee")
    grad_scores = weights * (grad_weights - tl.sum(weights * grad_weights, axis=1)[:, None])
    grad_scores = (grad_scores * scale).to(q.dtype)
    grad_q = tl.dot(grad_scores, k, input_precision="ieee")
    _store_gradient(target, grad_q, inside, sum_target, BIAS)
    grad_k = tl.dot(tl.trans(grad_scores), q, input_precision="ieee")
    _store_gradient(target + width, grad_k, inside, sum_target + width, BIAS)


def _layout(qkv_BS3D: Tensor, heads: int) -> dict[str, int]:
    return {"HEADS": heads, "SIZE": qkv_BS3D.shape[-1] // (3 * heads), "ROWS": MOST_TOKENS, "num_warps": _WARPS}


def _short_attention(qkv_BS3D: Tensor, bias_3D: Tensor | None, heads: int) -> Tensor:
    """Return [B, S, D]. The bias is in `qkv_BS3D` already and is not read."""
    qkv_BS3D = rows_contiguous(qkv_BS3D)
    batch, tokens, width = qkv_BS3D.shape
    out_BSD = torch.empty(batch, tokens, width // 3, device=qkv_BS3D.device, dtype=qkv_BS3D.dtype)
    layout = _layout(qkv_BS3D, heads)
    with on_device_of(qkv_BS3D):
        wrap_triton(_short_attention_kernel)[(batch * heads,)](
            qkv_BS3D, out_BSD, tokens, qkv_BS3D.stride(0), qkv_BS3D.stride(1), LOG2_E * layout["SIZE"] ** -0.5, **layout
        )
    return out_BSD


def _short_attention_backward(
    qkv_BS3D: Tensor, grad_BSD: Tensor, heads: int, bias_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """Return the gradient of qkv [B, S, 3D] and its sum over B and S, [3D] in `bias_dtype` (empty if that is None)."""
    qkv_BS3D, grad_BSD = rows_contiguous(qkv_BS3D), rows_contiguous(grad_BSD)
    batch, tokens, width = qkv_BS3D.shape
    grad_qkv_BS3D = torch.empty(batch, tokens, width, device=qkv_BS3D.device, dtype=qkv_BS3D.dtype)
    rows = batch if bias_dtype is not None else 0
    partial_1B3D = torch.empty(1, rows, width, device=qkv_BS3D.device, dtype=torch.float32)
    layout = _layout(qkv_BS3D, heads)
    scale = layout["SIZE"] ** -0.5
    with on_device_of(qkv_BS3D):
        wrap_triton(_short_attention_backward_kernel)[(batch * heads,)](
            qkv_BS3D, grad_BSD, grad_qkv_BS3D, partial_1B3D, tokens, qkv_BS3D.stride(0), qkv_BS3D.stride(1),
            grad_BSD.stride(0), grad_BSD.stride(1), LOG2_E * scale, scale, BIAS=bias_dtype is not None, **layout,
        )  # fmt: skip
    if bias_dtype is None:
        return grad_qkv_BS3D, torch.empty(0, device=qkv_BS3D.device, dtype=torch.float32)
    return grad_qkv_BS3D, column_sum(partial_1B3D, bias_dtype)[0]


def _backward_fake(qkv, grad, heads, bias_dtype):
    grad_bias = qkv.new_empty(0 if bias_dtype is None else qkv.shape[-1], dtype=bias_dtype or torch.float32)
    return qkv.new_empty(qkv.shape), grad_bias


short_attention_backward_op = KernelOp(_short_attention_backward, _backward_fake, inline=True)


def _setup(ctx, inputs, output):
    qkv_BS3D, bias_3D, heads = inputs
    ctx.heads, ctx.bias_dtype = heads, None if bias_3D is None else bias_3D.dtype
    ctx.save_for_backward(qkv_BS3D)


def _backward(ctx, grad_BSD):
    bias_dtype = ctx.bias_dtype if ctx.needs_input_grad[1] else None
    grad_qkv, grad_bias = short_attention_backward_op(ctx.saved_tensors[0], grad_BSD, ctx.heads, bias_dtype)
    return grad_qkv, None if bias_dtype is None else grad_bias, None


short_attention_op = KernelOp(
    _short_attention,
    lambda qkv, bias, heads: qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3),
    setup_context=_setup,
    backward=_backward,
    inline=True,
)


def short_attention_refusal(tokens: int, head_size: int) -> str | None:
    """Say why these sizes are past the limits of `short_attention`; None if they are within."""
    if not 1 <= tokens <= MOST_TOKENS:
        return f"it holds 1 to {MOST_TOKENS} tokens, not {tokens}"
    if head_size not in HEAD_SIZES:
        return f"its heads have a size of {' or '.join(map(str, HEAD_SIZES))}, not {head_size}"
    return None


def short_attention(qkv_BS3D: Tensor, heads: int, bias_3D: Tensor | None = None) -> Tensor:
    """Compute softmax(q k^T / sqrt(d)) v of every head -> [B, S, D], in the dtype of `qkv_BS3D`.

    `qkv_BS3D` holds q, k and v in this order. Statistics and sums are float32; the weights are rounded to the dtype
    before they meet v.

    `bias_3D` is the bias of the product that made `qkv_BS3D`. It is given so that its gradient is made here: the
    product has to have it detached. The value is not added again. Differentiable in `qkv_BS3D` and the bias.
    Raises: ValueError for wrong shapes, dtypes, devices and for sizes past the limits.
    """
    check_float("qkv_BS3D", qkv_BS3D)
    check_shape("qkv_BS3D", qkv_BS3D, (None, None, None), "[B, S, 3D]")
    tokens, width = qkv_BS3D.shape[1:]
    if heads < 1 or width % (3 * heads):
        raise ValueError(f"heads is {heads}, which does not divide a third of {width}")
    refusal = short_attention_refusal(tokens, width // (3 * heads))
    if refusal is not None:
        raise ValueError(f"short_attention has limits: {refusal}")
    if bias_3D is not None:
        check_shape("bias_3D", bias_3D, (width,), "[3D]")
    check_device(qkv_BS3D, bias_3D=bias_3D)
    attention = short_attention_op if uses_triton(qkv_BS3D) else short_attention_reference
    return attention(qkv_BS3D, bias_3D, heads)
