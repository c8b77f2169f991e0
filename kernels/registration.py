"""A Triton launch as a torch.library op with fake and autograd, at low cost in eager mode.

The library op is what torch.compile keeps in its graph. Its dispatcher costs tens of microseconds a call in eager
mode, which hundreds of calls a step would pay, so plain tensors outside a trace go to an autograd.Function made of
the same three functions instead. Both ways run the same launch, setup_context and backward.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "mirl_kernels"
_PLAIN = (Tensor, torch.nn.Parameter)


def traced(tensor: Tensor) -> bool:
    """True while torch.compile, export or a fake-tensor mode looks on: then only registered ops may run."""
    return torch.compiler.is_compiling() or type(tensor) not in _PLAIN


class KernelOp:
    """`op(*args)` launches; `op.overload` is the registered torch.ops entry (for opcheck and graph inspection).

    launch         allocates the outputs and launches; its annotations are the op's schema, its name the op's name
    fake           shapes and dtypes of the outputs from those of the inputs
    setup_context  (ctx, inputs, output), backward (ctx, *grads): as in torch.library.register_autograd; both or none
    direct         False for ops with lists of tensors, which autograd.Function cannot see into
    mutates        names of the arguments that the launch writes to, in place of outputs
    """

    def __init__(
        self,
        launch: Callable[..., Any],
        fake: Callable[..., Any],
        *,
        setup_context: Callable[..., None] | None = None,
        backward: Callable[..., Any] | None = None,
        direct: bool = True,
        mutates: Sequence[str] = (),
    ):
        name = launch.__name__.lstrip("_")
        definition = torch.library.custom_op(f"{NAMESPACE}::{name}", launch, mutates_args=tuple(mutates))
        definition.register_fake(fake)
        self.overload = getattr(getattr(torch.ops, NAMESPACE), name).default
        self._direct = launch if direct else None
        if backward is not None:
            definition.register_autograd(backward, setup_context=setup_context)
            if direct:
                members = {"forward": launch, "setup_context": setup_context, "backward": backward}
                function = type(name, (torch.autograd.Function,), {k: staticmethod(f) for k, f in members.items()})
                self._direct = function.apply

    def __call__(self, *args: Any) -> Any:
        if self._direct is None or traced(args[0]):
            return self.overload(*args)
        return self._direct(*args)
