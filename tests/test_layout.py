"""The rules that keep the parts apart."""

from __future__ import annotations

import ast
import sys
import tomllib
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
PACKAGES = ("engine", "kernels", "dataloaders")
MODULES = sorted(path for package in PACKAGES for path in (CHECKOUT / package).rglob("*.py"))
ONLY_IN = {
    "deepspeed": "engine/distributed/ds_engine.py",
    "nvidia": "dataloaders/decoding/dali_pipeline.py",
    "xformers": "kernels/attention.py",
}


def imported(path: Path) -> set[str]:
    """Dotted names of every module that ``path`` imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
    return {name.removeprefix("mirl.") for name in names}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(CHECKOUT)))
def test_imports_go_one_way(path):
    tops = {name.split(".")[0] for name in imported(path)}
    package = path.relative_to(CHECKOUT).parts[0]
    allowed = set(PACKAGES) if package == "engine" else {package}
    assert tops & (set(PACKAGES) | {"benchmarks", "tests"}) <= allowed
    for library, home in ONLY_IN.items():
        assert library not in tops or str(path.relative_to(CHECKOUT)) == home, f"{library} belongs in {home}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(CHECKOUT)))
def test_no_module_shadows_a_standard_one(path):
    # `deepspeed engine/pretrain.py` would otherwise find ours first.
    assert path.stem not in sys.stdlib_module_names


def test_every_package_is_in_the_wheel():
    build = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert set(build["sources"]) == {*PACKAGES, "ds_configs"}
    assert all((path.parent / "__init__.py").is_file() for path in MODULES)
