"""Sort the operators and kernels in a trace of torch's profiler into classes, by their names."""

from __future__ import annotations

import re

CLASSES = ("gemm", "attention", "norm_elementwise", "masked_kernels", "loss", "optimizer", "communication", "other")

# The first match wins. Kernel names of a GPU (cuBLAS, CUTLASS, FlashAttention, cuDNN, ours, inductor's, torch's) and
# operator names of a CPU stand in one list, because no name is both.
_PATTERNS: tuple[tuple[str, str], ...] = (
    ("communication", r"nccl|all_reduce|allreduce|reduce_scatter|all_gather|gloo|c10d"),
    ("optimizer", r"adam|multi_tensor|_foreach"),
    ("attention", r"flash|fmha|attention|attn|softmax|\baten::bmm|mha"),
    ("loss", r"_loss_kernel|_finish_kernel|_scale_kernel|SharedGradient|masked_residual_mse|aten::dot$"),
    (
        "masked_kernels",
        r"_gather_|_scatter_|_assemble_|gather_patches|gather_tokens|scatter_tokens|index_select|aten::index_add|"
        r"aten::embedding|aten::gather|indexSelect|_scatter_gather|aten::sort|argsort|radixSort|bitonic",
    ),
    ("gemm", r"gemm|cutlass|nvjet|xmma|cublas|aten::(addmm|mm|linear|_?convolution|mkldnn)|mkldnn|onednn|splitK"),
    (
        "norm_elementwise",
        r"norm|gelu|elementwise|vectorized|reduce|_forward_kernel|_backward_kernel|_column_sum|triton_|"
        r"aten::(add|mul|sub|div|sum|mean|copy_|_to_copy|cat|clone|fill_|zero_|square|where|neg|pow|sqrt|rsqrt|var|"
        r"std|stack|native_)|cpp_fused|CatArray|FillFunctor|Memcpy|Memset",
    ),
)

# "autograd::engine::..." is the engine's own work, not an operator's.
_OPERATORS = ("aten::", "mkldnn::", "mirl_kernels::", "c10d::", "cpp_fused", "SharedGradient", "xformers")


def is_operator(name: str) -> bool:
    """Say whether an event of the host is an operator, rather than Python's or autograd's own work."""
    return name.startswith(_OPERATORS)


def classify(name: str) -> str:
    """Return the class of a kernel or operator, by its name; one of `CLASSES`."""
    return next((kind for kind, pattern in _PATTERNS if re.search(pattern, name)), "other")
