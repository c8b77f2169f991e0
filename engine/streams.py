"""Standard output and error can always be written to here: telling something never ends what it tells about."""

from __future__ import annotations

import os
import sys
from typing import TextIO


def open_streams() -> None:
    """Put /dev/null in place of each standard stream that is missing, and let the others write any name.

    Cron jobs, daemons and some schedulers start programs without these streams, and so does ``>&-`` in a shell. The
    next file to be opened would then become descriptor 1 or 2, into which libraries write, and `sys.stdout` is None. A
    character that the stream's encoding lacks, or a byte of a file's name that is no text, is written as its number.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            # The system takes the lowest free number, which is this one. Children inherit it, as a real stream.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for the life of the process
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def say(line: str) -> None:
    """Print ``line`` on stderr, as one line whatever names are in it. Never raises."""
    shown = "".join(part if part.isprintable() else part.encode("unicode_escape").decode() for part in line)
    try:
        print(shown, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        flush(sys.stderr)


def flush(stream: TextIO) -> OSError | None:
    """Flush, and return the error if there was one.

    A stream that fails (a closed pipe or ssh session, a full disk) is turned to nowhere, because the interpreter would
    fail on it once more and leave with a code of its own.
    """
    try:
        stream.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return error
    except ValueError:
        pass  # the stream was closed, and the interpreter leaves it alone
    return None
