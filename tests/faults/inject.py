"""Faults that a rank meets at an exact point of its own work. Python reports files that are opened, renamed and removed
to audit hooks before it happens, and the hook ends the process then; where no hook reaches, a function is wrapped.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import resource
import signal
import stat
import sys
import threading
import time
from pathlib import Path

import torch

from mirl.dataloaders import Batch, TrainLoader
from mirl.dataloaders.sources import patience
from mirl.engine.checkpoints import writer as checkpoint
from mirl.engine.training import run_data, saving
from mirl.errors import UserError

# Phase of a save -> (rank that is killed, audit event, part of its first argument); no event: `kill_in_write`
PHASES = {
    "the shard is being written": (0, None, None),
    "the shard is written, not synced": (1, "open", "rank-00001-of-00002.safetensors"),
    "the shard is not announced": (1, "open", "rank-00001-of-00002.done"),
    "all shards are there, no state": (0, "open", ".state.json.tmp"),
    "no manifest": (0, "open", ".manifest.json.tmp"),
    "not renamed into place": (0, "os.rename", ".partial"),
    "renamed, the pointer is old": (0, "open", ".latest.tmp"),
    "the new pointer is aside": (0, "os.rename", ".latest.tmp"),
    "published, old ones not removed": (0, "shutil.rmtree", "step-"),
}
# Added to the shard that is cut off, so that writing it takes long enough to be hit; zeros that are never touched take
# no memory.
BALLAST_BYTES = 2**29


def kill_in_save(phase: str, step: str) -> None:
    """kill -9 of this process in ``phase`` of saving checkpoint ``step`` (the folder's name)."""
    _, wanted, part = PHASES[phase]
    stand_still_while_saving()
    if wanted is None:
        kill_in_write(step)
        return
    saving = False

    def hook(event: str, arguments: tuple) -> None:
        nonlocal saving
        if event not in ("open", "os.rename", "os.mkdir", "shutil.rmtree"):
            return
        path = os.fspath(arguments[0]) if isinstance(arguments[0], str | os.PathLike) else ""
        saving = saving or (step in path and event == "os.mkdir")
        inside = path.split("/checkpoints/")[-1]
        name = inside if event == "shutil.rmtree" else os.path.basename(path)
        if saving and event == wanted and part in name and (event != "os.rename" or not name.endswith(".done.tmp")):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def kill_in_write(step: str) -> None:
    """kill -9 of this process while safetensors writes its file of checkpoint ``step``: audit hooks do not see that."""
    save_tensors = checkpoint.save_tensors

    def kill_when_it_grows(folder: Path) -> None:
        while written_bytes(folder) < BALLAST_BYTES // 16:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGKILL)

    def save_larger_file(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if step in path.parent.name:
            tensors = tensors | {"zeros": torch.zeros(BALLAST_BYTES // 4)}
            threading.Thread(target=kill_when_it_grows, args=(path.parent,), daemon=True).start()
        save_tensors(tensors, path)

    checkpoint.save_tensors = save_larger_file


def stand_still_while_saving() -> None:
    """No further step of this rank, so that the others meet its death in a step, not waiting for its file."""
    save = checkpoint.CheckpointWriter.save

    def save_and_wait(writer: checkpoint.CheckpointWriter, *arguments: object) -> None:
        save(writer, *arguments)
        writer.wait()

    checkpoint.CheckpointWriter.save = save_and_wait


def written_bytes(partial: Path) -> int:
    """Of the largest file in ``partial``. Blocks, not its size, which safetensors sets before it writes."""
    amounts = [0]
    for path in partial.iterdir():
        with contextlib.suppress(FileNotFoundError):  # renamed in this moment
            amounts.append(512 * path.stat().st_blocks)
    return max(amounts)


def give_up_after(seconds: str) -> None:
    """How long a rank waits, when the run has ended, for shards that may never come."""
    checkpoint.ABANDON_GRACE_S = float(seconds)


def terminate_after_save(step: str) -> None:
    """SIGTERM to this process once checkpoint ``step`` was handed to its writer."""
    save = saving.Saver.save

    def save_and_terminate(saver: saving.Saver) -> None:
        save(saver)
        if saver._progress.step == int(step):
            os.kill(os.getpid(), signal.SIGTERM)

    saving.Saver.save = save_and_terminate


def break_loader(kind: str) -> None:
    """The second micro-batch of this rank ends in an error: a "fault" of ours, or one "to mend" by the user."""
    error = {"fault": ValueError, "to mend": UserError}[kind]
    next_micro_batch = TrainLoader.next_micro_batch
    calls = itertools.count(1)

    def fail_at_the_second(loader: TrainLoader) -> Batch:
        if next(calls) == 2:
            raise error("the second micro-batch is lost")
        return next_micro_batch(loader)

    TrainLoader.next_micro_batch = fail_at_the_second


def lack_data(instead: str) -> None:
    """The data of this rank's host are not where those of the others are: it looks into ``instead``."""
    build = run_data.build_train_loader
    run_data.build_train_loader = lambda sources, **options: build([Path(instead)], **options)


def refuse(call: str) -> None:
    """A file system without ``chmod`` (EPERM), or without the ``fsync`` of a folder (EINVAL)."""
    real = getattr(os, call)

    def refused(target: object, *arguments: object, **options: object) -> object:
        if call == "fsync" and not stat.S_ISDIR(os.fstat(target).st_mode):
            return real(target, *arguments, **options)
        number = errno.EPERM if call == "chmod" else errno.EINVAL
        raise OSError(number, os.strerror(number))

    setattr(os, call, refused)


def lose_share() -> None:
    """After the third micro-batch no image can be opened: EIO, for ever."""
    patience.PATIENCE_S = 1.0
    real, next_micro_batch, taken = os.open, TrainLoader.next_micro_batch, itertools.count(1)
    lost = threading.Event()

    def open_while_there(path: object, *arguments: object, **options: object) -> int:
        if lost.is_set() and str(path).endswith(".jpg"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, *arguments, **options)

    def count(loader: TrainLoader) -> Batch:
        if next(taken) == 3:
            lost.set()
        return next_micro_batch(loader)

    os.open = open_while_there
    TrainLoader.next_micro_batch = count


def hide(library: str) -> None:
    """``library`` cannot be imported, as one that was never installed."""
    assert library not in sys.modules

    class Absent:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name.split(".")[0] == library:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, Absent())


def record_every_step() -> None:
    """On this rank every step without a line is overdue for a record at once."""
    from mirl.engine.training import step_log

    step_log.RECORD_SECONDS = 0.0


def limit_addresses(of: str, mib: str) -> None:
    """A real limit of ``mib`` above the addresses that this process has by then, and an estimate that believes in much.

    of: "trial", the trial steps of `--micro-batch auto`; from there on "forward", the first pass of the loop, and
    "evaluation", that of a classifier.
    """
    from mirl.engine.accounting.free_memory import FreeMemory
    from mirl.engine.pretraining.task import PretrainTask
    from mirl.engine.training import fitting, run
    from mirl.engine.transfer.classification import task

    fitting.free_memory = lambda *_: FreeMemory(2.0**40, "believed")
    place, name = {
        "trial": (run, "try_micro_batch"),
        "forward": (PretrainTask, "forward"),
        "evaluation": (task, "evaluate"),
    }[of]
    real = getattr(place, name)

    def limited(*arguments, **options):
        status = Path("/proc/self/status").read_text()
        size = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmSize:"))
        resource.setrlimit(resource.RLIMIT_AS, (size * 1024 + int(mib) * 2**20, resource.RLIM_INFINITY))
        try:
            return real(*arguments, **options)
        finally:
            if of == "trial":  # what follows has what it needs
                resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    setattr(place, name, limited)


def run_out_of_memory(of: str, time: str) -> None:
    """CUDA's error where it would come, once: in the trial step or the forward pass number ``time``, from 1."""
    from mirl.engine.pretraining.task import PretrainTask
    from mirl.engine.training import trial

    place, name = {"trial": (trial, "trial_step"), "forward": (PretrainTask, "forward")}[of]
    real, times = getattr(place, name), itertools.count(1)

    def fail_once(*arguments):
        if next(times) == int(time):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(*arguments)

    setattr(place, name, fail_once)
