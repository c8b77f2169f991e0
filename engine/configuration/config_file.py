"""`--config FILE`: a run's own config.json, or some settings as JSON, YAML or TOML.

A file of settings names them as the flags do, with underscores, at the top or below their section (`model:`, `optim:`
...). `recipe` names where the rest comes from. Values have the types of the settings: YAML's `on` and `1e-3`, which it
reads as True and as text, mean what a flag would.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from mirl.engine.configuration.config import Config
from mirl.engine.configuration.help_lines import nearest
from mirl.engine.configuration.overrides import by_section, override
from mirl.errors import UserError

C = TypeVar("C", bound=Config)
SUFFIXES = (".json", ".yaml", ".yml", ".toml")
_OF_EVERY_RUN = ("data", "optim", "run", "log")
# What another start decides for itself, where it takes the configuration of a run.
_OF_A_START = {"resume": "", "change": ()}


def config_of_file(
    path: Path, recipes: Mapping[str, Callable[[], C]], default: Callable[[bool], str], recipe: str | None
) -> C:
    """The configuration that ``path`` describes.

    default: the recipe where none is named, by whether the file names data.
    recipe: the one of the command line, which is preferred to that of a file of settings; None: none was given.

    Raises:
        UserError: no such file, no such setting, a value of another type, or the configuration of another kind of run.
    """
    values = _read(path)
    kind = type(recipes[default(False)]())
    if path.suffix == ".json" and all(isinstance(values.get(name), dict) for name in _OF_EVERY_RUN):
        return _of_a_run(values, kind, path, recipe)
    named = values.pop("recipe", None)
    data = values.get("data")
    chosen = recipe or named or default(bool(data.get("data") if isinstance(data, dict) else data))
    if chosen not in recipes:
        raise UserError(
            f"recipe is {chosen!r} in {path}: {nearest(str(chosen), recipes)}choose from {', '.join(recipes)}"
        )
    base = recipes[chosen]()
    given = _typed(by_section(base, _flat(values, base)), base, path)
    return override(dataclasses.replace(base, recipe=chosen), given)


def _of_a_run(values: dict[str, Any], kind: type[C], path: Path, recipe: str | None) -> C:
    """The whole configuration that a run wrote."""
    others = sorted(set(values) - {item.name for item in dataclasses.fields(kind)})
    missing = sorted(set(kind.sections()) - set(values))
    if others or missing:
        said = f"it has a section {others[0]!r}" if others else f"it lacks the section {missing[0]!r}"
        raise UserError(f"{path} is the configuration of another kind of run ({said}): give it to that command")
    if recipe is not None:
        raise UserError(f"recipe is {recipe!r} and {path} is the whole configuration of a run: leave --recipe out")
    config = kind.from_dict(values, source=str(path))
    return dataclasses.replace(config, run=dataclasses.replace(config.run, **_OF_A_START))


def _read(path: Path) -> dict[str, Any]:
    if path.suffix not in SUFFIXES:
        raise UserError(f"config is {path}: give a file that ends with {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config is {path}, which cannot be read: {error}") from error
    try:
        values = _parsed(text, path.suffix)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"config is {path}, which is no {path.suffix[1:].upper()}: {reason}") from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise UserError(f"config is {path}: give names with values, such as steps and 1000")
    return values


def _parsed(text: str, suffix: str) -> Any:
    """ValueError where ``text`` is not in the format of ``suffix``."""
    if suffix == ".json":
        return json.loads(text)
    if suffix == ".toml":
        import tomllib

        return tomllib.loads(text)
    import yaml

    try:
        return yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _flat(values: dict[str, Any], base: Config) -> dict[str, Any]:
    """Settings below their section taken out of it."""
    flat: dict[str, Any] = {}
    sections = base.sections()
    for name, value in values.items():
        inner = value.items() if name in sections and isinstance(value, dict) else [(name, value)]
        for key, item in inner:
            key = "model" if (name, key) == ("model", "name") else key
            if key in flat:
                raise UserError(f"{key} is given twice in the configuration file: keep one")
            flat[key] = item
    return flat


def _typed(given: Mapping[str, Any], base: Config, path: Path) -> dict[str, Any]:
    """Values of the types that the fields have."""
    typed = {}
    for key, value in given.items():
        section, _, name = key.partition(".")
        kind = base.sections()[section]
        if name == "image_size":
            typed[key] = tuple(_convert(side, int, (), name, path) for side in value)
            continue
        item = next(item for item in dataclasses.fields(kind) if item.name == name)
        if value == item.metadata.get("word", ...):
            typed[key] = value
            continue
        typed[key] = _convert(value, typing.get_type_hints(kind)[name], item.metadata.get("choices") or (), name, path)
    return typed


def _convert(value: Any, hint: Any, choices: tuple[Any, ...], name: str, path: Path) -> Any:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        if value is None:
            return None
        hint = next(part for part in typing.get_args(hint) if part is not types.NoneType)
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)[0]
        return tuple(
            _convert(item, inner, (), name, path) for item in (value if isinstance(value, list | tuple) else [value])
        )
    if typing.get_origin(hint) is typing.Literal:
        return value
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and (isinstance(value, int) or (number and value == int(value))) and not isinstance(value, bool):
        return int(value)
    if hint is float and (number or isinstance(value, str)):
        try:
            return float(value)
        except ValueError:
            pass
    if hint is str:
        if isinstance(value, bool) and {"on", "off"} <= set(choices):
            return "on" if value else "off"
        if isinstance(value, str) or number:
            return str(value)
    wanted = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}.get(hint, str(hint))
    raise UserError(f"{name} is {value!r} in {path}: give {wanted}")
