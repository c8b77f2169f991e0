"""A command ends with an exit code for each reason, and with one line if a user can mend it or go on from it.

An error that a user can mend is a `mirl.errors.UserError`. The exceptions of this module, `StorageLost`, a full disk
and an error of the system about a path end with a line, too. Any other exception is a fault of ours, keeps its
traceback and ends with exit code 1.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable

from mirl.engine.streams import flush, open_streams, say
from mirl.errors import StorageLost, UserError

EXIT_OK = 0
EXIT_USER_ERROR = 2
EXIT_DIVERGED = 3
# The others are those of sysexits.h.
EXIT_LOST_RANK = 69  # EX_UNAVAILABLE
EXIT_HUNG = 70  # EX_SOFTWARE
EXIT_NOT_SAVED = 74  # EX_IOERR
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: run the same command again to go on

# The operating system raises these for a path and names it, so the user knows what to do.
OF_A_PATH = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)

# A rank other than 0 waits this long before it leaves; launchers look at their workers every second or so.
PAUSE_S = 3
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Diverged(RuntimeError):
    """Training produced non-finite numbers for too many steps in a row."""


class Preempted(RuntimeError):
    """Training stopped early on request (a signal or a time limit) after saving its state."""


class LostRank(RuntimeError):
    """Another rank is gone, and nothing that needs all of them can go on."""


class NotSaved(RuntimeError):
    """The last checkpoint of the run could not be written."""


_met = False
_is_command = False


def begin_to_meet() -> None:
    """Note that from here on this rank may meet errors that others do not have."""
    global _met
    _met = True


def is_command() -> bool:
    """Say whether `run_entry_point` tells the errors of this process and ends it; in a notebook it does not."""
    return _is_command


def run_entry_point(main: Callable[[], int | None]) -> None:
    """Call ``main`` and leave the process: an error of the user's becomes one line on stderr and an exit code.

    On several ranks rank 0 speaks first. The others wait a moment, because a launcher that sees one worker fail ends
    the rest, and would otherwise cut off the message. A rank that is still there then tells its own error, since rank 0
    may not have it (the data of one host, the variables of one rank). An error before `begin_to_meet` comes from the
    command line, which all ranks have, so rank 0 alone tells it. Every rank that is left tells of a lost rank.
    """
    global _is_command
    _is_command = True
    open_streams()
    rank, wrong = _rank()
    try:
        if wrong:
            raise UserError(wrong)
        code = main() or EXIT_OK
    except (UserError, *OF_A_PATH) as error:
        ours = not isinstance(error, UserError) and error.filename is None
        if ours or os.environ.get("MIRL_TRACEBACK") == "1":
            raise
        code = EXIT_USER_ERROR
        _say(rank, f"error: {error}", own=_met and not getattr(error, "of_all_ranks", False))
    except Diverged as error:
        code = EXIT_DIVERGED
        _say(rank, f"error: {error}")
    except NotSaved as error:
        code = EXIT_NOT_SAVED
        _say(rank, f"error: {error}")
    except LostRank as error:
        if os.environ.get("MIRL_TRACEBACK") == "1":
            raise
        code = EXIT_LOST_RANK
        say(f"error: rank {rank}: {error}")
    except (Preempted, StorageLost) as error:
        code = EXIT_PREEMPTED
        _say(rank, f"stopped: {error}", own=isinstance(error, StorageLost))
    except OSError as error:
        if error.errno not in _FULL or os.environ.get("MIRL_TRACEBACK") == "1":
            raise
        code = EXIT_NOT_SAVED
        _say(rank, f"error: what was being written does not fit ({error.strerror}): free space", own=True)
        flush(sys.stdout)
    except KeyboardInterrupt:
        code = 130
    unwritten = flush(sys.stdout)
    if unwritten is not None and unwritten.errno in _FULL and code == EXIT_OK:
        # A run keeps its log in its folder and writes line by line; a command has nothing but what it prints.
        code = EXIT_NOT_SAVED
        _say(rank, f"error: standard output cannot be written ({unwritten.strerror}): free space, or send it elsewhere")
    flush(sys.stderr)
    sys.exit(code)


def _say(rank: int, line: str, *, own: bool = False) -> None:
    """Say the line on rank 0; on another rank wait, and say it if it may be that rank's ``own``."""
    if rank == 0:
        say(line)
        return
    time.sleep(PAUSE_S)
    if own:
        kind, _, text = line.partition(": ")
        say(f"{kind}: rank {rank}: {text}")


def _rank() -> tuple[int, str]:
    """Return ``(rank, what is wrong with it)``; a process whose rank is no number speaks for itself."""
    # srun's ranks have no RANK before they join.
    name, text = next(((name, text) for name in ("RANK", "SLURM_PROCID") if (text := os.environ.get(name))), ("", "0"))
    try:
        return int(text), ""
    except ValueError:
        return 0, f"the environment variable {name} is {text!r}: it must be a number, or unset for one process"
