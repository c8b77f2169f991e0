"""A folder of the checkout steps back for an installed package of the same name."""

from __future__ import annotations

import importlib
import importlib.util
import sys


def give_way(name: str) -> None:
    """Let ``import name`` give the installed package called ``name``, if one is installed.

    A folder of the checkout calls this when it was imported by its bare name. Python looks into the folder that it was
    started in before it looks at what is installed, and so finds kernels/ here in place of Hugging Face's `kernels`.
    Importing `mirl` has put the checkout behind the installed packages, so that a second look finds theirs first.
    """
    ours = sys.modules.pop(name)
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin == ours.__file__:
        sys.modules[name] = ours
    else:
        importlib.import_module(name)  # the import that is under way returns what now stands in sys.modules
