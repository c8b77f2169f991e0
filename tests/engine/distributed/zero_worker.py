"""One rank of test_zero.py: trains a tiny model under many settings in one process group and writes the losses of each
as JSON.

usage: python -m tests.engine.distributed.zero_worker OUT_PREFIX < cases.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

from mirl.engine.configuration.config import DataConfig, OptimConfig, PretrainConfig, RunConfig
from mirl.engine.distributed import deepspeed_patches, flat_gradients
from mirl.engine.distributed.ds_config import read_ds_config, resolve_batch, resolve_ds_config
from mirl.engine.distributed.ds_engine import KINDS, TrainEngine
from mirl.engine.distributed.launch import Ranks, join, leave
from mirl.engine.models import MIRL, model_config
from mirl.engine.training.noise import mask_noise
from mirl.engine.training.optimizer import build_optimizer
from mirl.errors import UserError

BATCH, STEPS, LR = 8, 3, 2e-3
SIZE = {
    "depth": 4, "width": 48, "heads": 4, "segments": 4, "decoder_width": 32, "decoder_heads": 4, "patch_size": 8,
    "image_height": 32, "image_width": 32,
    "head_init": "xavier",  # from zero heads four steps do not lead far enough to tell two losses apart
}  # fmt: skip


def build(case: dict) -> tuple[PretrainConfig, MIRL]:
    config = PretrainConfig(
        recipe="test",
        model=model_config("vit_s", **SIZE, variant=case.get("variant", "paper")),
        data=DataConfig(),
        optim=OptimConfig(
            batch_size=BATCH,
            micro_batch=case.get("micro_batch", 0),
            steps=STEPS,
            lr=LR,
            clip_grad=0.5,
            optimizer=case.get("optimizer", "adamw"),
        ),
        run=RunConfig(deepspeed_config=case["stage"], precision=case.get("precision", "fp32")),
    )
    torch.manual_seed(0)
    model = MIRL(config.model)
    model.set_activation_checkpointing(case.get("activation_checkpointing", "none"))
    return config, model


def images() -> torch.Tensor:
    return torch.randint(0, 256, (BATCH, 32, 32, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def noise(step: int, first: int, batch: int) -> torch.Tensor:
    return mask_noise(0, step, first, batch, 16)


def bare_loop(case: dict) -> list[float]:
    """The same training without DeepSpeed, in one process."""
    config, model = build(case | {"stage": "zero2"})
    optimizer = build_optimizer(model, config.optim, torch.device("cpu"))
    losses = []
    for step in range(STEPS):
        loss = model(images(), noise=noise(step, 0, BATCH)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_grad)
        optimizer.step()
        losses.append(loss.item())
    return losses


def train(case: dict, ranks: Ranks, states: dict[str, dict[str, torch.Tensor]]) -> list[float] | dict | str:
    """Losses of every step; see `poisoned` and `visited_twice` for what comes of such cases.

    ``states``: the fp32 state of this rank after each case so far, by `name_of` the case. A case "one_pass" must end
    with the state of the same case without it.
    """
    if "visited_twice" in case:
        return visited_twice(case["visited_twice"] == "reentrant", ranks)
    config, model = build(case)
    micro, accumulation = resolve_batch(config, ranks.world_size)
    ds_config = resolve_ds_config(
        read_ds_config(case["stage"]),
        config,
        micro_batch=micro,
        accumulation=accumulation,
        precision=config.run.precision,
        device=ranks.device,
    )
    # Everything of this model fits into one call; many take a smaller measure.
    pieces = case.get("piece", 2**20)
    flat_gradients.COPIED_TOGETHER = flat_gradients.LEAST_PIECE = pieces
    if "piece" in case:
        ds_config["zero_optimization"]["reduce_bucket_size"] = 4 * pieces
    optimizer = build_optimizer(model, config.optim, ranks.device)
    deepspeed_patches.VERSION = case.get("version", deepspeed_patches.TESTED_VERSIONS[0])
    try:
        engine = TrainEngine(model, optimizer, ds_config, flat_gradients=case.get("flat_gradients", True))
    except UserError as error:
        return str(error)
    assert bool(engine.remarks) == ("version" in case)
    if case.get("one_pass"):
        assert engine.can_step_in_one_pass
        engine.step_in_one_pass(True)
    if "poison" in case:
        return poisoned(engine, case["poison"], micro, ranks)
    losses = []
    for step in range(STEPS):
        total = torch.zeros(())
        for part in range(accumulation):
            first = part * micro * ranks.world_size + ranks.rank * micro
            output = engine.forward(images()[first : first + micro], noise=noise(step, first, micro))
            engine.backward(output.loss)
            applied = engine.step(LR)
            total += output.loss.detach().float() / accumulation
        assert applied
        if ranks.world_size > 1:
            torch.distributed.all_reduce(total)
        losses.append(total.item() / ranks.world_size)
    state = {fragment.key: fragment.tensor.detach().clone() for fragment in engine.fragments()}
    if case.get("optimizer") == "muon":
        layouts = optimizer._layouts.values()
        assert ranks.world_size == 1 or any(not share.holds(matrix) for share, here in layouts for matrix in here)
        reload(engine, state)
    states[name_of(case)] = state
    if case.get("one_pass"):
        expected = states[name_of({key: value for key, value in case.items() if key != "one_pass"})]
        assert state.keys() == expected.keys()
        # In float32 by the rounding of three steps. A compute weight in bfloat16 may fall to the other side of a
        # rounding, and then gradients differ in the last of their eight bits. Of each kind as a whole: the gradient of
        # a key's bias is 0 but for rounding, and AdamW moves the bias all the same.
        bound = 1e-5 if config.run.precision == "fp32" else 2e-3
        for kind in KINDS:
            keys = [key for key in state if key.startswith(f"{kind}/")]
            ours, theirs = (torch.cat([made[key].flatten() for key in keys]) for made in (state, expected))
            error = float((ours - theirs).norm() / theirs.norm())
            assert error <= bound, f"{kind} differs by {error:.1e} in one pass"
    return losses


def reload(engine: TrainEngine, state: dict[str, torch.Tensor]) -> None:
    """Assert that the state that Muon leaves has one moment of its matrices, and is set as it was read."""
    matrices = {key.split("/", 1)[1] for key in state if "blocks" in key and "weight@" in key and ".norm" not in key}
    assert matrices and not any(f"exp_avg_sq/{key}" in state for key in matrices)
    assert all(f"exp_avg/{key}" in state for key in matrices)
    assert any(key.startswith("exp_avg_sq/") for key in state)
    for fragment in engine.fragments():
        fragment.tensor.zero_()
    engine.load_fragments(lambda name, kind, start, count: state[f"{kind}/{name}@{start}"], optimizer_steps=STEPS)
    assert all(torch.equal(fragment.tensor, state[fragment.key]) for fragment in engine.fragments())


class VisitedTwice(torch.nn.Module):
    """Recomputed in two parts, of the same weights: by reentrant recomputation each is a backward pass of its own."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.reentrant = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8), reentrant

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        def part(y_BD: torch.Tensor) -> torch.Tensor:
            return self.second(torch.tanh(self.first(y_BD)))

        return sum(checkpoint(part, x_BD * scale, use_reentrant=self.reentrant) for scale in (1, 2)).square().mean()


def visited_twice(reentrant: bool, ranks: Ranks) -> list[float] | str:
    """Losses of a model whose gradients come again after they were reduced; or what the engine says."""
    flat_gradients.COPIED_TOGETHER = flat_gradients.LEAST_PIECE = 1
    model = VisitedTwice(reentrant)
    ds_config = {
        "train_batch_size": 2 * ranks.world_size, "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True,
    }  # fmt: skip
    engine = TrainEngine(model, torch.optim.AdamW(model.parameters()), ds_config)
    losses = []
    try:
        for _ in range(STEPS):
            loss = engine.forward(torch.ones(2, 8, requires_grad=True))
            engine.backward(loss)
            engine.step(LR)
            losses.append(loss.item())
    except RuntimeError as error:
        return str(error)
    return losses


def name_of(case: dict) -> str:
    """What tells one case from another."""
    return json.dumps(case, sort_keys=True)


def poisoned(engine: TrainEngine, value: str, micro: int, ranks: Ranks) -> dict:
    """Three steps, in the second of which one gradient of the last rank is ``value`` ("nan", "inf", "-inf")."""
    applied, states = [], []
    target = dict(engine.module.named_parameters())["encoder.blocks.2.mlp.fc1.bias"]
    bad = ranks.rank == ranks.world_size - 1
    for step in range(STEPS):
        first = ranks.rank * micro
        handle = None
        if bad and step == 1:
            handle = target.register_hook(lambda grad: grad.index_fill(0, torch.tensor([5]), float(value)))
        output = engine.forward(images()[first : first + micro], noise=noise(step, first, micro))
        engine.backward(output.loss)
        applied.append(engine.step(LR))
        if handle is not None:
            handle.remove()
        mine = [fragment.tensor.double().abs().sum() for fragment in engine.fragments()]
        total = torch.stack([*mine, torch.zeros((), dtype=torch.float64)]).sum().reshape(1)
        if ranks.world_size > 1:
            torch.distributed.all_reduce(total)
        states.append(total.item())
    return {"applied": applied, "states": states}


if __name__ == "__main__":
    torch.set_num_threads(1)
    cases = json.load(sys.stdin)
    place = join()
    states: dict[str, dict[str, torch.Tensor]] = {}
    results = {name: train(case, place, states) for name, case in cases.items()}
    if place.is_main:
        Path(sys.argv[1]).write_text(json.dumps(results))
    leave()
