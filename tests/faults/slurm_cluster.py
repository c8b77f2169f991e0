"""Slurm on the two hosts of two_hosts.py: slurmctld on the first, a slurmd on each, without munge, as root."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.faults.two_hosts import SEARCH, TwoHosts

NEEDED = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
# Names of nodes are their addresses, so that nothing has to resolve them. A requeued job waits until the credentials of
# its first start expire: two minutes, if nothing is said.
CONFIG = """\
ClusterName=mirl
SlurmctldHost=localhost({addresses[0]})
AuthType=auth/none
AuthInfo=cred_expire=5
CredType=cred/none
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={spool}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
NodeName={addresses[0]},{addresses[1]} CPUs=2
PartitionName=all Nodes=ALL Default=YES
"""


def missing() -> str | None:
    """Why there is no Slurm here, None if there is."""
    absent = [name for name in NEEDED if shutil.which(name, path=SEARCH) is None]
    return f"not installed: {', '.join(absent)} (apt install slurmctld slurmd slurm-client)" if absent else None


class Slurm:
    """While entered, a cluster of two nodes; its settings and logs lie in ``folder``."""

    def __init__(self, hosts: TwoHosts, folder: Path) -> None:
        self.hosts, self.folder = hosts, folder
        self._spool = Path(tempfile.mkdtemp(prefix="mirl-"))  # for sockets, whose paths must be short
        self._daemons: list[subprocess.Popen] = []

    def __enter__(self) -> Self:
        (self.folder / "state").mkdir(parents=True)
        for address in self.hosts.ADDRESSES:
            (self._spool / address).mkdir()
        settings = CONFIG.format(addresses=self.hosts.ADDRESSES, folder=self.folder, spool=self._spool)
        (self.folder / "slurm.conf").write_text(settings)
        # slurmd wants a place for control groups and uses none; `ip netns exec` hides the one of this machine.
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        with_cgroup = ["sh", "-c", 'mount -t tmpfs none /sys/fs/cgroup && exec "$@"', "sh"]
        try:
            self._start(0, ["slurmctld", "-D"])
            for host, address in enumerate(self.hosts.ADDRESSES):
                self._start(host, [*with_cgroup, "slurmd", "-D", "-N", address])
            self._wait_for_nodes()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def run(self, *command: str, **options: object) -> str:
        """Output of ``command`` on the first host."""
        options["env"] = self._environment(options.get("env"))
        result = self.hosts.run(0, list(command), **options)
        assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}\nlogs in {self.folder}"
        return result.stdout

    def stop(self) -> None:
        for daemon in reversed(self._daemons):
            daemon.terminate()
            daemon.wait(timeout=30)
        shutil.rmtree(self._spool)

    def _environment(self, base: dict[str, str] | None) -> dict[str, str]:
        base = dict(os.environ if base is None else base)
        return base | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def _start(self, host: int, command: list[str]) -> None:
        log = (self.folder / f"{len(self._daemons)}.log").open("w")
        environment = self._environment(None)
        environment["PATH"] = os.pathsep.join([environment["PATH"], SEARCH])
        self._daemons.append(self.hosts.start(host, command, env=environment, stdout=log, stderr=log))

    def _wait_for_nodes(self) -> None:
        deadline = time.monotonic() + 30
        # sinfo itself fails until the controller answers: that is to wait for, and the deadline ends it.
        while "idle 2" not in self.run("sh", "-c", "sinfo --noheader --format '%t %D' || true"):
            if time.monotonic() > deadline:
                raise RuntimeError(f"the nodes of Slurm are not ready; see {self.folder}/*.log")
            time.sleep(0.2)
