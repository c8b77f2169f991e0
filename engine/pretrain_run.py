"""One pre-training run, from its configuration to its last checkpoint."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

import kernels
from dataloaders import TrainLoader, build_train_loader, load_images, prepare_demo
from engine.checkpoint import CheckpointWriter, write_whole
from engine.checkpoint_reader import CheckpointReader, find_newest_good, locate
from engine.compiling import CompileChoice, choose_compile, compile_regions
from engine.config import PretrainConfig
from engine.ds_config import read_ds_config, resolve_batch, resolve_ds_config, resolve_precision
from engine.ds_engine import DEEPSPEED_VERSION, TrainEngine
from engine.errors import LostRank, UserError
from engine.launch import Ranks, cores_per_rank, is_lost_peer, join, leave, seconds_since_process_start
from engine.models import MIRL, Execution
from engine.optimizer import build_optimizer
from engine.recipes import recipe
from engine.run_log import RunLog
from engine.schedule import Durations
from engine.trainer import Progress, Trainer
from engine.version import __version__

T = TypeVar("T")


def pretrain(config: PretrainConfig) -> Path:
    """Run ``config`` on this rank; returns the run's folder.

    Raises:
        UserError: the configuration cannot be run here; nothing was written.
        engine.errors.Diverged, engine.errors.Preempted, engine.errors.NotSaved: see `Trainer.run`.
        engine.errors.LostRank: another rank is gone.
    """
    ranks = join()
    try:
        return _pretrain(config, ranks)
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        raise LostRank(
            "another rank is gone (its own message, or its launcher's, says why); checkpoints are intact: the same "
            "command with --resume auto goes on from the last one"
        ) from error
    finally:
        leave()


def _pretrain(config: PretrainConfig, ranks: Ranks) -> Path:
    if ranks.device.type == "cpu":
        torch.set_num_threads(config.run.cpu_threads or cores_per_rank(ranks.local_world_size))
    micro_batch, accumulation = resolve_batch(config, ranks.world_size)
    raw_ds_config = read_ds_config(config.run.deepspeed_config)
    precision, precision_reason = _precision(config, raw_ds_config, ranks)
    ds_config = resolve_ds_config(
        raw_ds_config,
        config,
        micro_batch=micro_batch,
        accumulation=accumulation,
        precision=precision,
        device=ranks.device,
    )
    out = _agree_on_main(ranks, lambda: _choose_out(config))
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, out=str(out)))
    reader, remarks = _choose_start(config, ranks, out)

    loader = _build_loader(config, ranks, micro_batch=micro_batch, accumulation=accumulation)
    durations = Durations.resolve(config.optim, config.run, config.log, steps_per_epoch=loader.steps_per_epoch)
    model, progress = _build_model(config, ranks, reader, loader)
    if config.run.resume and progress.step >= durations.total_steps:
        raise UserError(
            f"{out} is finished: {progress.step} of {durations.total_steps} steps; give more --steps or --epochs to "
            "go on"
        )
    model_summary = f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f} M parameters"
    optimizer = build_optimizer(model, config.optim, ranks.device)
    engine = TrainEngine(model, optimizer, ds_config)
    if reader is not None:
        engine.load_fragments(reader.read, optimizer_steps=progress.applied_steps)

    _require_attention(engine, ranks)
    compiled = _compile(config, ranks, engine, micro_batch)
    log = RunLog(out, is_main=ranks.is_main)
    _agree_on_main(ranks, lambda: _open_out(config, out, log, durations, progress))
    for line in _opening(
        config,
        ranks,
        durations,
        loader,
        model_summary,
        micro_batch,
        accumulation,
        f"{precision} ({precision_reason})",
        engine,
        compiled,
    ):
        log.say(line)
    for remark in remarks:
        log.say(remark)
    trainer = Trainer(
        config,
        ranks=ranks,
        engine=engine,
        loader=loader,
        durations=durations,
        writer=CheckpointWriter(out / "checkpoints", ranks, keep=config.run.keep_checkpoints),
        log=log,
        progress=progress,
        micro_batch=micro_batch,
        accumulation=accumulation,
        picture_images=_picture_images(config, ranks, loader),
        out=out,
    )
    log.say(f"first step begins {seconds_since_process_start():.1f} s after the start of this process")
    try:
        trainer.run()
        for line in _closing(out):
            log.say(line)
    finally:
        log.close()
        loader.close()
    return out


# --- where the run writes and starts from


def _agree_on_main(ranks: Ranks, call: Callable[[], T]) -> T:
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


def _open_out(config: PretrainConfig, out: Path, log: RunLog, durations: Durations, progress: Progress) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "config.json", config.to_json())
    log.open(total_steps=durations.total_steps, start_step=progress.step, tensorboard=config.log.tensorboard)


def _choose_out(config: PretrainConfig) -> Path:
    """The run's folder. The recipe's own name is numbered when it is taken; a folder the user named is never written
    over.
    """
    out = Path(config.run.out)
    if config.run.resume or not _holds_a_run(out):
        return out
    if config.run.out != recipe(config.recipe).run.out:
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


def _choose_start(config: PretrainConfig, ranks: Ranks, out: Path) -> tuple[CheckpointReader | None, list[str]]:
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

    path, remarks = _agree_on_main(ranks, choose)
    return (CheckpointReader(path) if path else None), remarks


# --- what the run is made of


def _precision(config: PretrainConfig, ds_config: dict, ranks: Ranks) -> tuple[str, str]:
    if config.run.precision == "auto" and isinstance(asked := ds_config.get("bf16", {}).get("enabled", "auto"), bool):
        return ("bf16" if asked else "fp32"), f"bf16.enabled in {config.run.deepspeed_config}"
    return resolve_precision(config.run.precision, ranks.device)


def _build_loader(config: PretrainConfig, ranks: Ranks, *, micro_batch: int, accumulation: int) -> TrainLoader:
    sources = [Path(path) for path in config.data.data]
    if not sources:
        # One process cuts the photographs, the others find them cut.
        if ranks.local_rank == 0:
            prepare_demo()
        ranks.barrier()
        sources = [prepare_demo()]
    model, data = config.model, config.data
    loader = build_train_loader(
        sources,
        image_size=(model.image_height, model.image_width),
        micro_batch=micro_batch,
        accumulation=accumulation,
        rank=ranks.rank,
        world_size=ranks.world_size,
        seed=config.run.seed,
        device_id=ranks.device.index if ranks.device.type == "cuda" else None,
        threads=data.loader_threads or min(16, cores_per_rank(ranks.local_world_size)),
        scale=data.crop_scale,
        ratio=data.crop_ratio,
        flip=data.flip,
        channels=model.channels,
        mean=model.mean,
        std=model.std,
        index_dir=data.index_dir or None,
        bad_image_limit=data.max_bad_images,
        raise_on_bad_limit=False,  # the trainer lets all ranks agree to stop
    )
    if len(set(ranks.gather(loader.fingerprint))) > 1:
        seen = ", ".join(f"rank {rank} {count}" for rank, count in enumerate(ranks.gather(loader.num_images)))
        raise UserError(f"the ranks see different data sets (images: {seen}): give every host the same files")
    return loader


def _build_model(
    config: PretrainConfig, ranks: Ranks, reader: CheckpointReader | None, loader: TrainLoader
) -> tuple[MIRL, Progress]:
    """The model on its device with its first weights, and how far its run has come."""
    torch.manual_seed(config.run.seed)
    model = MIRL(config.model)
    mode = config.run.activation_checkpointing
    if mode != "none":
        model.set_activation_checkpointing(mode)
    fused = ranks.device.type == "cuda" if config.run.fused == "auto" else config.run.fused == "on"
    model.set_execution(Execution(fused_norm=fused, fused_gelu=fused, recompute=config.run.recompute_pointwise))
    progress = Progress()
    if reader is not None:
        reader.require_same_model({name: tuple(parameter.shape) for name, parameter in model.named_parameters()})
        model.load_state_dict(reader.weights(), strict=True)
        if config.run.resume:
            state = reader.state
            if state["config"]["optim"]["batch_size"] != config.optim.batch_size:
                raise UserError(
                    f"batch_size is {config.optim.batch_size} and {reader.path} was trained with "
                    f"{state['config']['optim']['batch_size']}: "
                    "keep the effective batch when resuming (--micro-batch sets the accumulation), or use --init-from"
                )
            progress = Progress(
                step=state["step"],
                applied_steps=state["applied_steps"],
                nonfinite_in_a_row=state["nonfinite_in_a_row"],
                images=state["images"],
            )
            loader.load_state_dict(state["loader"])
    return model.to(ranks.device), progress


def _compile(config: PretrainConfig, ranks: Ranks, engine: TrainEngine, micro_batch: int) -> CompileChoice:
    """Compile the regions where that is chosen and works on every rank."""
    choice = choose_compile(config.run.compile, ranks.device, engine.stage)
    if not choice.on:
        return choice
    choice = compile_regions(engine.module, micro_batch, ranks.device)
    if ranks.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(ranks.device)  # the trial step held two sets of gradients
    failures = [f"rank {rank}: {other.reason}" for rank, other in enumerate(ranks.gather(choice)) if not other.on]
    if failures and choice.on:
        engine.module.set_regions(None)
    return CompileChoice(False, failures[0]) if failures else choice


def _require_attention(engine: TrainEngine, ranks: Ranks) -> None:
    """UserError where the attention that was asked for by name does not run here."""
    try:
        engine.module.resolve_attention(ranks.device)
    except RuntimeError as error:
        raise UserError(str(error)) from error


def _picture_images(config: PretrainConfig, ranks: Ranks, loader: TrainLoader) -> torch.Tensor | None:
    """Images spread evenly over the data set, the same in every picture of the run.

    A broken one is no reason not to train: the image after it is taken. None where sixteen in a row are broken.
    """
    model = config.model
    count = min(config.log.pictures, loader.num_images)
    chosen = []
    for first in (number * loader.num_images // count for number in range(count)):
        for index in range(first, min(first + 16, loader.num_images)):
            try:
                image = load_images(
                    loader.paths([index]),
                    image_size=(model.image_height, model.image_width),
                    channels=model.channels,
                    mean=model.mean,
                    std=model.std,
                    index_dir=config.data.index_dir or None,
                )
            except ValueError:  # named, counted and reported by the loader when its turn comes
                continue
            chosen.append(image)
            break
    return torch.cat(chosen).to(ranks.device) if chosen else None


# --- what is said


def _opening(
    config: PretrainConfig, ranks: Ranks, durations: Durations, loader: TrainLoader, model_summary: str,
    micro_batch: int, accumulation: int, precision: str, engine: TrainEngine, compiled: CompileChoice,
) -> list[str]:  # fmt: skip
    model, optim = config.model, config.optim
    device = (
        torch.cuda.get_device_name(ranks.device)
        if ranks.device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads a rank"
    )
    backends = engine.module.resolve_attention(ranks.device)
    attention = "; ".join(f"{use}: {backend.name} ({backend.reason})" for use, backend in backends.items())
    return [
        f"MIRL engine {__version__}  torch {torch.__version__}  deepspeed {DEEPSPEED_VERSION}",
        f"recipe {config.recipe}, out {config.run.out} (resolved configuration in config.json)",
        f"model {model.name}: depth {model.depth}, width {model.width}, G {model.segments}, {model.variant} variant, "
        f"objective {model.objective}, "
        f"{model_summary}; image {model.image_height}x{model.image_width}x{model.channels}, patch "
        f"{model.patch_size}, mask {model.mask_ratio:g}",
        f"data {loader.num_images} images from {', '.join(config.data.data) or 'the demo photographs'}; "
        f"{loader.steps_per_epoch} steps an epoch",
        f"device {ranks.world_size} x {device}; precision {precision}; ZeRO stage {engine.stage} from "
        f"{config.run.deepspeed_config}",
        f"effective batch {optim.batch_size} = {micro_batch} x {accumulation} accumulation x {ranks.world_size} ranks; "
        f"peak learning rate {optim.peak_lr:.3e}, {optim.schedule}, warm-up {durations.warmup_steps} of "
        f"{durations.total_steps} steps",
        f"kernels {_grouped(kernels.describe_dispatch(ranks.device))}",
        f"attention {attention}",
        f"compiled regions {compiled}; fused norm and GELU "
        f"{'on' if engine.module.execution.fused_norm else 'off'}; recomputed "
        f"{'norm and GELU' if config.run.recompute_pointwise else 'nothing'}",
        f"activation checkpointing {config.run.activation_checkpointing}; checkpoint every "
        f"{durations.checkpoint_every} steps",
    ]


def _grouped(implementations: dict[str, str]) -> str:
    """``{op: implementation}`` the other way round, in one line."""
    by_implementation: dict[str, list[str]] = {}
    for op, implementation in implementations.items():
        by_implementation.setdefault(implementation, []).append(op)
    return "; ".join(f"{implementation}: {', '.join(ops)}" for implementation, ops in by_implementation.items())


def _closing(out: Path) -> list[str]:
    lines = [f"finished: {out}"]
    pictures = sorted((out / "pictures").glob("*.png"))
    if pictures:
        lines.append(f"  pictures    {pictures[-1]}")
    lines.append(f"  log         {out / 'log.txt'}, {out / 'metrics.jsonl'}")
    if (out / "tensorboard").is_dir():
        lines.append(f"  tensorboard tensorboard --logdir {out / 'tensorboard'}")
    newest = (out / "checkpoints" / "latest").read_text().strip()
    lines.append(f"  checkpoint  {out / 'checkpoints' / newest}")
    lines.append(f"reconstruct your own images: mirl visualize {os.path.join(out, 'checkpoints', newest)} IMAGE ...")
    return lines
