"""Launchers leave numbers of ranks in the environment. Here these are read, taken over from Slurm, or taken out."""

from __future__ import annotations

import os
from collections.abc import Mapping

from mirl.errors import UserError

_NAMES = {
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "CROSS_RANK", "CROSS_SIZE", "GROUP_RANK",
    "NODE_RANK", "MASTER_ADDR", "MASTER_PORT",
}  # fmt: skip
# These versions have the parts of DeepSpeed that engine/distributed/deepspeed_patches.py replaces.
DEEPSPEED_INSTALL = "pip install 'deepspeed>=0.19.8,<0.20'"
_PREFIXES = ("SLURM_", "TORCHELASTIC_", "OMPI_", "PMI_", "PMIX_")


def hide_gpus(device: str) -> None:
    """Hide the GPUs from this process if ``device`` is "cpu"; to be called before torch looks for them."""
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def integer(name: str, default: int, least: int | None = None, most: int | None = None) -> int:
    """Return the number in an environment variable, from ``least`` to ``most``; ``default`` if it is unset or empty.

    Raises:
        UserError: the variable holds anything else.
    """
    text = os.environ.get(name)
    if not text:
        return default
    try:
        number = int(text)
    except ValueError:
        wanted = "a number"
    else:
        if (least is None or number >= least) and (most is None or number <= most):
            return number
        wanted = f"{least} or more" if most is None else f"from {least} to {most}"
    raise UserError(f"the environment variable {name} is {text!r}: it must be {wanted}, or unset for one process")


def adopt_slurm() -> None:
    """Set the variables of a rank from those that srun gives each of several tasks.

    Raises:
        UserError: MASTER_ADDR is not set; it must come from the batch script (docs/clusters.md).
    """
    if not of_slurm(os.environ):
        return
    if "MASTER_ADDR" not in os.environ:
        tasks = os.environ["SLURM_NTASKS"]
        raise UserError(
            f"SLURM_NTASKS is {tasks} and MASTER_ADDR is not set: for one process, unset SLURM_NTASKS; for {tasks}, "
            "export MASTER_ADDR=$(scontrol show hostnames | head -n 1) in the batch script and start them with srun"
        )
    for ours, slurm in (("RANK", "SLURM_PROCID"), ("WORLD_SIZE", "SLURM_NTASKS"), ("LOCAL_RANK", "SLURM_LOCALID")):
        os.environ[ours] = str(integer(slurm, 0))  # refused by the name that the user's shell has
    here = os.environ.get("SLURM_NTASKS_PER_NODE", "1").split("(")[0]
    if not here.isdigit():
        raise UserError(f"the environment variable SLURM_NTASKS_PER_NODE is {here!r}: it must be a number, or unset")
    os.environ["LOCAL_WORLD_SIZE"] = here


def of_slurm(environment: Mapping[str, str]) -> bool:
    """Say whether Slurm's variables make this process one of several.

    A batch script's own shell has them too, but a command that srun did not start is alone.
    """
    several = environment.get("SLURM_NTASKS") not in (None, "", "1")
    return several and bool(environment.get("SLURM_PROCID")) and not environment.get("RANK")


def who_is_missing(rank: int, world_size: int) -> str:
    """Name the ranks for which ``rank`` may be waiting."""
    if rank:
        return "rank 0"
    return "rank 1" if world_size == 2 else f"ranks 1 to {world_size - 1}, or some of them"


def why_alone(environment: Mapping[str, str], world_size: int, place: str) -> str:
    """Say why the other ranks may not come to ``place``, and the mend."""
    by_slurm = environment.get("SLURM_PROCID") == environment.get("RANK") and environment.get("SLURM_NTASKS") == str(
        world_size
    )
    if by_slurm and environment.get("SLURM_STEP_NUM_TASKS") != str(world_size):
        return (
            f"SLURM_NTASKS is {world_size} and only srun starts that many: start this command with srun, or unset "
            "SLURM_NTASKS for one process"
        )
    if by_slurm or "TORCHELASTIC_RUN_ID" in environment or "CROSS_SIZE" in environment:
        return f"see what they print, if the launcher has started them, and whether they can reach {place}"
    return (
        f"WORLD_SIZE is {world_size}, which a launcher sets: start this command with torchrun, deepspeed or srun, or "
        "unset RANK and WORLD_SIZE for one process"
    )


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """Return ``environment`` as a process on its own should see it, started from whatever shell."""
    return {name: value for name, value in environment.items() if name not in _NAMES and not name.startswith(_PREFIXES)}
