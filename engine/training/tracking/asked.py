"""Which trackers there are, and whether those that a run asks for are installed. Imports none of them."""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Iterable

from mirl.engine.configuration.config import TRACKERS
from mirl.errors import UserError


def require_installed(names: Iterable[str]) -> None:
    """Check that every tracker in ``names`` can be imported.

    Raises:
        UserError: the first that is not installed, with the pip command.
    """
    for name in names:
        spec = importlib.util.find_spec(name)
        # Both write a folder of that name into the folder of a run; to Python it is a package without an origin.
        if spec is None or spec.origin is None:
            raise UserError(f"track is {name}, which is not installed: pip install {shlex.quote(TRACKERS[name])}")
