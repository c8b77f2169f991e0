"""Errors that a user can mend: one line, exit code 2, no traceback."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

EXIT_OK = 0
EXIT_USER_ERROR = 2
EXIT_DIVERGED = 3
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: run the same command again to go on


class UserError(ValueError):
    """Something the user asked for cannot be done; the message names the field, the value and the mend."""


class Diverged(RuntimeError):
    """Training produced non-finite numbers for too many steps in a row."""


class Preempted(RuntimeError):
    """Training stopped early on request (a signal or a time limit) after saving its state."""


def run_entry_point(main: Callable[[], int | None]) -> None:
    """Call ``main`` and leave the process: a ``ValueError`` becomes one line on stderr and exit code 2.

    On several ranks only rank 0 speaks. The others wait a moment before they leave, because a launcher that sees one
    worker fail ends the rest, and would otherwise cut off the message.
    """
    rank = int(os.environ.get("RANK", "0"))
    try:
        code = main() or EXIT_OK
    except (ValueError, FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError) as error:
        if os.environ.get("MIRL_TRACEBACK") == "1" or not _is_users(error):
            raise
        code = EXIT_USER_ERROR
        _say(rank, f"error: {error}")
    except Diverged as error:
        code = EXIT_DIVERGED
        _say(rank, f"error: {error}")
    except Preempted as error:
        code = EXIT_PREEMPTED
        _say(rank, f"stopped: {error}")
    except KeyboardInterrupt:
        code = 130
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)


def _is_users(error: Exception) -> bool:
    """Whether our own code raised ``error``: one from deep inside a library is a bug and keeps its traceback."""
    if isinstance(error, UserError):
        return True
    traceback = error.__traceback__
    module = ""
    while traceback is not None:
        module = traceback.tb_frame.f_globals.get("__name__", "")
        traceback = traceback.tb_next
    return module.split(".")[0] in {"__main__", "engine", "kernels", "dataloaders"}


def _say(rank: int, line: str) -> None:
    if rank == 0:
        print(line, file=sys.stderr, flush=True)
    else:
        time.sleep(3)
