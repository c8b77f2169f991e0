"""Numbers of all settings are numbers, and seeds of any size work."""

from __future__ import annotations

import dataclasses
import typing

import numpy as np
import pytest
import torch

from mirl.engine.commands.probe import main as probe
from mirl.engine.configuration.config import is_offered
from mirl.engine.configuration.flags import CommandLine, parse
from mirl.engine.configuration.overrides import override_by_keyword
from mirl.engine.models import model_config
from mirl.engine.pretraining.command_line import PRETRAIN
from mirl.engine.training.noise import mask_noise, seed_stochastic_depth
from mirl.engine.transfer.classification.command_line import FINETUNE
from mirl.engine.transfer.segmentation.command_line import SEGMENT
from mirl.errors import UserError
from mirl.keyed import fold_seed, keyed_u64
from mirl.settings import Section

NO_NUMBERS = ("nan", "inf", "-inf", "1e39", "-1e400")


def float_fields(command: CommandLine) -> list[tuple[str, int]]:
    """(name, how many numbers its flag takes) of every float setting of a kind of run."""
    found = []
    for section, kind in command.kind.sections().items():
        for item in dataclasses.fields(kind):
            hint = typing.get_type_hints(kind)[item.name]
            parts = typing.get_args(hint) if typing.get_origin(hint) is tuple else (hint,)
            if float in parts and is_offered(item, section, command.kind.sections()):
                found.append((item.name, 3 if Ellipsis in parts else len(parts)))
    return found


EVERY_FLOAT = [
    pytest.param(command, name, count, id=f"{command.kind.__name__}-{name}")
    for command in (PRETRAIN, FINETUNE, SEGMENT)
    for name, count in float_fields(command)
]


def test_every_section_is_one_whose_numbers_are_checked():
    kinds = {kind for command in (PRETRAIN, FINETUNE, SEGMENT) for kind in command.kind.sections().values()}
    assert len(kinds) == 7 and all(issubclass(kind, Section) for kind in kinds)
    assert len(EVERY_FLOAT) > 35
    with pytest.raises(TypeError, match="Leaky has a __post_init__"):
        type("Leaky", (Section,), {"__post_init__": lambda self: None})


@pytest.mark.parametrize("text", NO_NUMBERS)
@pytest.mark.parametrize(("command", "name", "count"), EVERY_FLOAT)
def test_what_is_no_number_is_refused_by_its_flag(command, name, count, text):
    flag = "--" + name.replace("_", "-")
    values = ["0.5"] * (count - 1) + [text]
    with pytest.raises(UserError, match=f"^{name} is .*(nan|inf|1e.39).*: give {flag} finite numbers") as caught:
        parse(command, [flag + "=" + text] if count == 1 else [flag, *(value.replace("-", "") for value in values)])
    assert "\n" not in str(caught.value)
    base = command.recipes[command.default]()
    with pytest.raises(UserError, match=f"^{name} is .*: give {flag} finite numbers"):
        override_by_keyword(base, {name: float(text) if count == 1 else tuple(map(float, values))})


@pytest.mark.parametrize(("command", "name", "count"), EVERY_FLOAT)
def test_a_configuration_made_without_a_command_line_is_checked_too(command, name, count):
    """config.json of a run, or a section made in Python."""
    values = command.recipes[command.default]().to_dict()
    section = next(section for section, kind in command.kind.sections().items() if name in values[section])
    values[section][name] = float("nan") if count == 1 else [0.5] * (count - 1) + [float("inf")]
    with pytest.raises(UserError, match=f"^{name} is "):
        command.kind.from_dict(values, source="config.json")


def test_other_commands_and_whole_numbers():
    with pytest.raises(UserError, match="^knn_temperature is nan: give --knn-temperature finite numbers"):
        probe(["run", "--data", "a", "--val", "b", "--knn-temperature", "nan"])
    with pytest.raises(UserError, match="^steps has 401 digits: give --steps at most 9223372036854775807"):
        parse(PRETRAIN, ["--steps", str(10**400)])
    with pytest.raises(UserError, match="the learning rate would be"):
        parse(PRETRAIN, ["--lr", "0", "--base-lr", "1e38", "--batch-size", "1000000"])
    with pytest.raises(UserError, match="^std is "):
        model_config("vit_b", std=(1.0, float("nan"), 1.0))


SEEDS = (-1, -(2**63), 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 1, 2**64, 2**64 + 1, 20261125034500123456789, -(10**40))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_seed_of_any_size_works_wherever_a_seed_does(seed):
    config = parse(PRETRAIN, [f"--seed={seed}"])
    assert config == override_by_keyword(PRETRAIN.recipes[PRETRAIN.default](), {"seed": seed})
    assert config == type(config).from_dict(config.to_dict(), source="its own")
    torch.manual_seed(config.run.seed)
    seed_stochastic_depth(config.run.seed, 1, 2)
    assert torch.equal(mask_noise(config.run.seed, 3, 0, 2, 9), mask_noise(seed, 3, 0, 2, 9))
    mask_noise(config.run.seed + 1, 0, 0, 2, 9)  # the pictures' masks
    assert np.array_equal(keyed_u64(1, config.run.seed, 5), keyed_u64(1, seed, 5))


def test_seeds_of_64_bits_are_what_they_were_and_others_differ_from_each_other():
    assert [fold_seed(seed) for seed in (0, 7, -1, 2**63 - 1, -(2**63))] == [0, 7, -1, 2**63 - 1, -(2**63)]
    folded = [fold_seed(seed) for seed in SEEDS] + [0, 1, fold_seed(10**40)]
    assert len(set(folded)) == len(folded)
    assert all(-(2**63) <= seed < 2**63 for seed in folded)
    # Fixed for ever, as a resumed run depends on it.
    assert fold_seed(2**64) == 0x12F957A0F5B2B451
    rows = {tuple(mask_noise(seed, 0, 0, 1, 16).flatten().tolist()) for seed in (2**63, 2**63 + 1, 2**64, 0)}
    assert len(rows) == 4
