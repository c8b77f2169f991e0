"""What the kernel benchmarks run: every op's public function, the same in plain PyTorch, and the bytes it must move.

Letters: B batch, N patches, K kept, M masked, D encoder width, E decoder width, Q pixels of a patch, R token rows,
s bytes of a token element. Bytes count every input once and every output once, nothing in between.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.adamw import adamw

from mirl import kernels
from mirl.kernels.flat_adamw import Coefficients

PATCH = 16
Q = PATCH * PATCH * 3
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Size:
    """One model size at one batch and image size."""

    name: str
    batch: int
    pixels: int
    width: int
    decoder_width: int
    dtype: torch.dtype

    @property
    def patches(self) -> int:
        return (self.pixels // PATCH) ** 2

    @property
    def kept(self) -> int:
        return self.patches // 4

    @property
    def masked(self) -> int:
        return self.patches - self.kept

    def __str__(self) -> str:
        return f"{self.name} B{self.batch} {self.pixels}px"


@dataclass(frozen=True)
class Case:
    """`ours` and `eager` take `arguments`; with `grads`, the gradients of the leaves among them are computed too."""

    name: str
    shape: str
    ours: Callable[..., Any]
    eager: Callable[..., Any]
    arguments: tuple[Any, ...]
    bytes: int
    grads: tuple[Tensor, ...] = ()


def sizes(device: torch.device) -> list[Size]:
    if device.type == "cpu":
        return [Size("S", 8, 224, 384, 384, torch.float32)]
    models = (("S", 384, 384), ("B", 768, 512))
    return [Size(n, b, px, d, e, torch.bfloat16) for n, d, e in models for b in (64, 256) for px in (224, 384)]


def _random(size: Size, *shape: int, grad: bool = False, dtype: torch.dtype | None = None) -> Tensor:
    where = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.randn(*shape, device=where, dtype=dtype or size.dtype).requires_grad_(grad)


def _masks(size: Size, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor]:
    order = torch.rand(size.batch, size.patches, device=device).argsort(dim=1)
    keep, masked = order[:, : size.kept].sort(dim=1).values, order[:, size.kept :].sort(dim=1).values
    return keep, masked, torch.cat([keep, masked], dim=1).argsort(dim=1)


def _images(size: Size, device: torch.device | str) -> Tensor:
    return torch.randint(0, 256, (size.batch, size.pixels, size.pixels, 3), dtype=torch.uint8, device=device)


def _statistics(reference: Tensor) -> tuple[Tensor, Tensor]:
    return reference.new_tensor(MEAN), reference.new_tensor(STD)


def _all_patches(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Normalise and cut up the whole image, as a plain model does."""
    batch, height, width, channels = images.shape
    x = (images.float() / 255 - mean) / std
    x = x.view(batch, height // PATCH, PATCH, width // PATCH, PATCH, channels).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, -1, Q)


def _rows(x: Tensor, ids: Tensor) -> Tensor:
    return x.gather(1, ids[..., None].expand(-1, -1, x.shape[-1]))


def gather_patches(size: Size, backward: bool) -> Case:
    images = _images(size, device := _random(size, 1).device)
    keep, _, _ = _masks(size, device)
    mean, std = _statistics(torch.empty(0, device=device))

    def eager(images, keep):
        return _rows(_all_patches(images, mean, std), keep).to(size.dtype)

    def ours(images, keep):
        return kernels.gather_patches(images, keep, patch_size=PATCH, mean=MEAN, std=STD, dtype=size.dtype)

    moved = size.batch * size.kept * Q * (1 + size.dtype.itemsize)  # uint8 in, token dtype out
    return Case("gather_patches", str(size), ours, eager, (images, keep), moved)


def gather_tokens(size: Size, backward: bool) -> Case:
    x = _random(size, size.batch, size.patches, size.width, grad=backward)
    _, masked, _ = _masks(size, x.device)
    row = size.width * size.dtype.itemsize
    moved = size.batch * 2 * size.masked * row  # M rows in, M out
    if backward:
        moved += size.batch * (size.masked + size.patches) * row  # M in, N out
    grads = (_random(size, size.batch, size.masked, size.width),) if backward else ()
    return Case("gather_tokens", str(size), kernels.gather_tokens, _rows, (x, masked), moved, grads)


def assemble_tokens(size: Size, backward: bool) -> Case:
    x = _random(size, size.batch, size.kept, size.width)
    keep, _, _ = _masks(size, x.device)
    pos, cls = _random(size, size.patches, size.width, dtype=torch.float32), _random(size, size.width)

    def eager(x, keep, pos, cls):
        return torch.cat([cls.expand(x.shape[0], 1, -1), (x + pos[keep]).to(x.dtype)], dim=1)

    moved = size.batch * (2 * size.kept + 1) * size.width * size.dtype.itemsize  # K rows in, 1 + K out
    return Case("assemble_tokens", str(size), kernels.assemble_tokens, eager, (x, keep, pos, cls), moved)


def scatter_tokens(size: Size, backward: bool) -> Case:
    x = _random(size, size.batch, 1 + size.kept, size.decoder_width, grad=backward)
    keep, _, restore = _masks(size, x.device)
    fill = _random(size, size.decoder_width, grad=backward, dtype=torch.float32)
    pos = _random(size, 1 + size.patches, size.decoder_width, dtype=torch.float32)

    def eager(x, keep, restore, fill, pos):
        fills = fill.to(x.dtype).expand(x.shape[0], restore.shape[1] - keep.shape[1], -1)
        placed = _rows(torch.cat([x[:, 1:], fills], dim=1), restore)
        return (torch.cat([x[:, :1], placed], dim=1) + pos).to(x.dtype)

    once = (
        size.batch * (2 + size.kept + size.patches) * size.decoder_width * size.dtype.itemsize
    )  # 1 + K and 1 + N rows
    grads = (_random(size, size.batch, 1 + size.patches, size.decoder_width),) if backward else ()
    arguments = (x, keep, restore, fill, pos)
    return Case("scatter_tokens", str(size), kernels.scatter_tokens, eager, arguments, once * (1 + backward), grads)


def masked_residual_mse(size: Size, backward: bool, pairs: int) -> Case:
    images = _images(size, device := _random(size, 1).device)
    _, masked, _ = _masks(size, device)
    mean, std = _statistics(torch.empty(0, device=device))
    shape = (size.batch, size.masked, Q)
    main, residual = ([_random(size, *shape, grad=backward) for _ in range(pairs)] for _ in range(2))

    def eager(main, residual, images, masked):
        target = _rows(_all_patches(images, mean, std), masked)
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        return sum(((a + b).float() - target).square().mean() for a, b in zip(main, residual, strict=True)) / pairs

    def ours(main, residual, images, masked):
        return kernels.masked_residual_mse(main, residual, images, masked, patch_size=PATCH, mean=MEAN, std=STD)[0]

    elements = size.batch * size.masked * Q
    # Per pair two predictions in and, with backward, one gradient out; the uint8 pixels once.
    moved = pairs * (3 if backward else 2) * elements * size.dtype.itemsize + elements
    grads = (torch.ones((), device=device),) if backward else ()
    name = f"masked_residual_mse_{pairs}_pair" + ("s" if pairs > 1 else "")
    return Case(name, str(size), ours, eager, (main, residual, images, masked), moved, grads)


def residual_layer_norm(size: Size, backward: bool) -> Case:
    shape = (size.batch, 1 + size.kept, size.width)
    x, delta = (_random(size, *shape, grad=backward) for _ in range(2))
    weight, bias = (_random(size, size.width, grad=backward) for _ in range(2))

    def eager(x, delta, weight, bias):
        total = x + delta
        return total, F.layer_norm(total, weight.shape, weight, bias, 1e-6)

    once = 4 * x.numel() * size.dtype.itemsize  # x, delta, total, normed; total, two gradients, dx
    grads = tuple(_random(size, *shape) for _ in range(2)) if backward else ()
    arguments = (x, delta, weight, bias)
    ours = kernels.residual_layer_norm
    return Case("residual_layer_norm", str(size), ours, eager, arguments, once * (1 + backward), grads)


def residual_layer_norm_with_bias(size: Size, backward: bool) -> Case:
    """The bytes of `residual_layer_norm`: the bias of the Linear before it is a vector, and so is its gradient."""
    plain = residual_layer_norm(size, backward)
    linear_bias = _random(size, size.width, grad=backward)

    def eager(x, delta, weight, bias, linear_bias):
        return plain.eager(x, delta + linear_bias, weight, bias)

    def ours(x, delta, weight, bias, linear_bias):
        return kernels.residual_layer_norm(x, delta, weight, bias, delta_bias_D=linear_bias)

    arguments = (*plain.arguments, linear_bias)
    return Case("residual_layer_norm_with_bias", str(size), ours, eager, arguments, plain.bytes, plain.grads)


def bias_gelu(size: Size, backward: bool) -> Case:
    x = _random(size, size.batch, 1 + size.kept, 4 * size.width, grad=backward)
    bias = _random(size, 4 * size.width, grad=backward)

    def eager(x, bias):
        return F.gelu(x + bias)

    moved = (5 if backward else 2) * x.numel() * size.dtype.itemsize  # x, out; x, gradient, dx
    grads = (_random(size, *x.shape),) if backward else ()
    return Case("bias_gelu", str(size), kernels.bias_gelu, eager, (x, bias), moved, grads)


def _attend(q: Tensor, kv: Tensor, heads: int) -> Tensor:
    """SDPA on views of [B, R, D] and [B, T, 2D]."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, *kv.chunk(2, dim=-1)))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def short_attention(size: Size, backward: bool) -> Case:
    tokens, width, heads = 1 + size.kept, size.width, 12
    qkv = _random(size, size.batch, tokens, 3 * width, grad=backward)

    def eager(qkv):
        return _attend(qkv[..., :width], qkv[..., width:], heads)

    def ours(qkv):
        return kernels.short_attention(qkv, heads)

    # q, k, v in, the output out; those and its gradient in, three gradients out.
    moved = (11 if backward else 4) * size.batch * tokens * width * size.dtype.itemsize
    grads = (_random(size, size.batch, tokens, width),) if backward else ()
    return Case("short_attention", str(size), ours, eager, (qkv,), moved, grads)


def decoder_attention(size: Size, backward: bool, sources: int) -> Case:
    """Over all tokens of the decoder, packed, for no ``sources``; else over so many latents of the encoder."""
    tokens, width = 1 + size.patches, size.decoder_width
    heads, keys = width // 32, sources * (1 + size.kept) or tokens
    q = _random(size, size.batch, tokens, width if sources else 3 * width, grad=backward)
    kv = (_random(size, keys, size.batch, 2 * width, grad=backward),) if sources else ()

    def buffers(q, *kv):
        return (q, kv[0].transpose(0, 1)) if kv else (q[..., :width], q[..., width:])

    def eager(*leaves):
        return _attend(*buffers(*leaves), heads)

    def ours(q, *kv):
        return kernels.decoder_attention(q, kv[0].transpose(0, 1) if kv else None, heads)

    # As for short sequences, and backward the output once more.
    moved = (6 if backward else 2) * size.batch * (tokens + keys) * width * size.dtype.itemsize
    grads = (_random(size, size.batch, tokens, width),) if backward else ()
    name = f"decoder_attention_{keys}_keys"
    return Case(name, str(size), ours, eager, (q, *kv), moved, grads)


def flat_adamw(size: Size, backward: bool) -> Case:
    """One clipped step over the weights of twelve blocks, given the norm; both write to their arguments."""
    values = 12 * 12 * size.width**2 // (1 if torch.cuda.is_available() else 12)
    grad = _random(size, values)
    master, exp_avg, exp_avg_sq = (_random(size, values, dtype=torch.float32) for _ in range(3))
    state = (master, exp_avg, exp_avg_sq.square_(), grad.new_empty(values))
    norm, number = grad.float().norm(), torch.full((), 2.0, device=grad.device)
    numbers = {"lr": 1e-3, "eps": 1e-8, "weight_decay": 0.05}

    @torch.no_grad()
    def eager(grad, master, exp_avg, exp_avg_sq, weight, norm, number):
        """As DeepSpeed's ZeRO 1 and 2 do it: to float32, clipping, torch's fused AdamW, to the compute dtype."""
        wide = grad.to(torch.float32, copy=True)
        wide.mul_(1 / ((norm + 1e-6) / 1.0).clamp(min=1.0))
        adamw(
            [master], [wide], [exp_avg], [exp_avg_sq], [], [number], fused=True, amsgrad=False, maximize=False,
            beta1=0.9, beta2=0.95, **numbers,
        )  # fmt: skip
        weight.copy_(master)
        return master, exp_avg, exp_avg_sq, weight

    def ours(grad, master, exp_avg, exp_avg_sq, weight, norm, number):
        step = Coefficients.of_step(3, betas=(0.9, 0.95), clip=1.0, **numbers)
        kernels.flat_adamw(grad, master, exp_avg, exp_avg_sq, weight, norm, step)
        return master, exp_avg, exp_avg_sq, weight

    moved = values * (2 * size.dtype.itemsize + 6 * 4)  # gradient in, weight out; fp32 state in and out
    return Case("flat_adamw", f"{size.name} {values}", ours, eager, (grad, *state, norm, number), moved)


# Name, maker, directions. The gradient of assemble_tokens is a view; the loss is never wanted without its gradient.
KERNELS: list[tuple[str, Callable[[Size, bool], Case], tuple[str, ...]]] = [
    ("gather_patches", gather_patches, ("forward",)),
    ("gather_tokens", gather_tokens, ("forward", "forward_backward")),
    ("assemble_tokens", assemble_tokens, ("forward",)),
    ("scatter_tokens", scatter_tokens, ("forward", "forward_backward")),
    ("masked_residual_mse_1_pair", lambda size, b: masked_residual_mse(size, b, 1), ("forward_backward",)),
    ("masked_residual_mse_3_pairs", lambda size, b: masked_residual_mse(size, b, 3), ("forward_backward",)),
    ("residual_layer_norm", residual_layer_norm, ("forward", "forward_backward")),
    ("residual_layer_norm_with_bias", residual_layer_norm_with_bias, ("forward_backward",)),
    ("bias_gelu", bias_gelu, ("forward", "forward_backward")),
    ("flat_adamw", flat_adamw, ("forward",)),
]
# For images of 224 pixels, whose numbers of tokens are within their limits.
ATTENTION: list[tuple[str, Callable[[Size, bool], Case], tuple[str, ...]]] = [
    ("short_attention", short_attention, ("forward", "forward_backward")),
    ("decoder_attention_self", lambda size, b: decoder_attention(size, b, 0), ("forward", "forward_backward")),
    ("decoder_attention_over_1", lambda size, b: decoder_attention(size, b, 1), ("forward_backward",)),
    ("decoder_attention_over_6", lambda size, b: decoder_attention(size, b, 6), ("forward_backward",)),
]


def counts(name: str, size: Size, among: list[Size]) -> bool:
    """Whether case ``name`` of ``size`` is no repetition: an optimiser's step depends on the model alone."""
    return name != "flat_adamw" or size == next(other for other in among if other.name == size.name)
