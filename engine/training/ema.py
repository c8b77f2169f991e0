"""An exponential moving average of the fp32 weights, sharded among the ranks as `TrainEngine` shards the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mirl.engine.checkpoints.averaging import EMA as KIND
from mirl.engine.distributed.ds_engine import Fragment, FragmentReader, TrainEngine
from mirl.errors import UserError


class ShardedEma:
    """average = d * average + (1 - d) * weight, of this rank's part of every trainable parameter.

    d is ``decay``, and in the t-th update at most (1 + t) / (10 + t): a short run is not left with its first weights.
    It costs as much memory as one moment of AdamW. All ranks make the same calls.
    """

    def __init__(self, engine: TrainEngine, decay: float, *, updates: int = 0) -> None:
        """Begins as a copy of the weights. updates: how many there were before, in a run that is resumed.

        UserError unless 0 <= decay < 1.
        """
        if not 0 <= decay < 1:
            raise UserError(f"ema is {decay}: give a decay of at least 0 and below 1, e.g. 0.9999")
        self.engine, self.decay, self.updates = engine, decay, updates
        self._average = {weight.name: _like(weight, weight.tensor.detach().clone()) for weight in self._weights()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights; call it after each step that was applied."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        weights = [weight.tensor for weight in self._weights()]
        if weights:
            torch._foreach_lerp_([average.tensor for average in self._average.values()], weights, 1 - decay)

    def fragments(self) -> Iterator[Fragment]:
        """The averages of this rank, for a checkpoint: live tensors of kind "ema"."""
        yield from self._average.values()

    @torch.no_grad()
    def load(self, read: FragmentReader) -> None:
        """Set the averages of this rank from ``read``, whatever the layout they were saved under, after the engine's
        state, which knows how many updates there were.
        """
        self.updates = self.engine.loaded_steps
        for average in self._average.values():
            average.tensor.copy_(read(average.name, KIND, average.start, average.tensor.numel()))

    @contextmanager
    def swapped_in(self) -> Iterator[nn.Module]:
        """The engine's module with the averages for weights, in its compute dtype; afterwards as it was, to the bit.

        A second copy of the compute weights is held meanwhile. No step may be taken inside.
        """
        swap = _swap_partitions if self.engine.stage == 3 else _swap_whole
        with swap(self.engine.module, self._average):
            yield self.engine.module

    def _weights(self) -> Iterator[Fragment]:
        return (fragment for fragment in self.engine.fragments() if fragment.kind == "weight")


def _like(weight: Fragment, tensor: Tensor) -> Fragment:
    return Fragment(name=weight.name, kind=KIND, start=weight.start, tensor=tensor)


@contextmanager
def _swap_whole(module: nn.Module, averages: dict[str, Fragment]) -> Iterator[None]:
    """ZeRO 1 and 2: every rank holds every compute weight whole, so each gets the pieces of all ranks."""
    parameters = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    kept = [parameter.detach().clone() for _, parameter in parameters]
    try:
        for name, parameter in parameters:
            flat = torch.zeros(parameter.numel(), dtype=parameter.dtype, device=parameter.device)
            if average := averages.get(name):
                flat[average.start : average.start + average.tensor.numel()] = average.tensor
            if torch.distributed.get_world_size() > 1:
                torch.distributed.all_reduce(flat)  # one rank's number and zeros: exact
            parameter.data.copy_(flat.view_as(parameter))
        yield
    finally:
        for (_, parameter), weight in zip(parameters, kept, strict=True):
            parameter.data.copy_(weight)


@contextmanager
def _swap_partitions(module: nn.Module, averages: dict[str, Fragment]) -> Iterator[None]:
    """ZeRO 3: a rank holds its part alone. Small parameters are also kept whole, and gathered again after a change."""
    parameters = dict(module.named_parameters())
    whole = _release(parameters)
    kept = {name: parameters[name].ds_tensor.detach().clone() for name in averages}
    try:
        for name, average in averages.items():
            parameters[name].ds_tensor.data[: average.tensor.numel()] = average.tensor
        _gather(whole)
        yield
    finally:
        _release(parameters)
        for name, partition in kept.items():
            parameters[name].ds_tensor.data.copy_(partition)
        _gather(whole)


def _release(parameters: dict[str, nn.Parameter]) -> list[nn.Parameter]:
    """Drop the whole values of parameters, here the same ones on all ranks; returns which had them."""
    whole = [parameter for parameter in parameters.values() if parameter.ds_status.name == "AVAILABLE"]
    if whole:
        whole[0].partition(whole)
    return whole


def _gather(parameters: list[nn.Parameter]) -> None:
    if parameters:
        parameters[0].all_gather(parameters)
