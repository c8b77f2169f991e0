"""These are the operations that the models and the optimisers compute with. Nothing here imports the engine.

A kernel's file holds one op, or two that belong together, in this order: reference in plain torch, Triton kernels,
launch config, registration as a torch.library op with its autograd, public function. The loss is in three files,
`masked_residual_mse*.py`. GPU tensors run Triton, CPU tensors plain torch (`describe_dispatch`). The Triton kernels are
deterministic.
"""

if __name__ == "kernels":
    from mirl.namesake import give_way

    give_way(__name__)

from mirl.kernels.attention import (
    AttentionBackend,
    attention,
    packed_attention,
    resolve_attention_backend,
    sums_bias,
)
from mirl.kernels.bias_gelu import bias_gelu
from mirl.kernels.checks import set_debug
from mirl.kernels.decoder_attention import decoder_attention
from mirl.kernels.dispatch import describe_dispatch
from mirl.kernels.flat_adamw import flat_adamw
from mirl.kernels.gather_patches import gather_patches
from mirl.kernels.gather_tokens import assemble_tokens, gather_tokens, gather_tokens_passing_on
from mirl.kernels.masked_residual_mse import masked_residual_mse, masked_residual_mse_full
from mirl.kernels.registration import set_inlined
from mirl.kernels.residual_layer_norm import residual_layer_norm
from mirl.kernels.scatter_tokens import scatter_tokens
from mirl.kernels.short_attention import short_attention

__all__ = [
    "AttentionBackend",
    "assemble_tokens",
    "attention",
    "bias_gelu",
    "decoder_attention",
    "describe_dispatch",
    "flat_adamw",
    "gather_patches",
    "gather_tokens",
    "gather_tokens_passing_on",
    "masked_residual_mse",
    "masked_residual_mse_full",
    "packed_attention",
    "residual_layer_norm",
    "resolve_attention_backend",
    "scatter_tokens",
    "set_debug",
    "set_inlined",
    "short_attention",
    "sums_bias",
]
