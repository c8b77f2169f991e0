"""The lines with which a run opens and closes, alike for every kind of run."""

from __future__ import annotations

import datetime
import shlex
from pathlib import Path
from typing import Any

import torch

from mirl import kernels
from mirl.dataloaders import TrainLoader
from mirl.dataloaders.sources.paths import shown
from mirl.engine.checkpoints.best import read_best
from mirl.engine.distributed.ds_engine import DEEPSPEED_VERSION, TrainEngine
from mirl.engine.distributed.launch import seconds_since_process_start
from mirl.engine.training.compiling import CompileChoice
from mirl.engine.training.plan import RunPlan
from mirl.engine.training.schedule import Durations
from mirl.engine.version import __version__


def describe_versions() -> str:
    """The engine and the two libraries that decide what is computed."""
    return f"MIRL engine {__version__}  torch {torch.__version__}  deepspeed {DEEPSPEED_VERSION}"


def describe_run(plan: RunPlan[Any], durations: Durations, loader: TrainLoader, engine: TrainEngine) -> list[str]:
    """Describe data, device, precision, batch, schedule, kernels and attention of any run, a line each."""
    config, ranks, optim = plan.config, plan.ranks, plan.config.optim
    threads = f"CPU, {torch.get_num_threads()} threads a rank"
    device = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else threads
    backends = engine.module.resolve_attention(ranks.device)
    attention = "; ".join(f"{use}: {backend.name} ({backend.reason})" for use, backend in backends.items())
    return [
        f"data {loader.ledger}: {', '.join(map(shown, config.data.data)) or 'the demo photographs'}; "
        f"{loader.steps_per_epoch} steps an epoch",
        f"device {ranks.world_size} x {device}; precision {plan.precision} ({plan.precision_reason}); "
        f"ZeRO stage {engine.stage} from {config.run.deepspeed_config}",
        f"effective batch {optim.batch_size} = {plan.micro_batch} x {plan.accumulation} accumulation x "
        f"{ranks.world_size} ranks; {optim.optimizer}, peak learning rate {optim.peak_lr:.3e}, {optim.schedule}, "
        f"warm-up {durations.warmup_steps} of {durations.total_steps} steps",
        f"kernels {_by_implementation(kernels.describe_dispatch(ranks.device))}",
        f"attention {attention}",
        f"activation checkpointing {config.run.activation_checkpointing}; checkpoint every "
        f"{durations.checkpoint_every} steps",
    ]


def _by_implementation(implementations: dict[str, str]) -> str:
    """``{op: implementation}`` the other way round, in one line."""
    ops_of: dict[str, list[str]] = {}
    for op, implementation in implementations.items():
        ops_of.setdefault(implementation, []).append(op)
    return "; ".join(f"{implementation}: {', '.join(ops)}" for implementation, ops in ops_of.items())


def describe_computation(plan: RunPlan[Any], model: Any, compiled: CompileChoice) -> str:
    """Say what is compiled, fused and recomputed."""
    return (
        f"compiled regions {compiled}; fused norm and GELU {'on' if model.execution.fused_norm else 'off'}; recomputed "
        f"{'norm and GELU' if plan.config.run.recompute_pointwise else 'nothing'}"
    )


def closing_lines(out: Path) -> list[str]:
    """Say where to find what the run wrote."""
    lines = [f"finished: {out}"]
    lines.append(
        f"  time        {datetime.timedelta(seconds=round(seconds_since_process_start()))} since this process began"
    )
    pictures = sorted((out / "pictures").glob("*.png"))
    if pictures:
        lines.append(f"  pictures    {pictures[-1]}")
    lines.append(f"  log         {out / 'log.txt'}, {out / 'metrics.jsonl'}")
    if (out / "tensorboard").is_dir():
        lines.append(f"  tensorboard tensorboard --logdir {shlex.quote(str(out / 'tensorboard'))}")
    lines.append(f"  checkpoint  {newest_checkpoint(out)}")
    if best := read_best(out / "checkpoints"):
        lines.append(f"  best        {out / 'checkpoints' / best.checkpoint}: {best}")
    return lines


def newest_checkpoint(out: Path) -> Path:
    """The checkpoint that the pointer of run folder ``out`` names."""
    return out / "checkpoints" / (out / "checkpoints" / "latest").read_text().strip()
