"""Candidates that are slow, fail or are wrong, and a use of attention that a CPU measures in milliseconds."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mirl.engine.training.choices.attention import ATTENTION, PACKED
from mirl.engine.training.choices.declaration import Choice, Compiled, Use

CPU = torch.device("cpu")


def attention_use(**changes: Any) -> Use:
    """Self-attention of two images; ``changes`` of `Use`, or of its sizes."""
    sizes = {"B": 2, "S": 9, "T": 9, "H": 2, "d": 8, "layout": PACKED} | {
        key: value for key, value in changes.items() if key not in ("dtype", "in_region")
    }
    return Use(
        sizes=tuple(sizes.items()), dtype=changes.get("dtype", torch.float32),
        in_region=changes.get("in_region", False),
    )  # fmt: skip


def with_candidates(made: Callable[[Callable[..., Tensor]], dict[str, Any]], choice: Choice = ATTENTION) -> Choice:
    """``choice`` with other candidates, made from its reference."""
    return dataclasses.replace(choice, candidates=lambda use, device: made(choice.reference(use)))


def slow(run: Callable[..., Any], seconds: float = 0.06) -> Callable[..., Any]:
    """``run``, later; compiled if it was."""
    if isinstance(run, Compiled):
        return _LateCompiled(run, seconds)

    def later(*leaves: Tensor) -> Any:
        time.sleep(seconds)
        return run(*leaves)

    return later


class _LateCompiled(Compiled):
    def __init__(self, run: Compiled, seconds: float) -> None:
        self._run, self._seconds = run, seconds

    def __call__(self, *leaves: Tensor) -> Any:
        time.sleep(self._seconds)
        return self._run(*leaves)


def failing(*leaves: Tensor) -> Tensor:
    raise NotImplementedError("no kernel image is available\nfor this device")
