"""Kernels of the masked path: exact, deterministic, and nothing of the engine in them.

Each file holds one op: reference in plain torch, Triton kernels, launch config, registration as a torch.library op with
its autograd, public function. GPU tensors run Triton, CPU tensors plain torch (`describe_dispatch`).

`__mirl_engine__` marks this package: a distribution on PyPI has the name `kernels` too, and the engine checks the
marker before it uses anything here.
"""

from kernels.attention import AttentionBackend, attention, resolve_attention_backend
from kernels.bias_gelu import bias_gelu
from kernels.checks import set_debug
from kernels.dispatch import describe_dispatch
from kernels.gather_patches import gather_patches
from kernels.gather_tokens import assemble_tokens, gather_tokens
from kernels.masked_residual_mse import masked_residual_mse, masked_residual_mse_full
from kernels.residual_layer_norm import residual_layer_norm
from kernels.scatter_tokens import scatter_tokens

__mirl_engine__ = True
# transformers probes the version of whatever is called `kernels` and uses one >= 0.15: stay below.
__version__ = "0.1.0"

__all__ = [
    "AttentionBackend",
    "assemble_tokens",
    "attention",
    "bias_gelu",
    "describe_dispatch",
    "gather_patches",
    "gather_tokens",
    "masked_residual_mse",
    "masked_residual_mse_full",
    "residual_layer_norm",
    "resolve_attention_backend",
    "scatter_tokens",
    "set_debug",
]
