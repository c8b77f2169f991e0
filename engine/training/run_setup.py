"""What every kind of run settles before its loop, on all ranks alike, and what it says of it: where it writes and
starts from, batch, precision, compiled regions.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from mirl import kernels
from mirl.dataloaders import TrainLoader
from mirl.engine.checkpoints.reader import CheckpointReader, find_newest_good, locate
from mirl.engine.checkpoints.writer import write_whole
from mirl.engine.configuration.config import Config
from mirl.engine.distributed.ds_config import read_ds_config, resolve_batch, resolve_ds_config, resolve_precision
from mirl.engine.distributed.ds_engine import TrainEngine
from mirl.engine.distributed.launch import Ranks, cores_per_rank, is_lost_peer, join, leave
from mirl.engine.errors import LostRank, UserError
from mirl.engine.training.compiling import CompileChoice, choose_compile, compile_regions
from mirl.engine.training.run_log import RunLog
from mirl.engine.training.schedule import Durations
from mirl.engine.training.trainer import Progress

T = TypeVar("T")


def on_this_rank(body: Callable[[Ranks], T]) -> T:
    """``body(ranks)`` in the process group of this run; LostRank where another rank is gone."""
    ranks = join()
    try:
        return body(ranks)
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        raise LostRank(
            "another rank is gone (its own message, or its launcher's, says why); checkpoints are intact: the same "
            "command with --resume auto goes on from the last one"
        ) from error
    finally:
        leave()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is settled before anything is built. ``reader``: the checkpoint that the weights come from, None for fresh
    ones; ``remarks`` say which one and why.
    """

    config: Config
    ranks: Ranks
    out: Path
    micro_batch: int
    accumulation: int
    ds_config: dict[str, Any]
    precision: str
    precision_reason: str
    reader: CheckpointReader | None
    remarks: list[str]


def make_plan(config: Config, ranks: Ranks, *, recipe_out: str) -> Plan:
    """Settle ``config`` on this machine; ``recipe_out`` is the folder that its recipe writes to by default.

    Raises:
        UserError: the configuration cannot be run here; nothing was written.
    """
    if ranks.device.type == "cpu":
        torch.set_num_threads(config.run.cpu_threads or cores_per_rank(ranks.local_world_size))
    micro_batch, accumulation = resolve_batch(config, ranks.world_size)
    raw = read_ds_config(config.run.deepspeed_config)
    precision, reason = _precision(config, raw, ranks)
    ds_config = resolve_ds_config(
        raw, config, micro_batch=micro_batch, accumulation=accumulation, precision=precision, device=ranks.device
    )
    out = agree_on_main(ranks, lambda: choose_out(config, recipe_out))
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, out=str(out)))
    reader, remarks = choose_start(config, ranks, out)
    return Plan(
        config=config, ranks=ranks, out=out, micro_batch=micro_batch, accumulation=accumulation, ds_config=ds_config,
        precision=precision, precision_reason=reason, reader=reader, remarks=remarks,
    )  # fmt: skip


def agree_on_main(ranks: Ranks, call: Callable[[], T]) -> T:
    """``call()`` of rank 0, on every rank; what the user has to mend is raised on every rank too."""
    result, problem = None, None
    if ranks.is_main:
        try:
            result = call()
        except (UserError, OSError) as error:
            problem = str(error)
    result, problem = ranks.broadcast((result, problem))
    if problem:
        raise UserError(problem)
    return result


def open_out(plan: Plan, log: RunLog, durations: Durations, start_step: int) -> None:
    """Make the run's folder on rank 0 and open its log; UserError on every rank where that fails."""

    def call() -> None:
        plan.out.mkdir(parents=True, exist_ok=True)
        write_whole(plan.out / "config.json", plan.config.to_json())
        log.open(total_steps=durations.total_steps, start_step=start_step, tensorboard=plan.config.log.tensorboard)

    agree_on_main(plan.ranks, call)


def choose_out(config: Config, recipe_out: str) -> Path:
    """The run's folder. The recipe's own name is numbered when it is taken; a folder the user named is never written
    over.
    """
    out = Path(config.run.out)
    if config.run.resume or not _holds_a_run(out):
        return out
    if config.run.out != recipe_out:
        raise UserError(
            f"out is {out}, which holds a run already: go on with it by --resume auto, or give another --out"
        )
    taken = [
        int(match[1])
        for path in out.parent.glob(f"{out.name}-*")
        if (match := re.fullmatch(rf"{re.escape(out.name)}-(\d+)", path.name))
    ]
    return out.with_name(f"{out.name}-{max(taken, default=1) + 1}")


def _holds_a_run(out: Path) -> bool:
    return (out / "config.json").exists() or (out / "checkpoints").exists()


def choose_start(config: Config, ranks: Ranks, out: Path) -> tuple[CheckpointReader | None, list[str]]:
    """``(reader, remarks)``: the checkpoint whose weights the run starts from, None for fresh ones."""

    def choose() -> tuple[Path | None, list[str]]:
        if config.run.resume == "auto":
            found, remarks = find_newest_good(out / "checkpoints")
            if found is None and remarks:
                raise UserError(
                    f"no checkpoint in {out / 'checkpoints'} is whole: {'; '.join(remarks)}; move it away to "
                    "start afresh"
                )
            if found is None:
                return None, [f"FRESH START: --resume auto found no checkpoint in {out / 'checkpoints'}"]
            return found, [*remarks, f"resumed from {found}"]
        if config.run.resume:
            found = locate(Path(config.run.resume))
            return found, [f"resumed from {found}"]
        if config.run.init_from:
            found = locate(Path(config.run.init_from))
            return found, [f"weights from {found}, everything else fresh"]
        return None, []

    path, remarks = agree_on_main(ranks, choose)
    return (CheckpointReader(path) if path else None), remarks


# --- how far it has come


def first_progress(plan: Plan, loader: TrainLoader) -> Progress:
    """Where the run starts, the loader set to it; UserError for a checkpoint of another effective batch."""
    if plan.reader is None or not plan.config.run.resume:
        return Progress()
    state, batch_size = plan.reader.state, plan.config.optim.batch_size
    if "optim" not in state["config"]:
        raise UserError(
            f"{plan.reader.path} was imported: it holds weights alone, and no run to resume; start one by --init-from"
        )
    if state["config"]["optim"]["batch_size"] != batch_size:
        raise UserError(
            f"batch_size is {batch_size} and {plan.reader.path} was trained with "
            f"{state['config']['optim']['batch_size']}: "
            "keep the effective batch when resuming (--micro-batch sets the accumulation), or use --init-from"
        )
    loader.load_state_dict(state["loader"])
    return Progress(
        step=state["step"],
        applied_steps=state["applied_steps"],
        nonfinite_in_a_row=state["nonfinite_in_a_row"],
        images=state["images"],
    )


def refuse_finished(plan: Plan, progress: Progress, durations: Durations) -> None:
    """UserError where a resumed run has nothing left to do."""
    if plan.config.run.resume and progress.step >= durations.total_steps:
        raise UserError(
            f"{plan.out} is finished: {progress.step} of {durations.total_steps} steps; give more --steps or --epochs "
            "to go on"
        )


# --- how it computes


def _precision(config: Config, ds_config: dict, ranks: Ranks) -> tuple[str, str]:
    if config.run.precision == "auto" and isinstance(asked := ds_config.get("bf16", {}).get("enabled", "auto"), bool):
        return ("bf16" if asked else "fp32"), f"bf16.enabled in {config.run.deepspeed_config}"
    return resolve_precision(config.run.precision, ranks.device)


def compile_where_chosen(plan: Plan, engine: TrainEngine) -> CompileChoice:
    """Compile the regions where that is chosen and works on every rank."""
    ranks, micro_batch = plan.ranks, plan.micro_batch
    choice = choose_compile(plan.config.run.compile, ranks.device, engine.stage)
    if not choice.on:
        return choice
    choice = compile_regions(engine.module, micro_batch, ranks.device)
    if ranks.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(ranks.device)  # the trial step held two sets of gradients
    failures = [f"rank {rank}: {other.reason}" for rank, other in enumerate(ranks.gather(choice)) if not other.on]
    if failures and choice.on:
        engine.module.set_regions(None)
    return CompileChoice(False, failures[0]) if failures else choice


def require_attention(engine: TrainEngine, ranks: Ranks) -> None:
    """UserError where the attention that was asked for by name does not run here."""
    try:
        engine.module.resolve_attention(ranks.device)
    except RuntimeError as error:
        raise UserError(str(error)) from error


# --- what is said


def describe_run(plan: Plan, durations: Durations, loader: TrainLoader, engine: TrainEngine) -> list[str]:
    """Device, precision, batch and schedule, data, kernels and attention of any run."""
    config, ranks, optim = plan.config, plan.ranks, plan.config.optim
    threads = f"CPU, {torch.get_num_threads()} threads a rank"
    device = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else threads
    backends = engine.module.resolve_attention(ranks.device)
    attention = "; ".join(f"{use}: {backend.name} ({backend.reason})" for use, backend in backends.items())
    return [
        f"data {loader.num_images} images from {', '.join(config.data.data) or 'the demo photographs'}; "
        f"{loader.steps_per_epoch} steps an epoch",
        f"device {ranks.world_size} x {device}; precision {plan.precision} ({plan.precision_reason}); "
        f"ZeRO stage {engine.stage} from {config.run.deepspeed_config}",
        f"effective batch {optim.batch_size} = {plan.micro_batch} x {plan.accumulation} accumulation x "
        f"{ranks.world_size} ranks; "
        f"peak learning rate {optim.peak_lr:.3e}, {optim.schedule}, warm-up {durations.warmup_steps} of "
        f"{durations.total_steps} steps",
        f"kernels {_grouped(kernels.describe_dispatch(ranks.device))}",
        f"attention {attention}",
        f"activation checkpointing {config.run.activation_checkpointing}; checkpoint every "
        f"{durations.checkpoint_every} steps",
    ]


def _grouped(implementations: dict[str, str]) -> str:
    """``{op: implementation}`` the other way round, in one line."""
    by_implementation: dict[str, list[str]] = {}
    for op, implementation in implementations.items():
        by_implementation.setdefault(implementation, []).append(op)
    return "; ".join(f"{implementation}: {', '.join(ops)}" for implementation, ops in by_implementation.items())


def closing_lines(out: Path) -> list[str]:
    """Where to find what the run wrote."""
    lines = [f"finished: {out}"]
    pictures = sorted((out / "pictures").glob("*.png"))
    if pictures:
        lines.append(f"  pictures    {pictures[-1]}")
    lines.append(f"  log         {out / 'log.txt'}, {out / 'metrics.jsonl'}")
    if (out / "tensorboard").is_dir():
        lines.append(f"  tensorboard tensorboard --logdir {out / 'tensorboard'}")
    newest = (out / "checkpoints" / "latest").read_text().strip()
    lines.append(f"  checkpoint  {out / 'checkpoints' / newest}")
    return lines
