"""What a choice is: one thing that a model computes in several places, and the implementations that give the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mirl.engine.configuration.config import RunConfig

Note = Callable[[Mapping[str, int | str], torch.dtype], None]
Implementation = Callable[..., Tensor | tuple[Tensor, ...]]
# How the compiler is called for a candidate of a compiled region.
REGION_BACKEND = "inductor"


class Compiled:
    """A function through the compiler, for tensors of one shape; compiled when it is first called."""

    def __init__(self, function: Implementation) -> None:
        self._function = torch.compile(function, backend=REGION_BACKEND, dynamic=False, fullgraph=True)

    def __call__(self, *leaves: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self._function(*leaves)


@dataclass(frozen=True, kw_only=True)
class Use:
    """One shape of a choice: ``sizes`` by name ("B" is the batch), and whether it is inside a compiled region."""

    sizes: tuple[tuple[str, int | str], ...]
    dtype: torch.dtype
    in_region: bool

    def __getitem__(self, name: str) -> Any:
        return dict(self.sizes)[name]

    @property
    def key(self) -> str:
        """How a table names it."""
        sizes = " ".join(f"{name} {value}" for name, value in self.sizes)
        return f"{sizes} {str(self.dtype).removeprefix('torch.')}{' in a region' if self.in_region else ''}"

    @property
    def volume(self) -> int:
        """The product of the sizes, to compare uses of one choice."""
        return math.prod(value for _, value in self.sizes if isinstance(value, int))

    def with_batch(self, most: int) -> Use:
        """The same use for a batch of ``most`` images, or fewer."""
        return replace(
            self, sizes=tuple((name, min(value, most) if name == "B" else value) for name, value in self.sizes)
        )


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One declaration; `mirl.engine.training.choices.registry` lists them all.

    left_open(model, run, in_region): whether the settings leave this open; what was asked for by name is not measured.
    watch(module, note): if ``module`` computes this, have it call ``note(sizes, dtype)`` whenever it does, and return
    what ends that; else None.
    inputs(use, device, generator): the tensors to differentiate by, of the run's shapes and layout; where none of them
        requires a gradient, results alone are compared and timed.
    candidates(use, device): functions of these tensors, by name; each returns a tensor or several.
    reference(use): the plainest function of them, which results and gradients of all candidates are compared with.
    tolerance: largest norm of the difference, relative to the norm of the reference, by dtype.
    current(module, in_region): the candidate that the module uses now: the default.
    apply(model, module, name, in_region): make the module use candidate ``name``.
    """

    name: str
    left_open: Callable[[Any, RunConfig, bool], bool]
    watch: Callable[[nn.Module, Note], Callable[[], None] | None]
    inputs: Callable[[Use, torch.device, torch.Generator], Sequence[Tensor]]
    candidates: Callable[[Use, torch.device], Mapping[str, Implementation]]
    reference: Callable[[Use], Implementation]
    tolerance: Mapping[torch.dtype, float]
    current: Callable[[nn.Module, bool], str]
    apply: Callable[[Any, nn.Module, str, bool], None]


def random_leaf(
    shape: Sequence[int], use: Use, device: torch.device, generator: torch.Generator, scale: float = 1.0
) -> Tensor:
    """A normally distributed input to differentiate by. ``generator`` is of ``device``."""
    made = torch.randn(*shape, device=device, dtype=torch.float32, generator=generator) * scale
    return made.to(use.dtype).requires_grad_()
