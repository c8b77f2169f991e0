"""Two hosts on one machine: network namespaces with a cable between them and an sshd in each.

usage: python tests/faults/two_hosts.py FOLDER COMMAND ...     (as root) runs COMMAND on the first host

`TwoHosts` makes them and takes them away. Each has an address and a loopback of its own and nothing else: what works
here works between machines that share a file system. Both keep this machine's name, which stands for hosts whose name
leads to the wrong address.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

NEEDED = ("ip", "sshd", "ssh", "ssh-keygen", "pdsh")
SEARCH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def missing() -> str | None:
    """Why two hosts cannot be made here, None if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    absent = [name for name in NEEDED if shutil.which(name, path=SEARCH) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (apt install iproute2 openssh-server pdsh)"
    tried = subprocess.run(["ip", "netns", "add", f"mirl{os.getpid()}"], capture_output=True, text=True, check=False)
    if tried.returncode:
        return f"network namespaces are not allowed: {tried.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", f"mirl{os.getpid()}"], check=True)
    return None


class TwoHosts:
    """While entered: hosts at `ADDRESSES`, password-less ssh between them; keys and settings lie in ``folder``."""

    ADDRESSES = ("10.219.7.1", "10.219.7.2")

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = tuple(f"mirl{os.getpid()}{letter}" for letter in "ab")
        self._daemons: list[subprocess.Popen] = []

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._connect()
            self._start_sshd()
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _connect(self) -> None:
        ends = tuple(f"mirl{letter}{os.getpid()}"[:15] for letter in "ab")
        for name in self.names:
            _call("ip", "netns", "add", name)
        _call("ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for name, end, address in zip(self.names, ends, self.ADDRESSES, strict=True):
            _call("ip", "link", "set", end, "netns", name)
            inside = ("ip", "-n", name)
            _call(*inside, "address", "add", f"{address}/24", "dev", end)
            _call(*inside, "link", "set", "lo", "up")
            _call(*inside, "link", "set", end, "up")

    def _start_sshd(self) -> None:
        key, host_key = self.folder / "key", self.folder / "host_key"
        for path in (key, host_key):
            _call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path))
        shutil.copy(key.with_suffix(".pub"), self.folder / "authorized_keys")
        Path("/run/sshd").mkdir(exist_ok=True)
        options = {
            "HostKey": host_key,
            "AuthorizedKeysFile": self.folder / "authorized_keys",
            "StrictModes": "no",
            "UsePAM": "no",
            "PidFile": "none",
            "PermitRootLogin": "yes",
        }
        config = self.folder / "sshd_config"
        config.write_text("".join(f"{name} {value}\n" for name, value in options.items()))
        sshd = shutil.which("sshd", path=SEARCH)
        for name in self.names:
            log = (self.folder / f"{name}.log").open("w")
            command = ["ip", "netns", "exec", name, str(sshd), "-D", "-e", "-f", str(config)]
            self._daemons.append(subprocess.Popen(command, stderr=log))
        # What a user has in ~/.ssh/config. The launchers call `ssh`: this one comes first on PATH.
        tools = self.folder / "bin"
        tools.mkdir()
        (tools / "ssh").write_text(
            f"#!/bin/sh\nexec {shutil.which('ssh')} -i {key} -o StrictHostKeyChecking=no -o LogLevel=ERROR "
            '-o UserKnownHostsFile=/dev/null "$@"\n'
        )
        (tools / "ssh").chmod(0o755)
        deadline = time.monotonic() + 20
        while self.run(0, ["ssh", self.ADDRESSES[1], "true"]).returncode:
            if time.monotonic() > deadline:
                raise RuntimeError(f"no ssh to {self.ADDRESSES[1]}; see {self.folder}/*.log")
            time.sleep(0.2)

    def environment(self, base: dict[str, str] | None = None) -> dict[str, str]:
        base = dict(os.environ if base is None else base)
        return base | {"PATH": f"{self.folder / 'bin'}{os.pathsep}{base['PATH']}"}

    def start(self, host: int, command: list[str], **options: object) -> subprocess.Popen:
        """``command`` on host 0 or 1."""
        options["env"] = self.environment(options.get("env"))
        return subprocess.Popen(["ip", "netns", "exec", self.names[host], *command], text=True, **options)

    def run(self, host: int, command: list[str], *, seconds: float = 240, **options: object):
        options["env"] = self.environment(options.get("env"))
        return subprocess.run(
            ["ip", "netns", "exec", self.names[host], *command],
            capture_output=True, text=True, timeout=seconds, check=False, **options,
        )  # fmt: skip

    def remove(self) -> None:
        for daemon in self._daemons:
            daemon.terminate()
            daemon.wait(timeout=10)
        for name in self.names:
            inside = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
            for pid in inside.stdout.split():
                subprocess.run(["kill", "-9", pid], check=False, capture_output=True)
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def _call(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


if __name__ == "__main__":
    reason = missing()
    if reason:
        sys.exit(f"error: {reason}")
    with TwoHosts(Path(sys.argv[1]).absolute()) as hosts:
        sys.exit(hosts.start(0, sys.argv[2:]).wait())
