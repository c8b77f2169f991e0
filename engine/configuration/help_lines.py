"""Texts of the help: usage lines that work where they are typed, a recipe in some lines, defaults in one style."""

from __future__ import annotations

import difflib
import inspect
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

WIDTH = 118


def usage(command: str, module: str, arguments: str) -> str:
    """The usage of ``mirl command``, on one device and then, under DeepSpeed's launcher, on several.

    Both lines work in the folder in which the help was asked for: the entry point is named as it was typed, or else as
    a module, which is found wherever the package is installed.
    """
    typed = sys.argv[0]
    as_file = Path(typed).name == f"{command}.py" and Path(typed).is_file()
    alone = f"mirl {command}" if shutil.which("mirl") else f"python -m {module}"
    alone, entry = (f"python {typed}", typed) if as_file else (alone, f"--module {module}")
    several = f"deepspeed {entry} --deepspeed_config zero2 ..., with the same flags, on several devices"
    return f"{alone} {arguments}\n       {several}"


def describe_recipe(name: str, recipe: Callable[[], Any], sizes: Mapping[str, str]) -> str:
    """The first paragraph of what ``recipe`` says of itself, and its line of ``sizes``."""
    text = f"Recipe {name}: {(inspect.getdoc(recipe) or '').split('Command:')[0].split('Size:')[0].strip()}"
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n")]
    paragraphs += [f"Size: {sizes[name]}"] if name in sizes else []
    return "\n".join(textwrap.fill(part, WIDTH, break_on_hyphens=False) for part in paragraphs)


def shown_default(value: Any) -> str:
    """A default as it would be typed: numbers in short, "on" and "off" of a switch, "none" where nothing is given."""
    if isinstance(value, tuple):
        return " ".join(map(shown_default, value)) or "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value in (None, "") else str(value)


def nearest(name: str, known: Iterable[str]) -> str:
    """``"did you mean 'X'? "`` where one of ``known`` resembles ``name``, else an empty text."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}? " if close else ""
