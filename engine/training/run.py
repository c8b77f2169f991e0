"""The order of a training run, once for every kind of run.

A kind of run is a `RunKind`: it opens its data, builds its model and its task, and says what it is. Everything else,
from the process group to the last checkpoint, stands here. docs/architecture.md shows how to add a kind.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from mirl.dataloaders import TrainLoader
from mirl.engine.accounting.run_memory import Footprint
from mirl.engine.checkpoints.files import write_whole
from mirl.engine.configuration.config import AUTO, Config
from mirl.engine.distributed.ds_engine import FragmentReader, TrainEngine
from mirl.engine.distributed.launch import Ranks, is_lost_peer, join, leave, seconds_since_process_start
from mirl.engine.errors import LostRank
from mirl.engine.models.compute_choices import ComputeChoices
from mirl.engine.training.choices.choosing import Chosen, choose_for_run
from mirl.engine.training.choices.optimizer import optimizer_places
from mirl.engine.training.choices.table import NAME as CHOICES_FILE
from mirl.engine.training.computing import compile_choice, compile_where_chosen
from mirl.engine.training.fitting import fit_to_memory
from mirl.engine.training.image_sizes import StepSizes
from mirl.engine.training.measured import compare_with_prediction
from mirl.engine.training.optimizer import build_optimizer
from mirl.engine.training.out_of_memory import explained
from mirl.engine.training.plan import RunPlan, agree_on_main, make_plan
from mirl.engine.training.run_folder import Progress, refuse_finished, restore_progress, write_config
from mirl.engine.training.run_log import RunLog
from mirl.engine.training.saving import Saver
from mirl.engine.training.schedule import Durations
from mirl.engine.training.spikes import refuse_unwatched
from mirl.engine.training.task import Task
from mirl.engine.training.telling import closing_lines, describe_computation, describe_run, describe_versions
from mirl.engine.training.tracking.facts import Facts
from mirl.engine.training.tracking.opening import open_trackers
from mirl.engine.training.trainer import Trainer
from mirl.engine.training.trial import try_micro_batch, with_smaller

C = TypeVar("C", bound=Config)
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RunParts(Generic[C]):
    """What stands ready when a task is built."""

    plan: RunPlan[C]
    loader: TrainLoader
    engine: TrainEngine
    durations: Durations
    progress: Progress
    log: RunLog


class RunKind(ABC, Generic[C]):
    """What one kind of run adds to `run_training`, in the order in which it is asked. An instance serves one run."""

    @abstractmethod
    def recipe_out(self, recipe: str) -> str:
        """The folder that ``recipe`` writes to by default."""

    def read_start(self, plan: RunPlan[C]) -> RunPlan[C]:
        """The plan with what only the checkpoint could tell that the run starts from; nothing is built yet."""
        return plan

    @abstractmethod
    def footprint(self, plan: RunPlan[C]) -> Footprint:
        """What a run of ``plan``, after `read_start`, holds in memory; asked for before anything is built."""

    @abstractmethod
    def open_data(self, plan: RunPlan[C], closing: ExitStack) -> tuple[RunPlan[C], TrainLoader]:
        """Open the training data; the plan comes back with what only the data could tell.

        Whatever has threads or processes is registered with ``closing`` as soon as it exists.
        """

    @abstractmethod
    def build_model(self, plan: RunPlan[C]) -> nn.Module:
        """The model on its device, with the weights that the run starts from."""

    def parameter_groups(self, plan: RunPlan[C], model: nn.Module) -> list[dict[str, Any]] | None:
        """AdamW's parameter groups; None for those of `build_optimizer`: weight decay on matrices alone."""
        return None

    def exact_weights(self, plan: RunPlan[C], model: nn.Module) -> FragmentReader | None:
        """A reader of the fp32 weights that a fresh run starts from; None where the rounded ones of ``model`` do."""
        return None

    @abstractmethod
    def build_task(self, parts: RunParts[C]) -> Task:
        """The task of the loop, fresh; `Task.load` follows where the run is resumed."""

    @abstractmethod
    def opening_lines(self, plan: RunPlan[C], parameters: int) -> list[str]:
        """Lines of the log that say what is trained; ``parameters`` counts those of the model."""

    def bare_model(self, plan: RunPlan[C]) -> Callable[[], ComputeChoices] | None:
        """What makes the model without the run's weights, to compute as on a GPU: for a prediction; None: no such."""
        return None

    def trial_loss(self, plan: RunPlan[C], model: Any, images: Tensor, generator: torch.Generator) -> Tensor:
        """A scalar loss of ``images``, uint8 [B, H, W, C], for which memory holds what it holds in a step of the run.

        ``generator``: of the CPU, for what is random besides. Waits for no other rank: its memory may have run out.
        """
        return model.trial_loss(images, generator)

    def closing_lines(self, out: Path) -> list[str]:
        """Lines of the log that say what to do next with run folder ``out``."""
        return []


def run_training(config: C, kind: RunKind[C]) -> Path:
    """Run ``config`` on this rank, as ``kind`` says; returns the run's folder.

    Raises:
        UserError: the configuration cannot be run here; nothing was written.
        mirl.engine.errors.Diverged, Preempted, NotSaved: see `Trainer.run`.
        mirl.engine.errors.LostRank: another rank is gone.
    """
    return on_this_rank(
        lambda ranks: with_smaller(partial(_train, config, kind, ranks), ranks), device=config.run.device
    )


def on_this_rank(body: Callable[[Ranks], T], *, device: str = "auto") -> T:
    """``body(ranks)`` in the process group of this run, on ``device``; LostRank where another rank is gone."""
    ranks = join(device)
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


def _train(config: C, kind: RunKind[C], ranks: Ranks, at_most: int | None, tried: list[str]) -> Path:
    """One attempt with a micro-batch of ``at_most`` images. ``tried``: remarks on larger ones.

    Raises:
        TooLarge: nothing was written; a smaller micro-batch is to be planned with.
    """
    fitted: RunPlan[C] | None = None
    progress = Progress()
    with ExitStack() as closing:
        closing.push(lambda _, error, frames: explained(error, fitted, kind.footprint, progress.step))
        # What is trained, on what, from where.
        plan = make_plan(config, ranks, closing, recipe_out=kind.recipe_out(config.recipe))
        plan = fitted = fit_to_memory(kind.read_start(plan), kind.footprint, at_most=at_most)
        plan, loader = kind.open_data(plan, closing)
        config, out = plan.config, plan.out
        durations = Durations.resolve(config.optim, config.run, config.log, steps_per_epoch=loader.steps_per_epoch)
        model = kind.build_model(plan)
        if plan.resumed_from is not None:
            progress = restore_progress(plan.resumed_from, loader)
            refuse_finished(out, progress.step, durations.total_steps)

        # The engine with its fp32 state, and the task.
        parameters = sum(parameter.numel() for parameter in model.parameters())
        optimizer = build_optimizer(model, config.optim, ranks.device, kind.parameter_groups(plan, model))
        weights = plan.reader.read if plan.reader is not None else kind.exact_weights(plan, model)
        engine = TrainEngine(model, optimizer, plan.ds_config, flat_gradients=config.run.flat_gradients)
        refuse_unwatched(config.run, engine)
        if weights is not None:
            engine.load_fragments(weights, optimizer_steps=progress.applied_steps)
        del weights
        log = RunLog(out, is_main=ranks.is_main)
        task = kind.build_task(
            RunParts(plan=plan, loader=loader, engine=engine, durations=durations, progress=progress, log=log)
        )
        if plan.resumed_from is not None:
            task.load(plan.resumed_from.read)

        # How it computes; then the first files are written.
        engine.module.resolve_attention(ranks.device)  # now: one asked for by name may not run here
        if config.optim.micro_batch == AUTO:
            remark = try_micro_batch(engine, plan, kind.footprint, partial(kind.trial_loss, plan, engine.module))
            plan = dataclasses.replace(plan, remarks=[*plan.remarks, *tried, remark])
        chosen = choose_for_run(
            plan, engine.module, compiled=compile_choice(plan, engine).on,
            besides=optimizer_places(engine, ranks.device),
        )  # fmt: skip
        sizes = StepSizes.of(config, durations.total_steps).sizes_from(progress.step)
        compiled = compile_where_chosen(plan, engine, sizes)
        closing.push(log.close_after)
        agree_on_main(ranks, lambda: _open_folder(plan, log, durations, progress.step, chosen))
        for line in [
            describe_versions(),
            *kind.opening_lines(plan, parameters),
            *describe_run(plan, durations, loader, engine),
            *engine.remarks,
            *plan.remarks,
            describe_computation(plan, engine.module, compiled),
            *chosen.lines,
        ]:
            log.say(line)
        saver = Saver(
            config, ranks=ranks, engine=engine, task=task, loader=loader, log=log, progress=progress,
            folder=out / "checkpoints", resumed_from=plan.resumed_from.path if plan.resumed_from is not None else None,
        )  # fmt: skip
        trainer = Trainer(
            config, ranks=ranks, engine=engine, task=task, loader=loader, durations=durations, saver=saver, log=log,
            lock=plan.lock, progress=progress, micro_batch=plan.micro_batch, accumulation=plan.accumulation,
        )  # fmt: skip
        log.say(f"first step begins {seconds_since_process_start():.1f} s after the start of this process")
        trainer.run()
        compared = compare_with_prediction(
            plan, kind.bare_model(plan), trainer.step_log.measured, log, progress.step,
            one_pass=engine.steps_in_one_pass,
        )  # fmt: skip
        for line in [*closing_lines(out), *compared, *kind.closing_lines(out)]:
            log.say(line)
    return out


def _open_folder(plan: RunPlan[Any], log: RunLog, durations: Durations, start_step: int, chosen: Chosen) -> None:
    """Make the run's folder, write its configuration and choices, and open its log; on rank 0."""
    plan.out.mkdir(parents=True, exist_ok=True)
    write_config(plan.config, plan.out, start_step)
    write_whole(plan.out / CHOICES_FILE, chosen.table.to_json())
    facts = Facts(out=plan.out, config=plan.config.to_dict(), start_step=start_step)
    log.open(
        total_steps=durations.total_steps, start_step=start_step, tensorboard=plan.config.log.tensorboard,
        trackers=open_trackers(plan.config.log.track, facts) if plan.config.log.track else None,
    )  # fmt: skip
