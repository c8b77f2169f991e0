"""The rules that keep the rooms apart: who may import whom, and which module alone imports a heavy library."""

from __future__ import annotations

import ast
import sys
import tomllib
from pathlib import Path

import pytest

from tests.support.launch import CHECKOUT

# From the top of the house to its bottom. A room imports from rooms below it, and from those on its own floor only by
# exception, which would stand here. docs/architecture.md draws the list.
FLOORS = (
    ("mirl.engine.cli",),
    ("mirl.engine.commands",),
    ("mirl.engine.pretrain", "mirl.engine.finetune", "mirl.engine.segment", "mirl.engine.detect"),
    ("mirl.engine.analysis",),
    ("mirl.engine.pretraining",),
    ("mirl.engine.transfer.classification", "mirl.engine.transfer.segmentation", "mirl.engine.transfer.detection"),
    ("mirl.engine.transfer.dense",),
    ("mirl.engine.transfer",),
    ("mirl.engine.training",),
    ("mirl.engine.checkpoints", "mirl.engine.accounting"),
    ("mirl.engine.distributed",),
    ("mirl.engine.configuration",),
    ("mirl.engine.models.interop",),
    ("mirl.engine.models",),
    ("mirl.engine.models.objectives",),
    ("mirl.engine.models.config", "mirl.engine.models.masking", "mirl.engine.models.pixels"),
    ("mirl.engine.models.interop.files",),
    ("mirl.engine.errors", "mirl.engine.version"),
    ("mirl.engine.streams",),
    ("mirl.dataloaders.tools",),
    ("mirl.dataloaders",),
    ("mirl.dataloaders.decoding",),
    ("mirl.dataloaders.sources",),
    ("mirl.kernels",),
    ("mirl.keyed", "mirl.settings"),
    ("mirl.dataloaders.errors",),
    ("mirl.errors", "mirl.disk", "mirl.namesake"),
)
# Their __init__.py name what the rooms inside offer.
FACES = ("mirl", "mirl.engine", "mirl.dataloaders")
ONLY_IN = {
    "deepspeed": ("engine/distributed/deepspeed_patches.py",),
    "nvidia": ("dataloaders/decoding/dali_pipeline.py",),
    "xformers": ("kernels/attention.py",),
    "wandb": ("engine/training/tracking/wandb_run.py",),
    "mlflow": ("engine/training/tracking/mlflow_run.py",),
}
PACKAGES = ("mirl", "engine", "kernels", "dataloaders")
MODULES = sorted(path for package in PACKAGES for path in (CHECKOUT / package).rglob("*.py"))
EVERY_MODULE = pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(CHECKOUT)))


def imported(path: Path) -> set[str]:
    """Dotted names of every module that ``path`` imports, anywhere in it, and of every name imported from one."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def dotted(path: Path) -> str:
    parts = path.relative_to(CHECKOUT).with_suffix("").parts
    parts = parts if parts[0] == "mirl" else ("mirl", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor_of(name: str) -> int | None:
    """The floor of module ``name``, counted from the top; None for one that is in no room."""
    fitting = [
        (len(room), number)
        for number, floor in enumerate(FLOORS)
        for room in floor
        if name == room or name.startswith(room + ".")
    ]
    return max(fitting)[1] if fitting else None


def room_of(name: str) -> str:
    return max((room for floor in FLOORS for room in floor if name == room or name.startswith(room + ".")), key=len)


@EVERY_MODULE
def test_a_room_imports_only_from_rooms_below_it(path):
    name = dotted(path)
    if name in FACES:
        pytest.skip("a face names what the rooms inside offer")
    own = floor_of(name)
    assert own is not None, f"{name} is in no room of FLOORS"
    for other in sorted(imported(path)):
        if not other.startswith("mirl."):
            continue
        theirs = floor_of(other)
        assert theirs is not None, f"{name} imports {other}, which is in no room"
        assert theirs > own or room_of(other) == room_of(name), f"{name} imports {other} from a room above or beside it"


@EVERY_MODULE
def test_nothing_is_imported_by_the_names_of_the_folders(path):
    # In a checkout `engine`, `kernels` and `dataloaders` are found without `mirl` too, and would be loaded twice.
    tops = {name.split(".")[0] for name in imported(path)}
    assert not tops & {"engine", "kernels", "dataloaders", "benchmarks", "tests"}


@EVERY_MODULE
def test_one_module_alone_imports_each_heavy_library(path):
    tops = {name.split(".")[0] for name in imported(path)}
    for library, homes in ONLY_IN.items():
        assert library not in tops or str(path.relative_to(CHECKOUT)) in homes, f"{library} belongs in {homes}"


@EVERY_MODULE
def test_no_module_shadows_a_standard_one(path):
    # `deepspeed engine/pretrain.py` would otherwise find ours first.
    assert path.stem not in sys.stdlib_module_names


def test_the_wheel_has_one_top_level_package_with_every_room_in_it():
    build = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert {path.split("/")[0] for path in build["sources"].values()} == {"mirl"}
    assert set(build["sources"]) == {"engine", "kernels", "dataloaders", "ds_configs"}
    assert all((path.parent / "__init__.py").is_file() for path in MODULES)


def test_every_room_says_what_it_is_for():
    for init in (path for path in MODULES if path.name == "__init__.py"):
        assert ast.get_docstring(ast.parse(init.read_text())), f"{init} has no docstring"
