"""The Triton ops as torch.library ops: opcheck, torch.compile, and equal bits in two runs."""

import pytest
import torch

from mirl import kernels
from mirl.kernels.bias_gelu import bias_gelu_backward_op, bias_gelu_op
from mirl.kernels.decoder_attention import decoder_attention_backward_op, decoder_attention_op
from mirl.kernels.flat_adamw import flat_adamw_op
from mirl.kernels.gather_patches import gather_patches_op
from mirl.kernels.gather_tokens import assemble_tokens_op, gather_tokens_backward_op, gather_tokens_op
from mirl.kernels.masked_residual_mse_triton import masked_residual_mse_op, scale_differences_op
from mirl.kernels.residual_layer_norm import layer_norm_op, residual_layer_norm_backward_op, residual_layer_norm_op
from mirl.kernels.scatter_tokens import scatter_tokens_backward_op, scatter_tokens_op
from mirl.kernels.short_attention import short_attention_backward_op, short_attention_op
from mirl.kernels.triton_import import INTERPRETED
from tests.kernels.support import randn, random_images, random_masks

if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("needs Triton: runs in the process of test_interpreted.py, or on a GPU", allow_module_level=True)

DEVICE = "cpu" if INTERPRETED else "cuda"
B, N, K, D, P, C = 2, 6, 2, 40, 8, 3
KEEP, MASKED, RESTORE = random_masks(B, N, K, DEVICE)
IMAGES = random_images(B, 16, 24, C, "BHWC", DEVICE)
SCALE, SHIFT = [0.02] * C, [-1.0] * C
STATISTICS = {"patch_size": P, "mean": [0.5] * C, "std": [0.25] * C}


def tokens(*shape, seed=1, grad=True):
    return randn(*shape, device=DEVICE, dtype=torch.float32, seed=seed).requires_grad_(grad)


def predictions(count, seed=1):
    return [tokens(B, N - K, P * P * C, seed=seed + i) for i in range(count)]


def row_sums():
    return tokens(B * 7, grad=False), tokens(B * 7, grad=False).abs()


def flat_buffers():
    values, norm = [tokens(D, seed=seed, grad=False) for seed in range(5)], torch.tensor(1.0, device=DEVICE)
    return *values[:3], values[3].abs(), values[4], norm


ADAMW = (0.99, 0.9, 0.95, 1e-2, 0.5, 1e-8, 1.0, 0.5)
MSE_TAIL = (IMAGES, MASKED, P, SCALE, SHIFT, "BHWC", True, [0.5, 0.5], False, True)
CASES = {
    "gather_patches": (gather_patches_op, lambda: (IMAGES, KEEP, P, SCALE, SHIFT, "BHWC", torch.float32)),
    "gather_tokens": (gather_tokens_op, lambda: (tokens(B, N, D), KEEP)),
    "gather_tokens_backward": (gather_tokens_backward_op, lambda: (tokens(B, K, D, grad=False), KEEP, N, None)),
    "gather_tokens_backward_and_add": (
        gather_tokens_backward_op,
        lambda: (tokens(B, K, D, grad=False), KEEP, N, tokens(B, N, D, grad=False)),
    ),
    "assemble_tokens": (assemble_tokens_op, lambda: (tokens(B, K, D), KEEP, tokens(N, D), tokens(D))),
    "scatter_tokens": (scatter_tokens_op, lambda: (tokens(B, 1 + K, D), RESTORE, tokens(D), tokens(1 + N, D))),
    "scatter_tokens_table": (scatter_tokens_op, lambda: (tokens(B, 1 + K, D), RESTORE, tokens(N, D), None)),
    "scatter_tokens_backward": (
        scatter_tokens_backward_op,
        lambda: (tokens(B, 1 + N, D, grad=False), RESTORE, K, False, torch.float32, True),
    ),
    "masked_residual_mse": (masked_residual_mse_op, lambda: (predictions(2), predictions(2, seed=5), *MSE_TAIL)),
    "masked_residual_mse_main": (masked_residual_mse_op, lambda: (predictions(2), [], *MSE_TAIL)),
    "scale_differences": (
        scale_differences_op,
        lambda: ([p.detach() for p in predictions(2)], torch.tensor(3.0, device=DEVICE), [0.5, 2.0]),
    ),
    "residual_layer_norm": (
        residual_layer_norm_op,
        lambda: (tokens(B, 7, D), tokens(B, 7, D), None, tokens(D), tokens(D), 1e-6),
    ),
    "residual_layer_norm_with_bias": (
        residual_layer_norm_op,
        lambda: (tokens(B, 7, D), tokens(B, 7, D), tokens(D), tokens(D), tokens(D), 1e-6),
    ),
    "layer_norm": (layer_norm_op, lambda: (tokens(B, 7, D), tokens(D), tokens(D), 1e-6)),
    "residual_layer_norm_backward": (
        residual_layer_norm_backward_op,
        lambda: (
            tokens(B, 7, D, grad=False),
            *row_sums(),
            tokens(D, grad=False),
            tokens(B, 7, D, grad=False),
            None,
            True,
        ),
    ),
    "bias_gelu": (bias_gelu_op, lambda: (tokens(B, 7, D), tokens(D))),
    "gelu": (bias_gelu_op, lambda: (tokens(B, 7, D), None)),
    "bias_gelu_backward": (
        bias_gelu_backward_op,
        lambda: (tokens(B, 7, D, grad=False), tokens(D, grad=False), tokens(B, 7, D, grad=False)),
    ),
    "short_attention": (short_attention_op, lambda: (tokens(B, 7, 96), None, 1)),
    "short_attention_bias": (short_attention_op, lambda: (tokens(B, 7, 96), tokens(96), 1)),
    "short_attention_backward": (
        short_attention_backward_op,
        lambda: (tokens(B, 7, 96, grad=False), tokens(B, 7, 32, grad=False), 1, torch.float32),
    ),
    "decoder_attention": (decoder_attention_op, lambda: (tokens(B, 7, 32), tokens(B, 5, 64), 1, None, None)),
    "decoder_attention_biases": (
        decoder_attention_op, lambda: (tokens(B, 7, 32), tokens(B, 5, 64), 1, tokens(32), tokens(64))
    ),
    "decoder_attention_packed": (decoder_attention_op, lambda: (tokens(B, 7, 96), None, 1, tokens(96), None)),
    "decoder_attention_backward": (
        decoder_attention_backward_op,
        lambda: (
            tokens(B, 7, 32, grad=False), tokens(5, B, 64, grad=False).transpose(0, 1), tokens(B, 7, 32, grad=False),
            tokens(B, 1, 7, grad=False), tokens(B, 7, 32, grad=False), 1, torch.float32,
        ),
    ),
    "flat_adamw": (flat_adamw_op, lambda: (*flat_buffers(), *ADAMW)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name, monkeypatch):
    monkeypatch.undo()  # NaN-filled allocations would reach the fake tensors of the check
    op, arguments = CASES[name]
    torch.library.opcheck(op.overload, arguments())


def everything(parameters):
    """The whole masked path once, through every public function."""
    x, norm_weight, norm_bias, fill, cls, head, table = parameters
    pixels = kernels.gather_patches(IMAGES, KEEP, **STATISTICS)
    z = kernels.assemble_tokens(pixels @ x, KEEP, table[1:], cls)
    z, normed = kernels.residual_layer_norm(z, z * 0.5, norm_weight, norm_bias, delta_bias_D=fill)
    z = z + kernels.bias_gelu(normed, norm_bias)
    u = kernels.scatter_tokens(z, KEEP, RESTORE, fill, table)
    _, u = kernels.residual_layer_norm(u, None, norm_weight, norm_bias)
    prediction = kernels.gather_tokens(u[:, 1:], MASKED) @ head
    return kernels.masked_residual_mse([prediction], [prediction * 0.5], IMAGES, MASKED, **STATISTICS)[0]


def parameters():
    shapes = [(P * P * C, D), (D,), (D,), (D,), (D,), (D, P * P * C), (1 + N, D)]
    return [tokens(*shape, seed=i) for i, shape in enumerate(shapes)]


def run(function):
    leaves = parameters()
    loss = function(leaves)
    loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


def test_two_runs_are_bit_equal():
    for first, second in zip(run(everything), run(everything), strict=True):
        assert torch.equal(first, second)


def test_compile_keeps_the_ops_in_one_graph(monkeypatch):
    monkeypatch.undo()
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    torch._dynamo.reset()
    compiled = run(torch.compile(everything, backend=backend, fullgraph=True))
    assert len(graphs) == 1
    called = {str(node.target) for node in graphs[0].graph.nodes if "mirl_kernels" in str(node.target)}
    names = ("gather_patches", "assemble_tokens", "residual_layer_norm", "layer_norm", "bias_gelu", "scatter_tokens")
    assert called == {f"mirl_kernels.{name}.default" for name in (*names, "gather_tokens", "masked_residual_mse")}
    for eager, traced in zip(run(everything), compiled, strict=True):
        # Same kernels; the gradient is scaled by a second rounding instead of in place: a few float32 roundings.
        assert torch.allclose(eager, traced, rtol=1e-5, atol=1e-6 * float(eager.abs().max()))


@pytest.mark.gpu
def test_inductor_launches_the_kernels_itself_with_the_same_results(monkeypatch):
    """As in compiled regions: what is inlined gives what the eager kernels give."""
    monkeypatch.undo()
    torch._dynamo.reset()
    kernels.set_inlined(True)
    try:
        compiled = run(torch.compile(everything, fullgraph=True))
    finally:
        kernels.set_inlined(False)
        torch._dynamo.reset()
    for eager, traced in zip(run(everything), compiled, strict=True):
        assert torch.allclose(eager, traced, rtol=1e-4, atol=1e-5 * float(eager.abs().max()))


@pytest.mark.parametrize("graph", ["eager", "op"])
def test_both_ways_into_an_op_agree(graph, monkeypatch):
    """Plain eager calls skip the library's dispatcher; forced through it, outputs and gradients keep their bits."""
    expected = run(everything)
    if graph == "op":
        monkeypatch.setattr("mirl.kernels.registration.traced", lambda tensor: True)
    for first, second in zip(expected, run(everything), strict=True):
        assert torch.equal(first, second)
