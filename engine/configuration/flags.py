"""The command line of a configuration: one flag a field, grouped by section, made from the dataclasses themselves."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from mirl.engine.configuration.config import Config, is_offered
from mirl.engine.configuration.config_file import config_of_file
from mirl.engine.configuration.help_lines import describe_recipe, nearest, shown_default, usage
from mirl.engine.configuration.overrides import override
from mirl.engine.models import MODEL_NAMES
from mirl.errors import UserError
from mirl.keyed import fold_seed
from mirl.settings import require_finite

TITLES = {
    "model": "model (section 3 and Table 1 of the paper)",
    "finetune": "classifier and augmentation",
    "segment": "segmenter, label images, augmentation and evaluation",
    "detect": "detector, annotations and evaluation",
    "data": "data",
    "optim": "optimiser and length",
    "run": "run",
    "log": "log and pictures",
}


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """A kind of run as its entry point offers it: the configuration, its named defaults, and the help text.

    default, default_with_data: the recipe where none is named, with the demo's data and with data of one's own.
    command, module: how it is started, by `mirl` or as a module. arguments: of the usage line. sizes: what each recipe
    is meant for and needs, by name. texts: help of single flags, by SECTION.FIELD, where that of the common section
    speaks of another kind of run.
    """

    kind: type[Config]
    recipes: Mapping[str, Callable[[], Config]]
    default: str
    command: str
    module: str
    arguments: str
    description: str
    sizes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    texts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    default_with_data: str | None = None

    def default_of(self, *, data_given: bool) -> str:
        """The recipe of a run that names none."""
        return self.default_with_data if data_given and self.default_with_data else self.default


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Lines of up to 120 columns; a description keeps its lines."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=120)


class BracketedDefaults(HelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Defaults in the brackets that a run's help has them in; none where there is none, or the text says it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = (action.help or "").replace("%(default)s", shown_default(action.default))
        plain = (
            action.default in (None, argparse.SUPPRESS)
            or not action.option_strings
            or text.endswith("]")
            or "none:" in text
        )
        return text if plain else f"{text} [{shown_default(action.default)}]".replace("%", "%%")


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

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """As argparse's, with the nearest choice named."""
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            text = f"invalid choice: {value!r} ({nearest(str(value), choices)}choose from {', '.join(choices)})"
            raise argparse.ArgumentError(action, text)


def parse(command: CommandLine, argv: Sequence[str]) -> Any:
    """The configuration that ``argv`` asks for: a recipe with single fields overridden.

    Raises:
        UserError: an unknown flag (with the nearest known one), a value that does not fit, a configuration that cannot
        be.
    """
    tokens = [_dashed(token) for token in argv]
    recipe, file, data_given = _base_in(command, tokens)
    parser = build_parser(command, recipe or command.default_of(data_given=data_given))
    known, unknown = parser.parse_known_args(tokens)
    if unknown:
        _refuse_unknown(parser, unknown)
    if file is not None:
        base = config_of_file(
            file, command.recipes, lambda in_file: command.default_of(data_given=data_given or in_file), recipe
        )
    else:
        name = recipe or command.default_of(data_given=data_given)
        base = dataclasses.replace(command.recipes[name](), recipe=name)
    return override(base, {key: value for key, value in vars(known).items() if value is not _ABSENT})


_ABSENT = object()


def _base_in(command: CommandLine, tokens: Sequence[str]) -> tuple[str | None, Path | None, bool]:
    """The recipe and the configuration file that ``tokens`` name, wherever they stand among them, and whether data."""
    parser = Parser(add_help=False, allow_abbrev=False)
    _add_base(parser, command, absent=None)
    parser.add_argument("--data", nargs="*")
    known = parser.parse_known_args([token for token in tokens if token not in ("-h", "--help")])[0]
    return known.recipe, known.config, bool(known.data)


def _add_base(parser: Parser, command: CommandLine, *, absent: Any) -> None:
    parser.add_argument(
        "--recipe",
        default=absent,
        choices=list(command.recipes),
        metavar="NAME",
        help=f"where the defaults come from: {', '.join(command.recipes)} [{command.default}"
        + (f"; with --data {command.default_with_data}]" if command.default_with_data else "]"),
    )
    parser.add_argument(
        "--config",
        default=absent,
        type=Path,
        metavar="FILE",
        help="settings that take the place of the recipe's: config.json of a run, or a .yaml, .toml or .json file; "
        "flags go before them (docs/recipes.md) [none]",
    )


def build_parser(command: CommandLine, recipe: str | None = None) -> Parser:
    """The parser of `parse`, whose values stay absent where no flag was given; its help shows those of ``recipe``."""
    recipe = recipe or command.default
    parser = Parser(
        prog=f"mirl {command.command}",
        usage=usage(command.command, command.module, command.arguments),
        allow_abbrev=False,
        description=f"{command.description}\n\n{describe_recipe(recipe, command.recipes[recipe], command.sizes)}",
        epilog="A flag that is not given keeps the recipe's value. Values in brackets are those of recipe "
        f"{recipe};\n--recipe NAME --help shows those of another.",
        formatter_class=HelpFormatter,
    )
    _add_base(parser, command, absent=_ABSENT)
    shown = command.recipes[recipe]()
    sections = command.kind.sections()
    for section, kind in sections.items():
        group = parser.add_argument_group(TITLES[section])
        hints = typing.get_type_hints(kind)
        values = getattr(shown, section)
        for item in dataclasses.fields(kind):
            if not is_offered(item, section, sections):
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
                text = command.texts.get(f"{section}.{item.name}", item.metadata["help"])
                _add_flag(group, section, item, text, hints[item.name], getattr(values, item.name))
    launcher = parser.add_argument_group("given by launchers, ignored")
    launcher.add_argument("--local-rank", dest="launcher.local_rank", default=_ABSENT, help=argparse.SUPPRESS)
    launcher.add_argument(
        "--deepspeed", dest="launcher.deepspeed", action="store_true", default=_ABSENT, help=argparse.SUPPRESS
    )
    return parser


def _add_flag(group: Any, section: str, item: dataclasses.Field, text: str, hint: Any, default: Any) -> None:
    flag = "--model" if (section, item.name) == ("model", "name") else "--" + item.name.replace("_", "-")
    text = text.replace("%", "%%")
    if flag == "--model":
        text = f"all fields of a model of the paper: {', '.join(MODEL_NAMES)}; the flags below change single ones"
    options: dict[str, Any] = {"dest": f"{section}.{item.name}", "default": _ABSENT}
    shown = item.metadata["unset"] if default is None and "unset" in item.metadata else shown_default(default)
    shown = item.metadata.get("absent", shown) if default == 0 else shown
    options["help"] = f"{text} [{shown}]"
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
    element = _element(kind)
    group.add_argument(flag, type=number_or(item.metadata["word"]) if "word" in item.metadata else element, **options)


def number_or(word: str) -> Callable[[str], int | str]:
    """What reads a positive number, or ``word``."""

    def read(text: str) -> int | str:
        if text == word:
            return word
        if not text.isdecimal() or not int(text):
            raise argparse.ArgumentTypeError(f"it is {text!r}: give {word} or a positive number, or leave it out")
        return int(text)

    return read


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
