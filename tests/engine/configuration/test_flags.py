"""The command line: recipes, overrides, and one clear line for every mistake."""

from __future__ import annotations

import dataclasses
import json

import pytest

from mirl.engine.configuration.config import PretrainConfig
from mirl.engine.configuration.flags import build_parser
from mirl.engine.pretraining.command_line import PRETRAIN, parse_pretrain
from mirl.engine.pretraining.recipes import RECIPES, recipe


def test_no_flags_give_the_demo_recipe():
    assert parse_pretrain([]) == recipe("demo")


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_survives_its_json(name):
    config = recipe(name)
    assert config.recipe == name
    assert PretrainConfig.from_dict(json.loads(config.to_json()), source="test") == config


def test_every_field_has_a_flag():
    options = {option for action in build_parser(PRETRAIN)._actions for option in action.option_strings}
    special = {"name": "--model", "image_height": "--image-size", "image_width": "--image-size"}
    for kind in PretrainConfig.sections().values():
        for item in dataclasses.fields(kind):
            assert special.get(item.name, "--" + item.name.replace("_", "-")) in options


def test_launcher_flags_and_underscores_are_accepted():
    config = parse_pretrain(["--local_rank=3", "--deepspeed_config", "ds_configs/zero1.json", "--deepspeed"])
    assert config.run.deepspeed_config == "ds_configs/zero1.json"


def test_single_fields_are_overridden():
    config = parse_pretrain(
        [
            "--recipe",
            "vit_b_48_300",
            "--segments",
            "4",
            "--no-did",
            "--image-size",
            "192x256",
            "--data",
            "a",
            "b",
            "--betas",
            "0.9",
            "0.99",
        ]
    )
    assert (config.model.depth, config.model.segments, config.model.did) == (48, 4, False)
    assert (config.model.image_height, config.model.image_width) == (192, 256)
    assert config.data.data == ("a", "b")
    assert config.optim.betas == (0.9, 0.99)


def test_model_takes_the_whole_row_of_the_table():
    config = parse_pretrain(["--model", "vit_s_54", "--decoder-depth", "1"])
    assert (config.model.depth, config.model.width, config.model.segments, config.model.decoder_depth) == (
        54,
        384,
        6,
        1,
    )
    assert config.model.image_height == 224


def test_a_length_in_one_unit_replaces_the_other():
    config = parse_pretrain(["--epochs", "100"])
    assert (config.optim.epochs, config.optim.steps) == (100, 0)
    short = parse_pretrain(["--steps", "20"])
    assert (short.optim.steps, short.optim.warmup_steps) == (20, 2)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--epochz", "3"], "unknown flag --epochz: did you mean --epochs?"),
        (["stray"], "unknown argument stray"),
        (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["--steps", "-1"], "steps is -1"),
        (["--recipe", "nope"], "argument --recipe: invalid choice: 'nope'"),
        (["--model", "vit_z"], "argument --model: invalid choice: 'vit_z'"),
        (["--image-size", "225", "--patch-size", "16"], "image_height is 225 and patch_size is 16"),
        (["--image-size", "2x2x2"], "no image size"),
        (["--segments", "3"], "segments is 3: decoders work in pairs, give 1 or an even number"),
        (["--crop-scale", "0.9", "0.2"], "crop_scale is"),
        (["--mask-ratio", "1.5"], "mask_ratio is 1.5"),
        (["--resume", "auto", "--init-from", "x"], "resume and init_from are both given"),
        (["--activation-checkpointing", "some"], "activation_checkpointing is 'some'"),
        (["--steps", "10", "--epochs", "3"], "give exactly one of them"),
    ],
)
def test_mistakes_are_one_clear_line(argv, message):
    with pytest.raises(ValueError) as caught:
        parse_pretrain(argv)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_help_is_grouped_and_names_defaults(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_pretrain(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for part in (
        "model (section 3",
        "optimiser and length:",
        "log and pictures:",
        "--deepspeed-config FILE",
        "[zero2]",
    ):
        assert part in text
