"""What a run settles before anything is built, on all ranks alike: batch, precision, folder, starting checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from mirl.engine.accounting.run_memory import DECODED_BYTES
from mirl.engine.checkpoints.reader import CheckpointReader
from mirl.engine.configuration.config import AUTO, Config
from mirl.engine.distributed.ds_config import read_ds_config, resolve_batch, resolve_ds_config, resolve_precision
from mirl.engine.distributed.launch import Ranks, cores_per_rank
from mirl.engine.training.resumed_settings import compare_settings, keep_settled, require_known_changes
from mirl.engine.training.run_folder import choose_out, choose_start, hold_folder
from mirl.engine.training.run_lock import RunLock
from mirl.engine.training.tracking.asked import require_installed
from mirl.errors import UserError

T = TypeVar("T")
BATCH_KEYS = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")  # of DeepSpeed's configuration
C = TypeVar("C", bound=Config)


@dataclass(frozen=True, kw_only=True)
class RunPlan(Generic[C]):
    """The settled configuration of a run and what follows from it on this machine.

    reader: the checkpoint that the weights come from, None where they are fresh.
    micro_batch_given: the micro-batch was asked for, by a flag or in DeepSpeed's file, and is not ours to choose.
    lock: of the run's folder; rank 0 holds it.
    remarks: lines for the log that say which checkpoint was taken and why.
    decoded_bytes: of an image of the data as it is stored, for the estimate of memory.
    """

    config: C
    ranks: Ranks
    out: Path
    micro_batch: int
    accumulation: int
    micro_batch_given: bool
    ds_config: dict[str, Any]
    precision: str
    precision_reason: str
    reader: CheckpointReader | None
    lock: RunLock
    remarks: list[str]
    decoded_bytes: float = DECODED_BYTES

    @property
    def resumed_from(self) -> CheckpointReader | None:
        """The checkpoint that the run goes on with; None for a new run, also where it starts from other weights."""
        return self.reader if self.config.run.resume else None

    def with_config(self, config: C) -> RunPlan[C]:
        """The same plan for ``config``, which became fuller as checkpoints and data were read."""
        return dataclasses.replace(self, config=config)


def make_plan(config: C, ranks: Ranks, closing: ExitStack, *, recipe_out: str) -> RunPlan[C]:
    """Settle ``config`` on this machine; ``recipe_out`` is the folder that its recipe writes to by default.

    The run's folder is this run's alone until ``closing`` is left.

    Raises:
        UserError: the configuration cannot be run here; nothing was written.
    """
    if ranks.device.type == "cpu":
        torch.set_num_threads(config.run.cpu_threads or cores_per_rank(ranks.local_world_size))
    micro_batch, accumulation = resolve_batch(config, ranks.world_size)
    raw = read_ds_config(config.run.deepspeed_config)
    of_file = any(raw.get(key, "auto") != "auto" for key in BATCH_KEYS)
    if of_file and config.optim.micro_batch == AUTO:
        raise UserError(
            f"micro_batch is 'auto' and {config.run.deepspeed_config} sets {' or '.join(BATCH_KEYS)}: leave both out "
            "there, or give a number"
        )
    precision, reason = _precision(config, raw, ranks)
    ds_config = resolve_ds_config(
        raw, config, micro_batch=micro_batch, accumulation=accumulation, precision=precision, device=ranks.device
    )
    out = agree_on_main(ranks, lambda: choose_out(config, recipe_out))
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, out=str(out)))
    require_known_changes(config)
    agree_on_main(ranks, lambda: require_installed(config.log.track))
    lock = RunLock(out)
    closing.callback(lock.release)
    taken_over = agree_on_main(ranks, lambda: hold_folder(lock, out))
    path, remarks = agree_on_main(ranks, lambda: choose_start(config, out))
    reader = CheckpointReader(path) if path else None
    if reader is not None and config.run.resume:
        config = keep_settled(config, reader)
        remarks = [*remarks, *compare_settings(config, reader)]
    return RunPlan(
        config=config, ranks=ranks, out=out, micro_batch=micro_batch, accumulation=accumulation,
        micro_batch_given=bool(config.optim.given_micro_batch) or of_file, ds_config=ds_config,
        precision=precision, precision_reason=reason, reader=reader, lock=lock,
        remarks=[*taken_over, *remarks],
    )  # fmt: skip


def agree_on_main(ranks: Ranks, call: Callable[[], T]) -> T:
    """Call ``call`` on rank 0 and return its result on every rank.

    Raises:
        UserError: ``call`` raised UserError or OSError on rank 0; raised on every rank.
    """
    result, problem = None, None
    if ranks.is_main:
        try:
            result = call()
        except (UserError, OSError) as error:
            problem = str(error)
    result, problem = ranks.broadcast((result, problem))
    if problem:
        error = UserError(problem)
        error.of_all_ranks = True
        raise error
    return result


def _precision(config: Config, ds_config: dict[str, Any], ranks: Ranks) -> tuple[str, str]:
    """``(precision, reason)``; a DeepSpeed file that says true or false decides where the run says auto."""
    if config.run.precision == "auto" and isinstance(asked := ds_config.get("bf16", {}).get("enabled", "auto"), bool):
        return ("bf16" if asked else "fp32"), f"bf16.enabled in {config.run.deepspeed_config}"
    return resolve_precision(config.run.precision, ranks.device)
