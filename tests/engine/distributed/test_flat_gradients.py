"""Gradients in one flat buffer, on one rank and with the few attributes of DeepSpeed's optimiser that they need; whole
trainings on two ranks are in test_zero.py.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mirl.engine.distributed import flat_gradients
from mirl.engine.distributed.deepspeed_patches import take_gradients


@pytest.fixture(scope="module", autouse=True)
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class TwoGroups(nn.Module):
    """Weights in one group and biases in another, as in training; ``spare`` is not always used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.spare = nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(3, 3)

    def forward(self, inputs: torch.Tensor, *, spare: bool = False) -> torch.Tensor:
        hidden = self.second(torch.tanh(self.first(inputs)))
        return (self.spare(hidden) if spare else hidden).square().mean()


def make(model: nn.Module, *, accumulation: int = 1, world_size: int = 1) -> SimpleNamespace:
    """What `take_gradients` uses of a DeepSpeedZeroOptimizer."""
    groups = [[p for p in model.parameters() if p.dim() == 2], [p for p in model.parameters() if p.dim() == 1]]
    flats = [torch.cat([p.detach().reshape(-1) for p in group] + [torch.zeros(1)]) for group in groups]  # one to pad
    offsets = [[sum(p.numel() for p in group[:i]) for i in range(len(group))] for group in groups]
    optimizer = SimpleNamespace(
        dp_process_group=None,
        reduce_bucket_size=100,
        bit16_groups=groups,
        bit16_groups_flat=flats,
        partition_size=[flat.numel() // world_size for flat in flats],
        round_robin_bit16_indices=[list(range(len(group))) for group in groups],
        round_robin_bit16_offsets=offsets,
        averaged_gradients={},
        boundary=True,
        _grad_acc_hooks=[],
    )
    optimizer.is_gradient_accumulation_boundary = lambda: optimizer.boundary
    optimizer.flat = take_gradients(optimizer, model.named_parameters(), accumulation=accumulation)
    return optimizer


def expected(model: nn.Module, optimizer: SimpleNamespace, loss: torch.Tensor) -> list[torch.Tensor]:
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    of = dict(zip(model.parameters(), gradients, strict=True))
    return [
        torch.cat([torch.zeros(p.numel()) if of[p] is None else of[p].reshape(-1) for p in group] + [torch.zeros(1)])
        for group in optimizer.bit16_groups
    ]


def found(optimizer: SimpleNamespace) -> list[torch.Tensor]:
    return [optimizer.averaged_gradients[number].flat_partition for number in range(2)]


@pytest.mark.parametrize("copied_together", [1, 2**20])
def test_gradients_lie_where_the_weights_do(monkeypatch, copied_together) -> None:
    monkeypatch.setattr(flat_gradients, "COPIED_TOGETHER", copied_together)
    monkeypatch.setattr(flat_gradients, "NORM_PIECE", 10)
    model, inputs = TwoGroups(), torch.randn(4, 5)
    optimizer = make(model)
    wanted = expected(model, optimizer, model(inputs, spare=True))
    model(inputs, spare=True).backward()
    optimizer.backward_epilogue()
    assert all(torch.equal(a, b) for a, b in zip(found(optimizer), wanted, strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())
    norm = torch.cat(wanted).double().norm().float()
    assert torch.allclose(optimizer.scaled_global_norm(), norm, rtol=1e-6)


def test_micro_batches_add_up_in_float32() -> None:
    model = TwoGroups().bfloat16()
    optimizer = make(model, accumulation=2)
    halves = [torch.randn(4, 5, dtype=torch.bfloat16) for _ in range(2)]
    wanted = [expected(model, optimizer, model(half)) for half in halves]
    for number, half in enumerate(halves):
        optimizer.boundary = number == 1
        model(half).backward()
        optimizer.backward_epilogue()
    for group, parts in enumerate(zip(*wanted, strict=True)):
        assert torch.equal(found(optimizer)[group], parts[0].float() + parts[1].float())


def test_a_parameter_without_a_gradient_has_zeros_and_not_those_of_the_step_before() -> None:
    model, inputs = TwoGroups(), torch.randn(4, 5)
    optimizer = make(model)
    model(inputs, spare=True).backward()
    optimizer.backward_epilogue()
    wanted = expected(model, optimizer, model(inputs))
    model(inputs).backward()
    optimizer.backward_epilogue()
    assert all(torch.equal(a, b) for a, b in zip(found(optimizer), wanted, strict=True))


def test_a_parameter_that_is_visited_twice() -> None:
    """As in reentrant checkpointing, whose backward passes are several."""
    model, inputs = TwoGroups(), torch.randn(4, 5, requires_grad=True)

    def twice() -> torch.Tensor:
        return sum(checkpoint(model, inputs * scale, use_reentrant=True) for scale in (1, 2))

    optimizer = make(model)
    wanted = expected(model, optimizer, model(inputs) + model(inputs * 2))
    twice().backward()
    optimizer.backward_epilogue()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found(optimizer), wanted, strict=True))


def test_pieces_of_two_ranks(monkeypatch) -> None:
    """A piece belongs to one rank unless it is small; every gradient knows the pieces that it lies in."""
    monkeypatch.setattr(flat_gradients, "LEAST_PIECE", 10)
    model = TwoGroups()
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)
    optimizer = make(model, world_size=2)
    pieces = sorted(optimizer.flat._order, key=lambda piece: piece.first)
    # 65 + 1 weights: 33 of each rank; from 128 on 13 + 1 biases, 7 of each rank, which are few.
    assert [(piece.first, piece.last, piece.owner) for piece in pieces] == [(0, 33, 0), (33, 66, 1), (128, 142, None)]
    names = [[slot.name for slot in piece.slots] for piece in pieces]
    assert names == [
        ["first.weight"],
        ["first.weight", "second.weight", "spare.weight"],
        ["first.bias", "second.bias", "spare.bias"],
    ]
    # Backward meets the last parameters first: what has to wait for the very first one is reduced last.
    assert [piece.first for piece in optimizer.flat._order] == [128, 33, 0]


def test_a_gradient_that_comes_after_it_was_reduced(monkeypatch) -> None:
    model, inputs = TwoGroups(), torch.randn(4, 5)
    monkeypatch.setattr(flat_gradients, "COPIED_TOGETHER", 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(torch.distributed, "get_global_rank", lambda group, rank: 0)
    make(model, world_size=2)
    model(inputs, spare=True).backward()
    with pytest.raises(RuntimeError, match=r"the gradient of spare.bias came again .*use_reentrant=False"):
        model(inputs, spare=True).backward()


def test_every_step_reduces_what_lies_ready_before_its_backward_pass_ends(monkeypatch) -> None:
    model, inputs = TwoGroups(), torch.randn(4, 5)
    monkeypatch.setattr(flat_gradients, "COPIED_TOGETHER", 1)
    monkeypatch.setattr(flat_gradients, "LEAST_PIECE", 10)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(torch.distributed, "get_global_rank", lambda group, rank: 0)
    optimizer = make(model, world_size=2)
    for _ in range(2):
        model(inputs, spare=True).backward()
        assert all(piece.reducing for piece in optimizer.flat._order)
        optimizer.backward_epilogue()
        assert not any(piece.reducing for piece in optimizer.flat._order)
