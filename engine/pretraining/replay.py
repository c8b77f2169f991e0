"""One step of a pre-training run computed again on one process, with every block looked at. The run is not written to.

The images, crops, masks and their order are functions of (seed, step), so that a checkpoint before the step is all
that is needed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mirl.engine.checkpoints.files import list_checkpoints
from mirl.engine.checkpoints.finding import read_state, verify
from mirl.engine.checkpoints.kinds import PRETRAINED, kind_of
from mirl.engine.configuration.config import PretrainConfig
from mirl.engine.distributed.ds_engine import TrainEngine
from mirl.engine.distributed.launch import Ranks
from mirl.engine.pretraining.run import Pretraining
from mirl.engine.training.fitting import fit_to_memory
from mirl.engine.training.optimizer import build_optimizer
from mirl.engine.training.plan import make_plan
from mirl.engine.training.run import RunParts, on_this_rank
from mirl.engine.training.run_folder import restore_progress
from mirl.engine.training.run_log import RunLog
from mirl.engine.training.schedule import Durations
from mirl.engine.training.task import Place
from mirl.engine.training.window import Window
from mirl.errors import UserError


def checkpoint_before(run: Path, step: int) -> Path:
    """The newest checkpoint of ``run`` that verifies and holds the state after fewer than ``step`` steps.

    Raises:
        UserError: ``run`` is no run, ``step`` is not positive, or no such checkpoint is whole.
    """
    if step < 1:
        raise UserError(f"step is {step}: give 1 or more, as the log numbers them")
    if not (run / "config.json").is_file() or not (run / "checkpoints").is_dir():
        raise UserError(f"run is {run}, which holds no run: give the folder of a pre-training run")
    before = [path for path in list_checkpoints(run / "checkpoints") if int(path.name.split("-")[-1]) < step]
    for path in before[::-1]:
        if verify(path) is None:
            if kind_of(read_state(path)) != PRETRAINED:
                raise UserError(f"run is {run}, which is no pre-training run: give the folder of one")
            return path
    raise UserError(f"step is {step} and no whole checkpoint of {run} is from before it: give a later step")


def config_at(run: Path, step: int) -> PretrainConfig:
    """The configuration that ``run`` had in ``step``; a run that was resumed with another one has a history."""
    try:
        values = json.loads((run / "config.json").read_text())
        history = run / "config-history.jsonl"
        for line in history.read_text().splitlines()[::-1] if history.exists() else []:
            if (entry := json.loads(line))["step"] >= step:
                values = entry["config"]
    except (OSError, ValueError) as error:
        raise UserError(f"the configuration of {run} cannot be read: {error}") from error
    return PretrainConfig.from_dict(values, source=str(run / "config.json"))


class Watch:
    """What the blocks of a model give, and the gradients of their weights, while it is `on`."""

    def __init__(self, model: nn.Module) -> None:
        self.on = False
        self.order: list[str] = []
        self._peaks: dict[str, Tensor] = {}
        self._gradients: dict[str, Tensor] = {}
        self._blocks: list[str] = []
        for name, block in _blocks(model):
            self._blocks.append(name)
            if name.startswith("encoder."):  # the encoder calls `branches`, which no hook of a module sees
                self._wrap(name, block)
            else:
                block.register_forward_hook(lambda _, __, output, name=name: self._look(name, output))
        for name, parameter in model.named_parameters():
            parameter.register_hook(lambda gradient, name=name: self._add(name, gradient))

    def _wrap(self, name: str, block: Any) -> None:
        inner = block.branches

        def branches(*arguments: Any) -> Any:
            output = inner(*arguments)
            self._look(name, output)
            return output

        block.branches = branches

    def _look(self, name: str, output: Any) -> None:
        if not self.on or not torch.is_grad_enabled():
            return
        parts = (output,) if isinstance(output, Tensor) else output
        peaks = [part.detach().abs().amax().float() for part in parts if isinstance(part, Tensor)]
        peak = torch.stack(peaks).amax()
        # Of NaN and a number amax gives NaN, and so does maximum.
        self._peaks[name] = torch.maximum(self._peaks[name], peak) if name in self._peaks else peak

    def _add(self, name: str, gradient: Tensor) -> None:
        if self.on:
            own = gradient.detach().float()
            self._gradients[name] = self._gradients[name] + own if name in self._gradients else own.clone()

    def rows(self) -> list[dict[str, Any]]:
        """A row for each block in the order of the forward pass, then one for all other weights ("rest")."""
        norms: dict[str, list[Tensor]] = {name: [] for name in [*self._blocks, "rest"]}
        for name, gradient in self._gradients.items():
            owner = next((block for block in self._blocks if name.startswith(block + ".")), "rest")
            norms[owner].append(gradient.double().norm())
        rows = []
        for name, parts in norms.items():
            peak = self._peaks[name].item() if name in self._peaks else None
            norm = torch.stack(parts).norm().item() if parts else 0.0
            rows.append(
                {"block": name, "largest_activation": peak, "activation_finite": peak is None or math.isfinite(peak),
                 "gradient_norm": norm, "gradient_finite": math.isfinite(norm)}
            )  # fmt: skip
        return rows


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Those of the encoder and of the decoders by name: "encoder.blocks.0", "decoders.1.blocks.0"."""
    for name, module in model.named_modules():
        parts = name.split(".")
        if parts[0] in ("encoder", "decoders") and parts[-2:-1] == ["blocks"]:
            yield name, module


def replay(run: Path, step: int, *, device: str = "auto") -> dict[str, Any]:
    """Compute ``step`` of ``run`` again; returns what `mirl replay --json` writes.

    Raises:
        UserError: there is no such step to compute, or the data or the machine are not what it takes.
    """
    checkpoint = checkpoint_before(run, step)
    config = config_at(run, step)
    with tempfile.TemporaryDirectory(prefix="mirl-replay-") as folder:
        config = dataclasses.replace(
            config,
            run=dataclasses.replace(
                config.run, out=folder, resume=str(checkpoint), init_from="", compile="off", device=device
            ),
            log=dataclasses.replace(config.log, pictures=0, val=(), probe=(), tensorboard=False, track=(), profile=0),
        )
        return on_this_rank(lambda ranks: _replay(config, run, step, checkpoint, ranks), device=device)


def _replay(config: PretrainConfig, run: Path, step: int, checkpoint: Path, ranks: Ranks) -> dict[str, Any]:
    kind = Pretraining()
    with ExitStack() as closing:
        plan = make_plan(config, ranks, closing, recipe_out=kind.recipe_out(config.recipe))
        plan = fit_to_memory(kind.read_start(plan), kind.footprint)
        plan, loader = kind.open_data(plan, closing)
        config = plan.config
        durations = Durations.resolve(config.optim, config.run, config.log, steps_per_epoch=loader.steps_per_epoch)
        if step > durations.total_steps:
            raise UserError(f"step is {step} and {run} has {durations.total_steps} steps: give one of these")
        model = kind.build_model(plan)
        watch = Watch(model)
        assert plan.reader is not None
        progress = restore_progress(plan.reader, loader)
        optimizer = build_optimizer(model, config.optim, ranks.device, kind.parameter_groups(plan, model))
        engine = TrainEngine(model, optimizer, plan.ds_config, flat_gradients=config.run.flat_gradients)
        engine.load_fragments(plan.reader.read, optimizer_steps=progress.applied_steps)
        log = RunLog(plan.out, is_main=ranks.is_main)
        task = kind.build_task(
            RunParts(plan=plan, loader=loader, engine=engine, durations=durations, progress=progress, log=log)
        )
        task.load(plan.reader.read)
        engine.module.resolve_attention(ranks.device)
        schedule, left_out = durations.schedule(config.optim), steps_not_taken(run)
        while True:
            watch.on = progress.step + 1 == step
            lr, window, files, applied = schedule.lr(progress.applied_steps), Window(wait_started=0.0), [], None
            for part in range(plan.accumulation):
                batch = loader.next_micro_batch()
                if progress.step + 1 in left_out and not watch.on:
                    continue
                place = Place(step=progress.step, first=part * plan.micro_batch)
                loss, terms = task.forward(batch, place)
                engine.backward(loss)
                applied = engine.step(lr)
                window.add(loss, terms, plan.micro_batch)
                if watch.on:
                    files += loader.paths(batch.sample_ids)
            progress.step += 1
            if watch.on:
                break
            task.after_step(bool(applied))
            progress.applied_steps += bool(applied)
        found = window.reduce(ranks, task.term_names, 0)
        rows = watch.rows()
        logged = _logged_loss(run, step) if durations.log_every == 1 else None
        return {
            "run": str(run), "step": step, "checkpoint": str(checkpoint), "loss": found["loss"],
            "terms": {key.removeprefix("loss_"): value for key, value in found.items() if key.startswith("loss_")},
            "logged_loss": logged,
            "difference": None if logged is None else found["loss"] - logged,
            "gradient_norm": engine.gradient_norm(), "lr": lr, "applied": bool(applied),
            "first_nonfinite_activation": next((row["block"] for row in rows if not row["activation_finite"]), None),
            "first_nonfinite_gradient": next((row["block"] for row in rows if not row["gradient_finite"]), None),
            "blocks": rows, "files": files,
        }  # fmt: skip


def steps_not_taken(run: Path) -> set[int]:
    """Steps that the run skipped for their loss or gradient norm, or left out when it went back to a checkpoint."""
    found: set[int] = set()
    for record in _records(run):
        if record.get("event") == "spike" and record.get("skipped"):
            found.add(record["step"])
        elif record.get("event") == "rollback":
            found.update(record["left_out"])
    return found


def _records(run: Path) -> Iterator[dict[str, Any]]:
    """Lines of metrics.jsonl; one that a crash cut off is passed over."""
    path = run / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(ValueError):
            yield json.loads(line)


def _logged_loss(run: Path, step: int) -> float | None:
    """Of metrics.jsonl; a run that was resumed may have the step twice, and the last is of the weights that stayed."""
    found = None
    for record in _records(run):
        if record.get("step") == step and "loss" in record:
            found = record["loss"]
    return found
