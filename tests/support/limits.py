"""Commands under a memory limit: in a control group of their own, or under ``ulimit -v``."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class ControlGroup:
    """A control group that counts memory. ``prefix``: put before a command, it runs the command inside."""

    folder: Path
    version: int

    @property
    def prefix(self) -> list[str]:
        return ["sh", "-c", f'echo $$ > {self.folder}/cgroup.procs && exec "$@"', "sh"]

    @property
    def killed(self) -> int:
        """Processes that the kernel killed because the limit was reached."""
        name = "memory.events" if self.version == 2 else "memory.oom_control"
        counts = dict(line.split() for line in (self.folder / name).read_text().splitlines())
        return int(counts.get("oom_kill", 0))


@contextlib.contextmanager
def control_group(limit: int) -> Iterator[ControlGroup]:
    """A control group of ``limit`` bytes; the test is skipped, and told why, where none can be made."""
    version = 2 if (ROOT / "cgroup.controllers").exists() else 1
    parent = ROOT if version == 2 else ROOT / "memory"
    group = ControlGroup(parent / f"mirl-test-{os.getpid()}", version)
    try:
        group.folder.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here ({error}); as root, or with a delegated group, it can")
    try:
        try:
            name = "memory.max" if version == 2 else "memory.limit_in_bytes"
            (group.folder / name).write_text(str(limit))
            if version == 2 and (group.folder / "memory.swap.max").exists():
                (group.folder / "memory.swap.max").write_text("0")
        except OSError as error:
            pytest.skip(f"control groups do not limit memory here ({error})")
        yield group
    finally:
        group.folder.rmdir()


def under_ulimit(limit: int) -> list[str]:
    """A prefix that bounds the address space of a command to ``limit`` bytes."""
    return ["sh", "-c", f'ulimit -v {limit // 1024} && exec "$@"', "sh"]


_WATCH = """
import json, subprocess, sys, time
child, most = subprocess.Popen(sys.argv[2:]), {}
while child.poll() is None:
    try:
        with open(f"/proc/{child.pid}/status") as status:
            found = dict(line.split(":", 1) for line in status)
        for name in ("VmHWM", "RssAnon", "RssFile"):
            most[name] = max(most.get(name, 0), 1024 * int(found[name].split()[0]))
    except (OSError, KeyError):  # it is over
        pass
    time.sleep(0.02)
with open(sys.argv[1], "w") as report:
    json.dump(most, report)
sys.exit(child.returncode)
"""


def watched(report: Path) -> list[str]:
    """A prefix that runs a command and writes into ``report`` what memory it took, for `peak_beside_files`."""
    return [sys.executable, "-c", _WATCH, str(report)]


def peak_beside_files(report: Path) -> int:
    """The most bytes that a command held, without the pages of files that it had mapped, its libraries.

    How many of those count as held depends on how the page cache came by them: after a fresh installation 230 MiB more.
    They are the first that the kernel takes back, so that fewer may be left at the end than at the peak.
    """
    most = json.loads(report.read_text())
    # Neither can be above the truth: a peak between two readings is missed by the first, not by VmHWM.
    return max(most["RssAnon"], most["VmHWM"] - most["RssFile"])
