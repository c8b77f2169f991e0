"""The choice of the optimiser's step: passes of DeepSpeed and torch, or one (`mirl.engine.distributed.one_pass`).

It is no module's but the engine's, so it comes to the others as a place of its own (`optimizer_places`). What is timed
is the whole of a step on one rank, from the flat gradient and its norm to the weights, on at most `MOST_VALUES`.

Letters: N values of a rank's share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mirl.engine.distributed.ds_engine import TrainEngine
from mirl.engine.distributed.flat_gradients import sum_of_squares
from mirl.engine.training.choices.declaration import Choice, Implementation, Use
from mirl.engine.training.choices.uses import Place
from mirl.kernels.flat_adamw import Coefficients, flat_adamw

PASSES, ONE_PASS = "torch", "one_pass"
# More than any cache holds, and so few that a second set of everything finds room before a run begins.
MOST_VALUES = 2**25
LR, BETAS, EPS, DECAY, CLIP = 0.1, (0.9, 0.95), 1e-8, 0.05, 1.0


def optimizer_places(engine: TrainEngine, device: torch.device) -> list[Place]:
    """The one place of this choice, where ``engine`` can step in one pass on a GPU; none elsewhere.

    On a CPU the pass is several of plain torch.
    """
    if device.type != "cuda" or not engine.can_step_in_one_pass:
        return []
    return [Place(OPTIMIZER, use_of(engine), (engine,))]


def use_of(engine: TrainEngine) -> Use:
    """What ``engine`` steps over: values of this rank, whether they are clipped, and the dtypes."""
    values, gradients, clips = engine.flat_share
    weights = str(engine.weight_dtype).removeprefix("torch.")
    sizes = {"N": values, "clip": "yes" if clips else "no", "weights": weights}
    return Use(sizes=tuple(sizes.items()), dtype=gradients, in_region=False)


def _inputs(use: Use, device: torch.device, generator: torch.Generator) -> Sequence[Tensor]:
    """Gradient, fp32 weight and both moments [N]; none of them is differentiated by."""
    values = min(use["N"], MOST_VALUES)
    grad, master, exp_avg, exp_avg_sq = (
        torch.randn(values, device=device, dtype=torch.float32, generator=generator) for _ in range(4)
    )
    return [grad.to(use.dtype), master, exp_avg, exp_avg_sq.square_()]


class _Stepping:
    """A candidate with a state of its own: the first call makes it from the leaves, every call takes one more step."""

    def __init__(self, use: Use) -> None:
        self._clip = CLIP if use["clip"] == "yes" else 0.0
        self._dtype = getattr(torch, use["weights"])
        self._made: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        self._number = 1

    @torch.no_grad()
    def __call__(self, grad: Tensor, master: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> tuple[Tensor, ...]:
        if self._made is None:
            copies = [state.clone() for state in (master, exp_avg, exp_avg_sq)]
            self._made = (*copies, torch.empty_like(master, dtype=self._dtype))  # type: ignore[assignment]
            self.begin()
        self.step(grad)
        self._number += 1
        return self._made

    def begin(self) -> None:
        """Once, when the state is there."""

    def step(self, grad: Tensor) -> None:
        raise NotImplementedError


class _Passes(_Stepping):
    """As DeepSpeed and torch do it: to float32, the norm, clipping, AdamW, to the compute dtype."""

    def begin(self) -> None:
        assert self._made is not None
        master, exp_avg, exp_avg_sq, _ = self._made
        self._parameter = nn.Parameter(master, requires_grad=False)
        self._optimizer = torch.optim.AdamW(
            [self._parameter], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True
        )
        self._optimizer.state[self._parameter] = {
            "step": torch.zeros((), device=master.device), "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq,
        }  # fmt: skip

    def step(self, grad: Tensor) -> None:
        assert self._made is not None
        wide = grad.to(torch.float32, copy=True)
        norm = sum_of_squares([wide]).sqrt()
        if self._clip:
            wide.mul_(1 / ((norm + 1e-6) / self._clip).clamp(min=1.0))
        self._parameter.grad = wide
        self._optimizer.step()
        self._parameter.grad = None
        self._made[3].copy_(self._parameter)


class _OnePass(_Stepping):
    """`mirl.kernels.flat_adamw` after the norm."""

    def step(self, grad: Tensor) -> None:
        assert self._made is not None
        norm = sum_of_squares([grad]).sqrt()
        numbers = Coefficients.of_step(self._number, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, clip=self._clip)
        flat_adamw(grad, *self._made, norm, numbers)


def _candidates(use: Use, device: torch.device) -> Mapping[str, Implementation]:
    return {PASSES: _Passes(use), ONE_PASS: _OnePass(use)}


def _current(engine: Any, in_region: bool) -> str:
    return ONE_PASS if engine.steps_in_one_pass else PASSES


def _apply(model: Any, engine: Any, name: str, in_region: bool) -> None:
    engine.step_in_one_pass(name == ONE_PASS)


def _watch(module: nn.Module, note: Any) -> Callable[[], None] | None:
    return None


OPTIMIZER = Choice(
    name="optimizer",
    left_open=lambda model, run, in_region: True,
    watch=_watch,
    inputs=_inputs,
    candidates=_candidates,
    reference=lambda use: _Passes(use),
    # Float32 states differ by their rounding, 1e-7; compute weights by those that fall to the other side of one.
    tolerance={torch.bfloat16: 1e-3, torch.float32: 1e-3},
    current=_current,
    apply=_apply,
)
