"""How the model of a run computes: fused kernels, recomputation, attention backends, compiled regions."""

from __future__ import annotations

from typing import Any

import torch

from mirl.engine.configuration.config import RunConfig
from mirl.engine.distributed.ds_engine import TrainEngine
from mirl.engine.models import Execution
from mirl.engine.training.compiling import CompileChoice, choose_compile, compile_regions
from mirl.engine.training.plan import RunPlan


def set_computation(model: Any, run: RunConfig, device: torch.device) -> None:
    """Set activation checkpointing and execution of ``model`` (`ComputeChoices`) as ``run`` asks for on ``device``."""
    if run.activation_checkpointing != "none":
        model.set_activation_checkpointing(run.activation_checkpointing)
    fused = device.type == "cuda" if run.fused == "auto" else run.fused == "on"
    model.set_execution(Execution(fused_norm=fused, fused_gelu=fused, recompute=run.recompute_pointwise))


def compile_where_chosen(plan: RunPlan[Any], engine: TrainEngine) -> CompileChoice:
    """Compile the regions of the model where that is chosen and works on every rank."""
    ranks = plan.ranks
    choice = choose_compile(plan.config.run.compile, ranks.device, engine.stage)
    if not choice.on:
        return choice
    choice = compile_regions(engine.module, plan.micro_batch, ranks.device)
    if ranks.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(ranks.device)  # the trial step held two sets of gradients
    failures = [f"rank {rank}: {other.reason}" for rank, other in enumerate(ranks.gather(choice)) if not other.on]
    if failures and choice.on:
        engine.module.set_regions(None)
    return CompileChoice(False, failures[0]) if failures else choice
