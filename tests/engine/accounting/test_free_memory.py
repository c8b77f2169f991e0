"""What bounds a process: control groups of both versions, limits of the shell, the machine and its ranks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from mirl.engine.accounting import free_memory
from mirl.engine.accounting.free_memory import _of_control_groups, free_host_memory
from tests.support.launch import CHECKOUT, launch_environment
from tests.support.limits import control_group, under_ulimit

GIB = 2**30


def write_group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


def write_proc(folder: Path, groups: str, mount: str) -> Path:
    proc = folder / "proc"
    proc.mkdir()
    (proc / "cgroup").write_text(groups)
    (proc / "mountinfo").write_text(f"21 1 0:20 / / rw - overlay overlay rw\n{mount}\n")
    return proc


def test_version_2_is_read_up_to_the_mount_and_files_can_be_dropped(tmp_path):
    root = tmp_path / "cgroup"
    write_group(root)
    write_group(root / "pod", memory__max=4 * GIB, memory__current=3 * GIB, memory__stat=f"inactive_file {GIB}\nanon 5")
    write_group(root / "pod" / "job", memory__max="max", memory__current=2 * GIB, memory__stat="anon 5")
    proc = write_proc(tmp_path, "0::/pod/job\n", f"30 21 0:26 / {root} rw - cgroup2 cgroup2 rw")
    (room,) = _of_control_groups(proc)
    assert (room.left, room.limit) == (2 * GIB, 4 * GIB) and "pod" in room.bound and "4.0 GiB" in room.bound


def test_version_1_is_read_where_it_is_mounted_below_its_own_root(tmp_path):
    root = tmp_path / "memory"
    stat = f"total_inactive_file {GIB}\ntotal_active_file {GIB}\ninactive_file 0"
    write_group(root / "job", memory__limit_in_bytes=8 * GIB, memory__usage_in_bytes=7 * GIB, memory__stat=stat)
    write_group(root, memory__limit_in_bytes=2**63 - 4096, memory__usage_in_bytes=9 * GIB, memory__stat=stat)
    mount = f"31 21 0:27 /docker/abc {root} rw - cgroup cgroup rw,memory"
    proc = write_proc(tmp_path, "4:memory:/docker/abc/job\n3:cpu,cpuacct:/docker/abc\n", mount)
    (room,) = _of_control_groups(proc)
    assert (room.left, room.limit) == (3 * GIB, 8 * GIB)


def test_a_group_outside_of_the_mount_is_looked_for_at_the_mount(tmp_path):
    root = tmp_path / "cgroup"
    write_group(root, memory__max=2 * GIB, memory__current=GIB, memory__stat="anon 5")
    proc = write_proc(tmp_path, "0::/../elsewhere\n", f"30 21 0:26 / {root} rw - cgroup2 cgroup2 rw")
    assert [room.left for room in _of_control_groups(proc)] == [GIB]


def test_ranks_of_a_host_share_what_is_free(monkeypatch):
    monkeypatch.setattr(free_memory, "_of_control_groups", lambda: ())
    held = psutil.Process().memory_info().rss

    def shared_by(ranks: int, available: int) -> float:
        machine = psutil.virtual_memory()._replace(total=64 * GIB, available=available)
        monkeypatch.setattr(free_memory.psutil, "virtual_memory", lambda: machine)
        return free_host_memory(ranks, of_limits=False).bytes

    assert shared_by(1, 16 * GIB) - held == pytest.approx(16 * GIB, rel=0.01)
    assert shared_by(4, 16 * GIB) - held == pytest.approx(4 * GIB, rel=0.01)
    assert shared_by(4, 64 * GIB) == 16 * GIB  # what a rank holds already is part of its share


def asked_in(prefix: list[str]) -> str:
    code = "from mirl.engine.accounting.free_memory import *; f = free_host_memory(); print(f.bytes, f.bound)"
    done = subprocess.run(
        [*prefix, sys.executable, "-c", code], cwd=CHECKOUT, env=launch_environment(), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_real_control_group_is_seen():
    with control_group(3 * GIB // 2) as group:
        size, bound = asked_in(group.prefix).split(" ", 1)
    assert GIB < float(size) <= 3 * GIB // 2 and group.folder.name in bound


def test_a_real_limit_of_the_shell_is_seen():
    size, bound = asked_in(under_ulimit(8 * GIB)).split(" ", 1)
    assert float(size) < 8 * GIB - free_memory.RESERVED_ADDRESSES and f"ulimit -v {8 * GIB // 1024}" in bound


def test_the_peak_of_a_process_is_its_own():
    """``ru_maxrss`` of a child begins with the size of its parent, here 2 GiB."""
    child = (
        "import resource; from mirl.engine.accounting.free_memory import peak_host_memory\n"
        "print(peak_host_memory(), 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    parent = f"import subprocess, sys; held = b'.' * {2 * GIB}; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    done = subprocess.run(
        [sys.executable, "-c", parent, child], env=launch_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    peak, inherited = map(int, done.stdout.split())
    assert 0.05 * GIB < peak < GIB and inherited > 2 * GIB
