"""Gradients of ZeRO 1 and 2 lie in one flat buffer, laid out like the flat weights.

Nothing here touches DeepSpeed: `deepspeed_patches.take_gradients` reads its layout and replaces its gradient path.

DeepSpeed 0.19.8 copies a gradient into a bucket, the reduced bucket into the partition, and the partition into the flat
tensor of the optimiser, with Python for every parameter on the way. Here a gradient is copied once, into the buffer
that the optimiser reads, many parameters a call. Gradients that are ready are reduced while the backward pass goes on.
Values are those of DeepSpeed's own path up to the order of sums: reduced in the compute dtype, averaged and stepped in
float32.

The buffer has all gradients of the model on every rank, in the compute dtype, or in float32 if several micro-batches
add up. For a model of up to 4e8 parameters the buffer is smaller than DeepSpeed's two buckets and its partition. Ranks
communicate once a step, whatever the number of micro-batches.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mirl.engine.distributed.spike_gate import SpikeGate

# Gradients wait for each other until so many values can be copied by one call. On a CPU they still lie in the cache. On
# a GPU a call moves more than it costs to begin, and little is left to reduce after the last call.
COPIED_TOGETHER = 2**20
COPIED_TOGETHER_ON_GPU = 2**24
# Neighbours in the buffer that are both smaller than this are reduced together, for all ranks.
LEAST_PIECE = 2**20
# The norm is taken over the norms of pieces of this length: one float32 sum over all squares would lose digits, and a
# CPU would add it up on one thread.
NORM_PIECE = 2**18
ALIGNMENT = 64


def copied_together(*, on_gpu: bool) -> int:
    """Return the number of values that wait for each other."""
    return COPIED_TOGETHER_ON_GPU if on_gpu else COPIED_TOGETHER


def most_waiting(parameters: int, *, on_gpu: bool) -> int:
    """Return the most values of gradients that wait to be copied at a time, of a model with so many ``parameters``."""
    return min(copied_together(on_gpu=on_gpu), parameters)


def copies_of_gradients(parameters: Sequence[int], *, on_gpu: bool) -> int:
    """Count the calls that copy the gradients of a backward pass. ``parameters``: the values of each parameter."""
    copies, waiting, together = 0, 0, copied_together(on_gpu=on_gpu)
    for values in reversed(parameters):
        waiting += values
        if waiting >= together:
            copies, waiting = copies + 1, 0
    return copies + (waiting > 0)


@dataclass(frozen=True, eq=False)
class FlatGroup:
    """This is one parameter group as the optimiser holds it.

    ``weights``: flat, with their padding. ``part``: elements that each rank owns. ``offsets``: the first element of
    each parameter.
    """

    weights: Tensor
    part: int
    offsets: dict[nn.Parameter, int]


@dataclass(eq=False)
class _Piece:
    """One call reduces elements ``first:last`` of the buffer, to ``owner``, or to all ranks if ``owner`` is None."""

    first: int
    last: int
    owner: int | None
    slots: list[_Slot] = field(default_factory=list)
    missing: int = 0
    reducing: bool = False


@dataclass(eq=False)
class _Slot:
    """A slot is the place of one parameter's gradient."""

    name: str
    view: Tensor
    pieces: list[_Piece]
    written_in: int = -1  # the last step
    counted_in: int = -1  # the last backward pass


class FlatGradients:
    """Collect the gradients of all ``groups`` on their way from autograd to the optimiser.

    The owner registers a `collector` for each parameter, calls `finish` after each backward pass, and `norm` before the
    step.

    ``process_group``: the ranks that share the gradients. ``parameters``: named, in the order of the model. ``bucket``:
    most values reduced by one call. ``accumulation``: micro-batches of a step. ``is_last_pass``: whether the backward
    pass that runs is the last one of its step.
    """

    def __init__(
        self,
        groups: Sequence[FlatGroup],
        parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        process_group: Any,
        bucket: int,
        accumulation: int,
        is_last_pass: Callable[[], bool],
    ) -> None:
        # Whether `finish` leaves the sums of the ranks' gradients as they are, for a step that averages them itself.
        self.leaves_sums = False
        self.gate: SpikeGate | None = None
        self._groups = groups
        self._is_last_pass = is_last_pass
        self._process_group = process_group
        self._world_size = torch.distributed.get_world_size(process_group)
        self._rank = torch.distributed.get_rank(process_group)
        self._pending: list[tuple[_Slot, Tensor]] = []
        self._pending_values = 0
        self._together = copied_together(on_gpu=groups[0].weights.is_cuda)
        self._works: list[Any] = []
        self._kept: dict[int, Tensor] = {}

        weights = groups[0].weights
        self._starts, end = [], 0
        for group in groups:
            self._starts.append(end)
            end += -(-group.weights.numel() // ALIGNMENT) * ALIGNMENT
        dtype = torch.float32 if accumulation > 1 else weights.dtype
        self._flat = torch.zeros(end, dtype=dtype, device=weights.device)
        # The part of each group that this rank owns.
        self._reduced = [
            self._flat[start + self._rank * group.part : start + (self._rank + 1) * group.part]
            for start, group in zip(self._starts, groups, strict=True)
        ]
        pieces = self._make_pieces(bucket) if self._world_size > 1 else []
        self._slots = self._make_slots(pieces, {parameter: name for name, parameter in parameters})
        # The backward pass meets the model's parameters from the last to the first, and on every rank alike. Reductions
        # start in this order, whatever completes first.
        place = {slot: index for index, slot in enumerate(self._slots.values())}
        self._order = sorted(pieces, key=lambda piece: min((place[slot] for slot in piece.slots), default=0))[::-1]
        self._next = self._step_number = self._pass_number = 0
        self._begin()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters whose gradients are taken, in the order of the model."""
        return list(self._slots)

    @property
    def share(self) -> tuple[int, torch.dtype]:
        """Count the values that this rank owns in all groups, and name the dtype in which they are added up."""
        return sum(part.numel() for part in self._reduced), self._flat.dtype

    # --- layout

    def _make_pieces(self, bucket: int) -> list[_Piece]:
        pieces: list[_Piece] = []
        for start, group in zip(self._starts, self._groups, strict=True):
            for owner in range(self._world_size):
                first, end = start + owner * group.part, start + (owner + 1) * group.part
                while first < end:
                    last = min(first + bucket, end)
                    self._append(pieces, _Piece(first, last, owner), bucket)
                    first = last
        return pieces

    @staticmethod
    def _append(pieces: list[_Piece], piece: _Piece, bucket: int) -> None:
        before = pieces[-1] if pieces else None
        small = before is not None and max(piece.last - piece.first, before.last - before.first) < LEAST_PIECE
        if small and piece.last - before.first <= bucket:
            before.last = piece.last
            if before.owner != piece.owner:
                before.owner = None
        else:
            pieces.append(piece)

    def _make_slots(self, pieces: list[_Piece], names: dict[nn.Parameter, str]) -> dict[nn.Parameter, _Slot]:
        firsts = [piece.first for piece in pieces]
        found: dict[nn.Parameter, _Slot] = {}
        for start, group in zip(self._starts, self._groups, strict=True):
            for parameter, offset in group.offsets.items():
                first, last = start + offset, start + offset + parameter.numel()
                touched = pieces[bisect_right(firsts, first) - 1 : bisect_right(firsts, last - 1)] if pieces else []
                slot = _Slot(names[parameter], self._flat[first:last].view(parameter.shape), touched)
                for piece in touched:
                    piece.slots.append(slot)
                found[parameter] = slot
        return {parameter: found[parameter] for parameter in names if parameter in found}

    # --- a step

    def _begin(self) -> None:
        """Prepare the first micro-batch of a step."""
        # Slots name their step and pass, so that no loop over a model's hundreds of parameters has to reset them.
        self._step_number += 1
        self._unwritten = len(self._slots)
        self._next = 0
        self._works.clear()
        for piece in self._order:
            piece.missing, piece.reducing = len(piece.slots), False

    def collector(self, parameter: nn.Parameter) -> Callable[[nn.Parameter], None]:
        """Return the hook for autograd to call when the gradient of ``parameter`` has been added up.

        Each parameter has its own hook, since a look-up in a dict of tensors and `Tensor.numel` cost more than the rest
        of a hook.
        """
        slot, values, pending, together = self._slots[parameter], parameter.numel(), self._pending, self._together

        def collect(parameter: nn.Parameter) -> None:
            pending.append((slot, parameter.grad))
            parameter.grad = None
            self._pending_values += values
            if self._pending_values >= together:
                self._write()

        return collect

    @torch.no_grad()
    def _write(self) -> None:
        """Copy, or add, the pending gradients, and start the reductions that may follow."""
        views: list[Tensor] = []
        gradients: list[Tensor] = []
        more: list[tuple[Tensor, Tensor]] = []
        step, shared = self._step_number, self._world_size > 1
        last_pass = self._is_last_pass()
        for slot, gradient in self._pending:
            if slot.written_in == step:
                more.append((slot.view, gradient))
            else:
                slot.written_in = step
                views.append(slot.view)
                gradients.append(gradient)
            if shared:
                self._count(slot, last_pass)
        self._pending.clear()  # the hooks hold this list
        self._pending_values = 0
        self._unwritten -= len(views)
        if views:
            torch._foreach_copy_(views, gradients)
        for view, gradient in more:
            view.add_(gradient)
        while self._next < len(self._order) and not self._order[self._next].missing:
            self._reduce_next()

    def _count(self, slot: _Slot, last_pass: bool) -> None:
        """Note that the gradient of ``slot`` is written, for the pieces that wait for it."""
        if any(piece.reducing for piece in slot.pieces):
            raise RuntimeError(
                f"the gradient of {slot.name} came again after it had been reduced: this backward pass visits a "
                "parameter more than once, as reentrant recomputation does: give torch.utils.checkpoint "
                "use_reentrant=False"
            )
        if last_pass and slot.counted_in != self._pass_number:
            slot.counted_in = self._pass_number
            for piece in slot.pieces:
                piece.missing -= 1

    def _reduce_next(self) -> None:
        piece = self._order[self._next]
        self._next += 1
        piece.reducing = True
        values = self._flat[piece.first : piece.last]
        if piece.owner is None:
            work = torch.distributed.all_reduce(values, group=self._process_group, async_op=True)
        else:
            owner = torch.distributed.get_global_rank(self._process_group, piece.owner)
            work = torch.distributed.reduce(values, owner, group=self._process_group, async_op=True)
        self._works.append(work)

    @torch.no_grad()
    def finish(self) -> list[Tensor]:
        """End a backward pass.

        Returns the averaged float32 gradient of this rank's part of each group after the last pass of a step, nothing
        after the others. With ``leaves_sums`` they are the sums in the dtype of the buffer, valid until the next
        gradient is collected.
        """
        self._write()
        self._pass_number += 1
        if not self._is_last_pass():
            return []
        if self._unwritten:
            for slot in self._slots.values():
                if slot.written_in != self._step_number:  # it has no gradient now, and still holds the last step's
                    slot.view.zero_()
        while self._next < len(self._order):
            self._reduce_next()
        for work in self._works:
            work.wait()
        if self.leaves_sums:
            self._begin()
            return self._reduced
        averaged = []
        for number, reduced in enumerate(self._reduced):
            partition = self._in_float32(number)
            if self._world_size > 1:
                torch.div(reduced, self._world_size, out=partition)
            elif partition is not reduced:
                partition.copy_(reduced)
            averaged.append(partition)
        self._begin()
        return averaged

    def _in_float32(self, number: int) -> Tensor:
        """Return memory for the gradient that the optimiser reads.

        A GPU's allocator has memory at hand now that activations are gone. On a CPU fresh memory costs more than the
        copy, so the memory is kept.
        """
        reduced = self._reduced[number]
        if reduced.dtype == torch.float32:
            return reduced
        if reduced.is_cuda:
            return torch.empty_like(reduced, dtype=torch.float32)
        if number not in self._kept:
            self._kept[number] = torch.empty_like(reduced, dtype=torch.float32)
        return self._kept[number]

    def norm(self, finished: Iterable[Tensor]) -> Tensor:
        """Return the norm of the whole averaged gradient over all groups and ranks, a float32 scalar.

        It is NaN or infinite where one of the values is, and infinite where `gate` is closed. ``finished``: what
        `finish` returned.
        """
        squares = sum_of_squares(finished)
        sums = squares if self.gate is None else self.gate.join(squares)
        if self._world_size > 1:
            torch.distributed.all_reduce(sums, group=self._process_group)
        norm = (sums if self.gate is None else sums[0]).sqrt()
        if self.leaves_sums:
            norm = norm / self._world_size
        return norm if self.gate is None else self.gate.pass_on(norm, sums[1])


def sum_of_squares(parts: Iterable[Tensor]) -> Tensor:
    """Add up the squares of all values of flat ``parts`` in float32: a scalar, not finite if a value is not."""
    norms = []
    for part in parts:
        whole = part.numel() // NORM_PIECE * NORM_PIECE
        rows, rest = part[:whole].view(-1, NORM_PIECE), part[whole:]
        norms += [
            torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32),
            torch.linalg.vector_norm(rest, dtype=torch.float32).reshape(1),
        ]
    return torch.cat(norms).square().sum()
