"""Muon: one matrix as torch's own, shares of many as whole ones. test_zero.py has it under ZeRO on two ranks."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from mirl.engine.configuration.config import OptimConfig
from mirl.engine.distributed import muon
from mirl.engine.distributed.muon import Matrix, MuonAdamW, Share
from mirl.engine.models import MIRL, model_config
from mirl.engine.training.optimizer import build_optimizer

SETTINGS = {"lr": 2e-3, "betas": (0.9, 0.95), "eps": 1e-8}


def steps_of(optimizer: torch.optim.Optimizer, weight: nn.Parameter, count: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    for _ in range(count):
        weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (24, 24)])
def test_a_matrix_is_stepped_as_by_torch(shape):
    start = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    group = {"params": [ours], "weight_decay": 0.05, "muon": True}
    optimizer = MuonAdamW([group], **SETTINGS)
    reference = torch.optim.Muon([theirs], lr=2e-3, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    moved, expected = steps_of(optimizer, ours) - start, steps_of(reference, theirs) - start
    # Torch iterates in bfloat16, which has 8 bits.
    assert (moved - expected).norm() < 0.02 * expected.norm()
    torch.testing.assert_close(optimizer.state[ours]["exp_avg"], reference.state[theirs]["momentum_buffer"])
    assert "exp_avg_sq" not in optimizer.state[ours]


def test_an_update_is_as_long_as_one_of_adamw():
    """The rule for the learning rate: a root mean square of 0.2 to 0.4, whatever the shape."""
    for rows, columns in [(64, 64), (192, 64), (64, 256)]:
        weight = nn.Parameter(torch.zeros(rows, columns))
        optimizer = MuonAdamW([{"params": [weight], "weight_decay": 0.0, "muon": True}], **SETTINGS)
        moved = steps_of(optimizer, weight, 1)
        assert 0.15 < float(moved.square().mean().sqrt()) / SETTINGS["lr"] < 0.25


def test_only_matrices_of_blocks_are_muons():
    size = {"depth": 4, "width": 48, "heads": 4, "segments": 2, "decoder_width": 32, "decoder_heads": 4}
    model = MIRL(model_config("vit_s", **size))
    optimizer = build_optimizer(model, OptimConfig(steps=1, optimizer="muon"), torch.device("cpu"))
    names = {parameter: name for name, parameter in model.named_parameters()}
    of_muon = {names[one] for group in optimizer.param_groups if group.get("muon") for one in group["params"]}
    assert {"encoder.blocks.3.attn.qkv.weight", "decoders.1.blocks.0.cross_attn.kv.weight"} <= of_muon
    assert not [name for name in of_muon if "blocks" not in name or name.endswith("bias")]
    left = {name for name, parameter in model.named_parameters() if parameter.ndim == 2} - of_muon
    assert {name.split(".")[-2 if "head" in name else 0] for name in left} == {"embeds", "head"}
    counted = sum(len(group["params"]) for group in optimizer.param_groups)
    assert counted == len(list(model.parameters()))


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match="Muon steps matrices"):
        MuonAdamW([{"params": [nn.Parameter(torch.zeros(3))], "weight_decay": 0.0, "muon": True}], **SETTINGS)


@pytest.mark.parametrize("seed", range(20))
def test_shares_put_together_are_the_whole(seed, monkeypatch):
    """Any number of ranks, any sizes, padding behind the last matrix, matrices larger than a share."""
    draw = random.Random(seed)
    monkeypatch.setattr(muon, "TOGETHER", draw.choice([1, 200, 10**6]))
    shapes = [draw.choice([(3, 5), (8, 8), (20, 4), (1, 2)]) for _ in range(draw.randint(1, 9))]
    matrices, end = [], 0
    for rows, columns in shapes:
        matrices.append(Matrix(rows, columns, end))
        end = matrices[-1].last
    ranks = draw.randint(1, 6)
    size = -(-(end + draw.randint(0, 9)) // ranks)
    generator = torch.Generator().manual_seed(seed)
    gradient, momentum = (torch.randn(ranks * size, generator=generator) for _ in range(2))
    update = gradient.lerp(momentum, muon.MOMENTUM)

    def exchanged(_gradient, _momentum, share, across):
        for matrix in across:
            owners = [share.rank, *(other.rank for other in share.others(matrix))]
            parts = [share.of(rank).within(matrix) for rank in sorted(owners)]
            # The parts of all owners are the matrix, once.
            assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
            assert parts[-1].stop == matrix.last - matrix.first
        return [update[matrix.first : matrix.last] for matrix in across]

    monkeypatch.setattr(muon, "_exchanged", exchanged)
    found = torch.zeros(ranks * size)
    for rank in range(ranks):
        share = Share(rank * size, (rank + 1) * size, rank)
        here = [matrix for matrix in matrices if share.touches(matrix)]
        mine = found[share.first : share.last]
        for chunk, updates in muon.updates_of(
            gradient[share.first : share.last], momentum[share.first : share.last], share, here
        ):
            for matrix, part in zip(chunk, updates, strict=True):
                mine[share.part_of(matrix)] += part
    for matrix in matrices:
        whole = update[matrix.first : matrix.last].view(1, matrix.rows, matrix.columns)
        torch.testing.assert_close(found[matrix.first : matrix.last], muon.orthogonalise(whole).flatten())
    assert not found[end:].any()
