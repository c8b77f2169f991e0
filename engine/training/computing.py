"""How the model of a run computes: fused kernels, recomputation, attention backends, compiled regions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from mirl.engine.configuration.config import RunConfig
from mirl.engine.models import MIRL, Execution, ModelConfig
from mirl.engine.training.compiling import CompileChoice, choose_compile, compile_regions, search_regions

if TYPE_CHECKING:
    # A prediction asks for a model without a run, and without the seconds that DeepSpeed takes to import.
    from mirl.engine.distributed.ds_engine import TrainEngine
    from mirl.engine.training.plan import RunPlan


def set_computation(model: Any, run: RunConfig, device: torch.device) -> None:
    """Set activation checkpointing and execution of ``model`` (`ComputeChoices`) as ``run`` asks for on ``device``."""
    if run.activation_checkpointing != "none":
        model.set_activation_checkpointing(run.activation_checkpointing)
    fused = device.type == "cuda" if run.fused == "auto" else run.fused == "on"
    model.set_execution(
        Execution(fused_norm=fused, fused_gelu=fused, bias_in_norm=fused, recompute=run.recompute_pointwise)
    )


def bare_model(config: ModelConfig, run: RunConfig) -> MIRL:
    """The model of ``config``, to compute as ``run`` asks for on a GPU, without the VGG-16 of its perceptual loss.

    For a step on fake tensors (`mirl.engine.accounting.fake_step`): it has no device of its own.
    """
    model = MIRL(replace(config, vgg_loss=0.0))
    set_computation(model, run, torch.device("cuda"))
    return model


def compile_choice(plan: RunPlan[Any], engine: TrainEngine) -> CompileChoice:
    """Whether `compile_where_chosen` will try."""
    return choose_compile(plan.config.run.compile, plan.ranks.device, engine.stage)


def compile_where_chosen(
    plan: RunPlan[Any], engine: TrainEngine, sizes: Sequence[tuple[int, int]] = ()
) -> CompileChoice:  # fmt: skip
    """Compile the regions of the model where that is chosen and works on every rank; ``sizes``: of the images, see
    `compile_regions`.
    """
    ranks = plan.ranks
    choice = compile_choice(plan, engine)
    if not choice.on:
        return choice
    if choice.search:
        choice = search_regions(engine.module, plan.micro_batch, ranks, sizes=sizes)
    else:
        choice = compile_regions(engine.module, plan.micro_batch, ranks.device, sizes=sizes)
    if ranks.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(ranks.device)  # the trial step held two sets of gradients
    failures = [f"rank {rank}: {other.reason}" for rank, other in enumerate(ranks.gather(choice)) if not other.on]
    if failures and choice.on:
        engine.module.set_regions(None)
    return CompileChoice(False, failures[0]) if failures else choice
