"""Register a Triton launch as a torch.library op with fake and autograd, at low cost in eager mode.

torch.compile keeps the library op in its graph. The op's dispatcher costs tens of microseconds a call in eager mode,
and a step has hundreds of calls. So plain tensors outside a trace go to an autograd.Function made of the same three
functions instead. Both ways run the same launch, setup_context and backward.

After `set_inlined(True)` the ops that allow it are taken apart when a graph is lowered: Inductor then launches their
kernels itself, without a dispatcher in between, and plans the memory that they write to. The op that is taken apart is
a second one, NAME_inlined. It is made when it is first wanted, because torch loads its compiler for it.
"""

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mirl.kernels.triton_import import HAS_TRITON, INTERPRETED

NAMESPACE, INLINED = "mirl_kernels", "_inlined"
_PLAIN = (Tensor, torch.nn.Parameter)
_taken_apart = threading.local()


def traced(tensor: Tensor) -> bool:
    """Say whether torch.compile, export or a fake-tensor mode looks on: then only registered ops may run."""
    return torch.compiler.is_compiling() or type(tensor) not in _PLAIN


def wrap_triton(kernel: Any) -> Any:
    """Return the kernel itself, or, while its op is taken apart, the wrapper that torch puts into the graph.

    Every launch in an op that may be inlined calls this. torch's own function of this name costs a millisecond a launch
    in eager mode. The name has to be the same: torch looks for calls of it to know which kernels an op has.
    """
    return torch.library.wrap_triton(kernel) if getattr(_taken_apart, "now", False) else kernel


class KernelOp:
    """Calling `op(*args)` launches; `op.overload` is the registered torch.ops entry (for opcheck and graph inspection).

    launch         allocates the outputs and launches; its annotations are the op's schema, its name the op's name
    fake           shapes and dtypes of the outputs from those of the inputs
    setup_context  (ctx, inputs, output), backward (ctx, *grads): as in torch.library.register_autograd; both or none
    direct         False for ops with lists of tensors, which autograd.Function cannot see into
    inline         True where `set_inlined` may take the op apart: every launch in it goes through `wrap_triton`
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
        inline: bool = False,
        mutates: Sequence[str] = (),
    ):
        name = launch.__name__.lstrip("_")
        self._name, self._launch, self._fake, self._mutates = name, launch, fake, tuple(mutates)
        self._setup_context, self._backward = setup_context, backward
        self.overload = self._register(name, torch.library.custom_op, launch)
        self._in_graphs, self._inlined = self.overload, None
        if inline:
            _INLINABLE.append(self)
        self._direct = launch if direct else None
        if backward is not None and direct:
            members = {"forward": launch, "setup_context": setup_context, "backward": backward}
            function = type(name, (torch.autograd.Function,), {k: staticmethod(f) for k, f in members.items()})
            self._direct = function.apply

    def __call__(self, *args: Any) -> Any:
        if self._direct is None or traced(args[0]):
            return self._in_graphs(*args)
        return self._direct(*args)

    def _register(self, name: str, register: Callable[..., Any], launch: Callable[..., Any]) -> Any:
        definition = register(f"{NAMESPACE}::{name}", launch, mutates_args=self._mutates)
        definition.register_fake(self._fake)
        if self._backward is not None:
            definition.register_autograd(self._backward, setup_context=self._setup_context)
        return getattr(getattr(torch.ops, NAMESPACE), name).default

    def inline(self, on: bool) -> None:
        """Take the op apart in graphs that are traced from now on, or no longer (`set_inlined`)."""
        if on and self._inlined is None:
            launch = _taking_apart(self._launch)
            self._inlined = self._register(self._name + INLINED, torch.library.triton_op, launch)
        self._in_graphs = self._inlined if on else self.overload


_INLINABLE: list[KernelOp] = []


def set_inlined(on: bool) -> bool:
    """Let graphs that are traced from now on take the ops apart that allow it, or not. Returns whether they do.

    They never do without Triton or under its interpreter, whose kernels are Python: there no graph can hold a kernel.
    """
    on = on and HAS_TRITON and not INTERPRETED
    for op in _INLINABLE:
        op.inline(on)
    return on


def _taking_apart(launch: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(launch)
    def taken_apart(*args: Any, **kwargs: Any) -> Any:
        _taken_apart.now = True
        try:
            return launch(*args, **kwargs)
        finally:
            _taken_apart.now = False

    return taken_apart
