"""The command line of a configuration: one flag a field, grouped by section, made from the dataclasses themselves."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from mirl.engine.configuration.config import Config
from mirl.engine.configuration.overrides import override
from mirl.engine.models import MODEL_NAMES
from mirl.errors import UserError
from mirl.keyed import fold_seed
from mirl.settings import require_finite

TITLES = {
    "model": "model (section 3 and Table 1 of the paper)",
    "finetune": "classifier and augmentation",
    "data": "data",
    "optim": "optimiser and length",
    "run": "run",
    "log": "log and pictures",
}


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """A kind of run as its entry point offers it: the configuration, its named defaults, and the help text."""

    kind: type[Config]
    recipes: Mapping[str, Callable[[], Config]]
    default: str
    prog: str
    usage: str
    description: str


class Parser(argparse.ArgumentParser):
    """argparse with errors as one line that names the mend. Numbers are finite, whatever the command."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, on which its ``parse_args`` is built."""
        known, unknown = super().parse_known_args(args, namespace)
        for name, value in vars(known).items():
            require_finite(name.split(".")[-1], value)
        return known, unknown

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists every flag")


def parse(command: CommandLine, argv: Sequence[str]) -> Any:
    """The configuration that ``argv`` asks for: a recipe with single fields overridden.

    Raises:
        UserError: an unknown flag (with the nearest known one), a value that does not fit, a configuration that cannot
        be.
    """
    parser = build_parser(command)
    known, unknown = parser.parse_known_args([_dashed(token) for token in argv])
    if unknown:
        _refuse_unknown(parser, unknown)
    base = command.recipes[known.recipe]()
    given = {key: value for key, value in vars(known).items() if value is not _ABSENT}
    return override(dataclasses.replace(base, recipe=known.recipe), given)


_ABSENT = object()


def build_parser(command: CommandLine) -> Parser:
    """The parser of `parse`, whose values stay absent where no flag was given."""
    parser = Parser(
        prog=command.prog,
        usage=command.usage,
        allow_abbrev=False,
        description=command.description,
        epilog="A flag that is not given keeps the recipe's value. Values in brackets are those of the "
        f"{command.default} recipe.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=120),
    )
    parser.add_argument(
        "--recipe",
        default=command.default,
        choices=sorted(command.recipes),
        metavar="NAME",
        help=f"where the defaults come from: {', '.join(command.recipes)} [{command.default}]",
    )
    shown = command.recipes[command.default]()
    sections = command.kind.sections()
    for section, kind in sections.items():
        group = parser.add_argument_group(TITLES[section])
        hints = typing.get_type_hints(kind)
        values = getattr(shown, section)
        for item in dataclasses.fields(kind):
            if item.metadata.get("of", section) not in sections:
                continue
            if item.name == "image_height":
                side = f"{values.image_height}x{values.image_width}" if values.image_height else "of pre-training"
                group.add_argument(
                    "--image-size",
                    dest=f"{section}.image_size",
                    default=_ABSENT,
                    type=image_size,
                    metavar="SIDE|HxW",
                    help=f"image size in pixels [{side}]",
                )
            elif item.name != "image_width":
                _add_flag(group, section, item, hints[item.name], getattr(values, item.name))
    launcher = parser.add_argument_group("given by launchers, ignored")
    launcher.add_argument("--local-rank", dest="launcher.local_rank", default=_ABSENT, help=argparse.SUPPRESS)
    launcher.add_argument(
        "--deepspeed", dest="launcher.deepspeed", action="store_true", default=_ABSENT, help=argparse.SUPPRESS
    )
    return parser


def _add_flag(group: Any, section: str, item: dataclasses.Field, hint: Any, default: Any) -> None:
    flag = "--model" if (section, item.name) == ("model", "name") else "--" + item.name.replace("_", "-")
    shown = (
        " ".join(f"{part:g}" if isinstance(part, float) else str(part) for part in default)
        if isinstance(default, tuple)
        else default
    )
    if shown is None:
        shown = item.metadata.get("unset")
    text = item.metadata["help"].replace("%", "%%")
    if flag == "--model":
        text = f"all fields of a model of the paper: {', '.join(MODEL_NAMES)}; the flags below change single ones"
    options: dict[str, Any] = {"dest": f"{section}.{item.name}", "default": _ABSENT}
    options["help"] = f"{text} [{shown:g}]" if isinstance(shown, float) else f"{text} [{shown}]"
    kind = _plain(hint)
    if kind is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        return
    choices = item.metadata.get("choices") or _literal_choices(hint)
    if section == "model" and item.name == "name":
        choices = MODEL_NAMES
    if choices:
        options |= {"choices": choices, "metavar": "NAME" if item.name == "name" else "|".join(map(str, choices))}
    elif item.metadata.get("metavar"):
        options["metavar"] = item.metadata["metavar"]
    else:
        options["metavar"] = {int: "N", float: "X"}.get(_element(kind), item.name.upper())
    if typing.get_origin(kind) is tuple:
        arguments = typing.get_args(kind)
        options["nargs"] = "+" if Ellipsis in arguments else len(arguments)
    group.add_argument(flag, type=_element(kind), **options)


def _plain(hint: Any) -> Any:
    """``X`` of ``X | None``."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return next(part for part in typing.get_args(hint) if part is not type(None))
    return hint


def _element(kind: Any) -> Any:
    if typing.get_origin(kind) is tuple:
        return typing.get_args(kind)[0]
    return str if typing.get_origin(kind) is typing.Literal else kind


def _literal_choices(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()


def seed(text: str) -> int:
    """A whole number of any size, as one that fits into 64 bits."""
    return fold_seed(int(text))


def image_size(text: str) -> tuple[int, int]:
    """``(height, width)`` of "224" or "192x256"; argparse reports what it raises."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no image size: give one side (224) or height x width (192x256)")
    return int(parts[0]), int(parts[-1])


def _dashed(token: str) -> str:
    """``--deepspeed_config=x`` as ``--deepspeed-config=x``: DeepSpeed writes its flags with underscores."""
    if not token.startswith("--"):
        return token
    flag, equals, value = token.partition("=")
    return flag.replace("_", "-") + equals + value


def _refuse_unknown(parser: argparse.ArgumentParser, unknown: Sequence[str]) -> NoReturn:
    flag = unknown[0].split("=")[0]
    options = [option for action in parser._actions for option in action.option_strings]
    near = difflib.get_close_matches(flag, options, n=1)
    hint = f"did you mean {near[0]}?" if near else "--help lists every flag"
    raise UserError(f"unknown {'flag' if flag.startswith('-') else 'argument'} {flag}: {hint}")
