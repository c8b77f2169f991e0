"""One run, one folder: rank 0 holds OUT/run.lock while the run lasts.

The lock names host, process and start time, and a counter in it moves on every few seconds. A second start tells a live
run by the process table where it sees the same one, else by watching that counter: no two clocks are compared. A lock
whose run is gone is taken over.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

import psutil

from mirl.errors import UserError

NAME = "run.lock"
BEAT_S = 15.0
WATCH_S = 60.0  # a run on another host that moved nothing for so long is gone
_COUNTER_DIGITS = 12  # the lock keeps its length, so that it can be written on a full disk
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who holds a lock. ``machine`` tells process tables apart: hosts, restarts, containers of one host name.

    started: seconds since 1970, to be shown. born: on a clock that nobody sets, to be compared.
    """

    host: str
    process: int
    started: float
    born: float
    machine: str
    token: str
    beat: str = "0" * _COUNTER_DIGITS

    @classmethod
    def of_this_process(cls) -> Self:
        """This process, with a token of its own for each lock."""
        return cls(
            host=socket.gethostname(), process=os.getpid(), started=psutil.Process().create_time(),
            born=_born(os.getpid()), machine=_process_table(), token=secrets.token_hex(8),
        )  # fmt: skip

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """The holder that ``path`` names; None where there is no lock, or none that can be read."""
        try:
            return cls(**json.loads(path.read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def to_bytes(self) -> bytes:
        return (json.dumps(asdict(self)) + "\n").encode()

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.started))
        return f"process {self.process} on {self.host}, started {since}"

    def is_gone(self) -> bool | None:
        """Whether the process is gone; None where this machine cannot tell."""
        if self.machine != _process_table():
            return None
        try:
            # A number may be another process's by now; a zombie is dead and waits for its parent to notice.
            zombie = psutil.Process(self.process).status() == psutil.STATUS_ZOMBIE
            return zombie or _born(self.process) != self.born
        except (psutil.NoSuchProcess, FileNotFoundError):
            return True
        except psutil.AccessDenied:
            return False


class RunLock:
    """The lock of run folder ``out``, held between `acquire` and `release`.

    ``lost``: another start took the folder over, because this process moved nothing for a minute.
    """

    def __init__(self, out: Path) -> None:
        self.path = out / NAME
        self.lost = False
        self._me: Holder | None = None
        self._made: list[Path] = []
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> list[str]:
        """Take the lock; returns a line if it was that of a run which is gone.

        Raises:
            UserError: a live run holds it.
        """
        remarks: list[str] = []
        me = Holder.of_this_process()
        while not self._create(me):
            held = _bytes_of(self.path)
            if held is None:
                continue
            holder = Holder.read(self.path)
            if not _wait_until_gone(self.path, holder, held):
                raise UserError(
                    f"out is {self.path.parent}, where {holder or 'another run'} is training: wait until it ends, stop "
                    "it, or give another --out"
                )
            if self._remove_stale(held):
                remarks = [f"took over {self.path.parent} from {holder or 'a run'}, which is gone"]
        self._me = me
        self._thread = threading.Thread(target=self._beat, name="run-lock", daemon=True)
        self._thread.start()
        return remarks

    def release(self) -> None:
        """Remove the lock, and the folders that `make_folder` made if nothing came into them."""
        self._end.set()
        if self._thread is not None:
            self._thread.join(timeout=5)  # a share may be gone; then the lock stays and is taken over later
            self._thread = None
        if self._me is not None and not self.lost:
            holder = Holder.read(self.path)
            if holder is not None and holder.token == self._me.token:
                self.path.unlink(missing_ok=True)
        self._me = None
        for folder in self._made[::-1]:
            try:
                folder.rmdir()
            except OSError:
                break
        self._made = []

    def make_folder(self) -> None:
        """Make the run's folder; `release` removes it again if nothing came into it."""
        out = self.path.parent
        self._made = [folder for folder in (*out.absolute().parents[::-1], out.absolute()) if not folder.exists()]
        out.mkdir(parents=True, exist_ok=True)

    def _create(self, me: Holder) -> bool:
        with _alone_in(self.path.parent):
            try:
                descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            except FileExistsError:
                return False
        try:
            os.write(descriptor, me.to_bytes())
            os.fsync(descriptor)
        except OSError:
            self.path.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
        return True

    def _remove_stale(self, held: bytes) -> bool:
        """Remove the lock if it is still the one that was judged: of two starts at once one is the first.

        Nobody else makes or removes it meanwhile. On a share without such guards a newer lock can be out of the way for
        a moment, in which a third start makes its own; one of the two runs then finds at its next beat that it is lost.
        """
        with _alone_in(self.path.parent):
            aside = self.path.with_name(f".{NAME}.{secrets.token_hex(4)}")
            try:
                os.rename(self.path, aside)
            except FileNotFoundError:
                return False
            if _bytes_of(aside) == held:
                aside.unlink()
                return True
            os.rename(aside, self.path)  # a newer one
            return False

    def _beat(self) -> None:
        count = 0
        while not self._end.wait(BEAT_S):
            count += 1
            try:
                self._write_beat(count)
            except OSError as error:
                _log.debug("%s was not renewed: %s", self.path, error)  # the share may be back next time
            if self.lost:
                return

    def _write_beat(self, count: int) -> None:
        me = self._me
        assert me is not None
        try:
            descriptor = os.open(self.path, os.O_RDWR)
        except FileNotFoundError:
            self._create(me)  # removed by hand, or on its way through `_remove_stale`
            return
        try:
            data = os.read(descriptor, 4096)
            if me.token.encode() not in data:
                self.lost = True
                return
            os.pwrite(descriptor, replace(me, beat=f"{count:0{_COUNTER_DIGITS}d}").to_bytes(), 0)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keep other starts that do so out of ``folder`` for some system calls, where its file system can lock a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # NFS, some FUSE
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _wait_until_gone(path: Path, holder: Holder | None, held: bytes) -> bool:
    """Whether the run behind the lock is gone. Watches the lock where the process table does not tell."""
    gone = None if holder is None else holder.is_gone()
    if gone is not None:
        return gone
    _log.warning(
        "%s is held by %s: watching for %d s whether it lives", path, holder or "a run that it does not name", WATCH_S
    )
    deadline = time.monotonic() + WATCH_S
    while time.monotonic() < deadline:
        time.sleep(min(1.0, WATCH_S / 10))
        now = _bytes_of(path)
        if now is None:
            return True
        if now != held:
            return False
    return True


def _bytes_of(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _born(process: int) -> float:
    """When a process started: in ticks since the start of the machine, which setting the clock does not move."""
    path = Path(f"/proc/{process}/stat")
    if not Path("/proc/self/stat").exists():
        return psutil.Process(process).create_time()
    return float(path.read_text().rpartition(")")[2].split()[19])


def _process_table() -> str:
    """What is equal for two processes that see each other, and only for them."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # not Linux
        return f"{socket.gethostname()}/{int(psutil.boot_time())}"
