"""Whatever a message tells to type exists: the commands and flags it names, and what it tells pip to install.

The messages are taken from the source itself, so that none can be forgotten. That a mend works when it is done as told
is shown where the fault is made: tests/dataloaders/test_mends.py, tests/engine/test_mends.py and others.
"""

from __future__ import annotations

import ast
import contextlib
import io
import re
import shlex
import tomllib
from collections.abc import Iterator
from functools import cache

import pytest
from packaging.requirements import Requirement

from mirl.engine.cli import COMMANDS, dispatch
from tests.support.launch import CHECKOUT

ROOMS = ("engine", "dataloaders", "kernels", "mirl")
# Flags of others, which messages and docstrings name too.
FOREIGN = {
    "mirl alone": {"--version"},
    "launchers, taken and passed over": {"--local-rank", "--deepspeed"},
    "the beginning of a switch": {"--no"},
    "deepspeed": {"--master_port", "--deepspeed_config"},
    "torchrun": {"--rdzv-endpoint", "--nproc-per-node"},
    "git": {"--error-unmatch", "--no-optional-locks", "--porcelain", "--untracked-files", "--verify"},
    "docker": {"--ulimit", "--shm-size"},
    "pip": {"--force-reinstall"},
    "nvidia-smi": {"--query-gpu", "--format"},
    "python of launchers": {"--module"},
    "tensorboard": {"--logdir"},
    "tar": {"--sparse"},
}
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9_-]*[a-z0-9]")


def texts() -> Iterator[tuple[str, str]]:
    """(place, text) of every string in the source but docstrings; of a formatted one each piece."""
    for room in ROOMS:
        for path in sorted((CHECKOUT / room).rglob("*.py")):
            tree = ast.parse(path.read_text())
            docstrings = {
                id(node.body[0].value)
                for node in ast.walk(tree)
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
                and node.body
                and isinstance(node.body[0], ast.Expr)
            }
            for node in ast.walk(tree):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                    yield f"{path.relative_to(CHECKOUT)}:{node.lineno}", node.value


@cache
def flags_of(command: str) -> frozenset[str]:
    """The flags of ``mirl command``, as its help lists them."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.suppress(SystemExit):
        dispatch([command, "--help"])
    return frozenset(FLAG.findall(told.getvalue()))


def test_every_flag_of_a_message_is_a_flag_of_a_command():
    known = frozenset().union(*map(flags_of, COMMANDS), *FOREIGN.values())
    assert len(known) > 100
    named = [(place, flag) for place, text in texts() for flag in FLAG.findall(text)]
    assert len(named) > 100
    assert [(place, flag) for place, flag in named if flag not in known] == []


def test_every_mirl_command_of_a_message_exists_and_has_the_flags_beside_it():
    named = [(place, *found) for place, text in texts() for found in re.findall(r"mirl ([a-z][a-z-]+)(.*)", text)]
    named = [(place, command, rest) for place, command, rest in named if command != "pretrain" or rest]
    assert {command for _, command, _ in named} >= {"validate-data", "make-index", "finetune", "predict", "export"}
    for place, command, rest in named:
        assert command in COMMANDS, place
        # A line for two commands, or words in brackets behind the command, name flags of others.
        own = re.split(r"[();,]|mirl ", rest)[0]
        assert set(FLAG.findall(own)) <= flags_of(command), place


def requirements() -> dict[str, Requirement]:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    return {requirement.name: requirement for requirement in map(Requirement, lines)}


PIP = [
    (place, word)
    for place, text in texts()
    for line in re.findall(r"pip install ([^;]*)", text)
    for word in shlex.split(line.partition(" (")[0].partition(" - ")[0].partition(")")[0])
    if not word.startswith("--")
]


@pytest.mark.parametrize(("place", "word"), PIP)
def test_what_pip_is_told_to_install_is_what_the_package_needs(place, word):
    """A line without a bound would install what the package refuses, once there is a newer version."""
    told = Requirement(word)
    if told.name == "nvidia-dali-cuda120":  # the same version of DALI for older drivers
        told.name = "nvidia-dali-cuda130"
    needed = requirements()[told.name]
    bounded = any(bound.operator.startswith("<") for bound in needed.specifier)
    assert told.specifier == needed.specifier or (not told.specifier and not bounded), f"{word}: {needed}"


def test_messages_with_pip_lines_are_found():
    assert {Requirement(word).name for _, word in PIP} >= {"deepspeed", "torch", "triton", "xformers"}
    assert any("dali" in word for _, word in PIP)


def test_every_extra_of_the_documents_exists():
    extras = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pages = [CHECKOUT / name for name in ("README.md", "CONTRIBUTING.md", "Makefile")]
    pages += (CHECKOUT / "docs").glob("*.md")
    named = [name for page in pages for found in re.findall(r"install[^\n]*\[([a-z,]+)\]", page.read_text())
             for name in found.split(",")]  # fmt: skip
    assert named and set(named) <= set(extras)
