"""Find the place of this process among the ranks of a run, and let them meet.

It works under the deepspeed launcher, torchrun and srun, and as a single process without any of them.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from mirl.engine.distributed.device import choose_device
from mirl.engine.distributed.environment import adopt_slurm, integer, who_is_missing, why_alone
from mirl.engine.errors import begin_to_meet
from mirl.engine.streams import say
from mirl.errors import UserError

SILENCE_S = 10.0  # a rank says that it waits for others after this long
RENDEZVOUS_TIMEOUT = datetime.timedelta(minutes=10)
# This is longer than one rank may keep the others waiting (a checkpoint on a slow disk); the watchdog ends hangs.
CONTROL_TIMEOUT = datetime.timedelta(hours=1)
# Gloo and NCCL say so when the process at the other end is gone.
LOST_PEER = (
    "Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited", "ncclRemoteError",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This is the process among the others; ``control`` is a gloo group for small host-side agreements."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    control: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def agree_max(self, values: list[float]) -> list[float]:
        """Return the largest of each value over all ranks, through host memory (no synchronisation with the GPU)."""
        if self.world_size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.control)
        return tensor.tolist()

    def gather(self, value: object) -> list:
        """Return ``value`` of every rank, in rank order, on every rank. Only for processes of one run: it unpickles."""
        if self.world_size == 1:
            return [value]
        values: list = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's ``value``."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier(group=self.control)


def join(device: str = "auto") -> Ranks:
    """Read the launcher's environment, pick the device and join the process group.

    device: see `choose_device`.

    Raises:
        UserError: the environment of the launcher is incomplete or contradicts itself, more ranks than GPUs were
        started, or torch cannot use the GPU of this machine.
    """
    begin_to_meet()
    adopt_slurm()
    rank, world_size = integer("RANK", 0), integer("WORLD_SIZE", 1)
    local_rank = integer("LOCAL_RANK", 0, least=0)
    here = integer("LOCAL_SIZE", world_size if _one_host() else 1, least=1)
    local_world_size = integer("LOCAL_WORLD_SIZE", here, least=1)
    integer("MASTER_PORT", 0, least=0, most=65535)
    if not 0 <= rank < world_size:
        raise UserError(
            f"RANK is {rank} and WORLD_SIZE is {world_size}: start the ranks with one launcher, or unset both for "
            "one process"
        )
    chosen = choose_device(device, local_rank)
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    # DeepSpeed and torch both read these; one process without a launcher has none of them.
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(local_rank), LOCAL_SIZE=str(local_world_size)
    )
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    control = None
    with _told_if_long(rank, world_size, local_world_size):
        if not dist.is_initialized():
            _meet(rank, world_size, local_world_size, chosen, backend)
        if world_size > 1:
            control = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
    return Ranks(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        device=chosen,
        control=control,
    )


def _meet(rank: int, world_size: int, local_world_size: int, device: torch.device, backend: str) -> None:
    options = {"device_id": device} if backend == "nccl" else {}
    store = _private_store(world_size, local_world_size)
    if store is not None:
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=RENDEZVOUS_TIMEOUT, **options
        )
        return
    _choose_interface()
    try:
        dist.init_process_group(backend, timeout=RENDEZVOUS_TIMEOUT, **options)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        if "EADDRINUSE" in str(error):
            raise UserError(
                f"port {os.environ['MASTER_PORT']} of {os.environ['MASTER_ADDR']} is taken by another program: "
                "choose a free one (deepspeed --master_port N; torchrun --rdzv-endpoint HOST:N; "
                "export MASTER_PORT=N under srun)"
            ) from error
        if "imed out" in str(error):
            waited = f"{RENDEZVOUS_TIMEOUT.total_seconds() / 60:g} minutes"
            raise UserError(_waiting(rank, world_size, f"waited {waited} in vain for", _place())) from error
        raise


@contextlib.contextmanager
def _told_if_long(rank: int, world_size: int, local_world_size: int) -> Iterator[None]:
    """Say once, on stderr and on every rank that waits, for whom and where it waits and why they may be late.

    Then go on waiting.
    """
    place = "this host" if _one_parent(world_size, local_world_size) else _place()
    line = _waiting(rank, world_size, "waits for", place)
    timer = threading.Timer(SILENCE_S, say, [f"warning: {line}"])
    timer.daemon = True
    if world_size > 1:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _waiting(rank: int, world_size: int, verb: str, place: str) -> str:
    missing, reason = who_is_missing(rank, world_size), why_alone(os.environ, world_size, place)
    return f"rank {rank} of {world_size} {verb} {missing} at {place}: {reason}"


def _place() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def is_lost_peer(error: BaseException) -> bool:
    """Say whether a collective failed because another rank's process is gone."""
    return isinstance(error, RuntimeError) and any(text in str(error) for text in LOST_PEER)


def leave() -> None:
    """Leave the process group, if this process is in one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def cores_per_rank(local_world_size: int) -> int:
    """Count the CPU cores for this process, shared with the other ranks of this host unless Slurm has shared them."""
    cores = len(os.sched_getaffinity(0))
    each_is_a_task = os.environ.get("SLURM_NTASKS") == os.environ.get("WORLD_SIZE", "1")
    if each_is_a_task and cores <= integer("SLURM_CPUS_PER_TASK", 0):
        return cores
    return max(1, cores // local_world_size)


def _private_store(world_size: int, local_world_size: int) -> dist.Store | None:
    """Return a store that needs no free port if all ranks are on this host; None: meet at MASTER_ADDR:MASTER_PORT.

    torchrun already holds its port. The deepspeed launcher always names the same one (29500), which a second run on the
    machine would find taken. Its workers have one parent, so a file named for that parent is theirs alone.
    """
    if world_size == 1:
        return dist.HashStore()
    if not _one_parent(world_size, local_world_size):
        return None
    parent = psutil.Process(os.getppid())
    name = f"mirl-{os.getuid()}-{parent.pid}-{int(parent.create_time() * 1000)}-{os.environ['MASTER_PORT']}"
    return dist.FileStore(str(Path(tempfile.gettempdir()) / name), world_size)


def _one_parent(world_size: int, local_world_size: int) -> bool:
    """Say whether the deepspeed launcher, or one with the same variables, has started all ranks on this host."""
    alone = os.environ.get("CROSS_SIZE") == "1" and local_world_size == world_size
    return alone and "TORCHELASTIC_RUN_ID" not in os.environ


def _choose_interface() -> None:
    """Make gloo listen on the network that leads to MASTER_ADDR.

    Otherwise gloo takes the address of this host's name. Many systems map it to 127.0.1.1, which no other host can
    reach. NCCL looks for interfaces itself.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])))  # sends nothing
        except OSError:
            return  # the rendezvous gives the reason
        ours = probe.getsockname()[0]
    addresses = {
        item.address: interface
        for interface, items in psutil.net_if_addrs().items()
        for item in items
        if item.family == socket.AF_INET
    }
    outside = [interface for address, interface in addresses.items() if not address.startswith("127.")]
    if not ours.startswith("127.") and ours in addresses:
        os.environ["GLOO_SOCKET_IFNAME"] = addresses[ours]
    elif outside and not _one_host():
        os.environ["GLOO_SOCKET_IFNAME"] = outside[0]  # MASTER_ADDR is the name of this host, mapped to 127.0.1.1


def _one_host() -> bool:
    return os.environ.get("CROSS_SIZE", "1") == "1"


def seconds_since_process_start() -> float:
    """Return the wall time since this process began, imports included."""
    return time.time() - psutil.Process().create_time()
