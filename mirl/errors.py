"""Define the error that a user can mend and the error that may mend itself. Every room may raise them."""

from __future__ import annotations


class UserError(ValueError):
    """Something that was asked for cannot be done, and the person who asked can mend it.

    The message is one line of the form "X is V: give Y". It names the field or file, its value and the mend. A command
    prints it without a traceback and ends with exit code 2. Every other exception is a fault of ours and keeps its
    traceback. ``of_all_ranks``: rank 0 has the same error and tells it.
    """

    of_all_ranks = False


class StorageLost(RuntimeError):
    """No image can be read for longer than a moment. The fault is the file system's and may be over later."""
