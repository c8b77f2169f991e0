"""The command line: recipes, overrides, and one clear line for every mistake."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import subprocess
import sys

import pytest

from mirl.engine.cli import dispatch
from mirl.engine.configuration.config import PretrainConfig, is_offered
from mirl.engine.configuration.flags import CommandLine, build_parser, parse
from mirl.engine.distributed.ds_config import read_ds_config
from mirl.engine.models import model_config
from mirl.engine.pretraining.command_line import PRETRAIN, parse_pretrain
from mirl.engine.pretraining.recipes import RECIPES, recipe
from mirl.engine.transfer.classification.command_line import FINETUNE
from mirl.engine.transfer.detection.command_line import DETECT
from mirl.engine.transfer.segmentation.command_line import SEGMENT
from tests.support.launch import CHECKOUT, launch_environment


@pytest.mark.parametrize(
    ("argv", "name"),
    [([], "demo"), (["--steps", "9"], "demo"), (["--recipe", "demo", "--data", "x"], "demo"), (["--data", "x"], "tiny"),
     (["--data=x"], "tiny"), (["--data", "x", "y", "--recipe", "small_data"], "small_data")],
)  # fmt: skip
def test_without_a_name_the_recipe_is_the_demo_or_that_of_small_runs_on_given_data(argv, name):
    assert parse_pretrain(argv).recipe == name


def test_images_of_ones_own_are_mirrored_and_cropped_and_the_demo_learns_its_own_by_heart():
    demo, tiny = recipe("demo"), recipe("tiny")
    assert demo.model == tiny.model and not demo.data.flip and tiny.data.flip
    assert demo.data.crop_scale[0] > tiny.data.crop_scale[0]


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_survives_its_json(name):
    config = recipe(name)
    assert config.recipe == name
    assert PretrainConfig.from_dict(json.loads(config.to_json()), source="test") == config


def test_every_field_has_a_flag():
    options = {option for action in build_parser(PRETRAIN)._actions for option in action.option_strings}
    special = {"name": "--model", "image_height": "--image-size", "image_width": "--image-size"}
    for section, kind in PretrainConfig.sections().items():
        for item in dataclasses.fields(kind):
            if not is_offered(item, section, PretrainConfig.sections()):
                assert item.name == "step_at", "a setting that no kind of run offers"
                continue
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


def test_a_base_learning_rate_replaces_the_rate_itself_of_a_recipe():
    assert parse(PRETRAIN, ["--recipe", "tiny"]).optim.peak_lr == 0.002
    assert parse(PRETRAIN, ["--recipe", "tiny", "--base-lr", "8e-3"]).optim.peak_lr == pytest.approx(0.001)
    assert parse(FINETUNE, ["--base-lr", "8e-3", "--batch-size", "64"]).optim.peak_lr == pytest.approx(0.002)
    assert parse(FINETUNE, ["--base-lr", "8e-3", "--lr", "0.003"]).optim.peak_lr == 0.003


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--epochz", "3"], "unknown flag --epochz: did you mean --epochs?"),
        (["stray"], "unknown argument stray"),
        (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["--steps", "-1"], "steps is -1"),
        (["--recipe", "nope"], "argument --recipe: invalid choice: 'nope' (choose from demo, tiny, small_data"),
        (["--recipe", "smalldata"], "invalid choice: 'smalldata' (did you mean 'small_data'? choose from demo"),
        (["--model", "vit_z"], "argument --model: invalid choice: 'vit_z' (did you mean 'vit_"),
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


def help_of(command: CommandLine, argv: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as caught:
        parse(command, argv)
    assert caught.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "command", [PRETRAIN, FINETUNE, SEGMENT, DETECT], ids=["pretrain", "finetune", "segment", "detect"]
)
def test_help_shows_the_values_of_the_recipe_wherever_it_stands(command, capsys):
    for name, make in command.recipes.items():
        config = make()
        texts = {
            help_of(command, argv, capsys)
            for argv in (["--recipe", name, "--help"], ["--help", f"--recipe={name}"], ["-h", "--recipe", name])
        }
        assert len(texts) == 1
        (text,) = texts
        flat = " ".join(text.split())
        assert f"over all ranks [{config.optim.batch_size}]" in flat
        assert f"[{config.run.out}]" in flat
        assert f"Recipe {name}: " in flat and f"Size: {command.sizes[name]}" in flat


def test_defaults_of_the_help_have_one_style(capsys):
    text = "".join(help_of(command, ["--help"], capsys) for command in (PRETRAIN, FINETUNE, SEGMENT))
    for wrong in ("[]", "[None]", "[()]", "[True]", "[False]", "default:"):
        assert wrong not in text


def test_the_help_of_finetuning_speaks_of_finetuning(capsys):
    text = " ".join(help_of(FINETUNE, ["--help"], capsys).split())
    for wrong in ("demo photographs", "pictures, checkpoints", "masks"):
        assert wrong not in text
    known = {
        f"{section}.{item.name}"
        for section, kind in FINETUNE.kind.sections().items()
        for item in dataclasses.fields(kind)
    }
    assert set(FINETUNE.texts) <= known


def test_the_help_of_segmentation_speaks_of_segmentation(capsys):
    text = " ".join(help_of(SEGMENT, ["--help"], capsys).split())
    for wrong in ("demo photographs", "masks", "--crop-scale", "--centre-crops", "--index-dir"):
        assert wrong not in text
    assert "--picture-every" in text and "poly" in text
    known = {
        f"{section}.{item.name}"
        for section, kind in SEGMENT.kind.sections().items()
        for item in dataclasses.fields(kind)
    }
    assert set(SEGMENT.texts) <= known


def test_the_usage_line_is_one_that_works_where_it_is_typed(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/mirl", "pretrain"])
    monkeypatch.setattr(shutil, "which", lambda name: f"/somewhere/{name}")
    assert help_of(PRETRAIN, ["--help"], capsys).startswith("usage: mirl pretrain [--recipe NAME]")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    text = help_of(PRETRAIN, ["--help"], capsys)
    assert text.startswith("usage: python -m mirl.engine.pretrain [--recipe NAME]")
    assert "deepspeed --module mirl.engine.pretrain --deepspeed_config zero2" in text
    for command in (PRETRAIN, FINETUNE, SEGMENT):
        assert importlib.util.find_spec(command.module) is not None
    assert read_ds_config("zero2")
    monkeypatch.chdir(CHECKOUT)
    monkeypatch.setattr(sys, "argv", ["engine/pretrain.py"])
    assert "deepspeed engine/pretrain.py --deepspeed_config zero2" in help_of(PRETRAIN, ["--help"], capsys)


def test_help_of_any_recipe_waits_for_no_torch():
    code = (
        "import sys\nfrom mirl.engine.cli import dispatch\n"
        "try:\n    dispatch([sys.argv[1], '--help', '--recipe', 'small_data'])\n"
        "except SystemExit:\n    sys.exit('torch' in sys.modules)\nsys.exit(2)"
    )
    for name in ("pretrain", "finetune", "segment"):
        done = subprocess.run([sys.executable, "-c", code, name], cwd=CHECKOUT, env=launch_environment(), check=False)
        assert done.returncode == 0


def test_a_misspelt_command_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="unknown command 'finetun': did you mean 'finetune'"):
        dispatch(["finetun"])
    with pytest.raises(ValueError, match="recipe is 'smal_data': did you mean 'small_data'"):
        recipe("smal_data")


def test_a_changed_model_is_called_custom():
    assert recipe("small_data").model.label == "vit_s"
    assert recipe("small_data", depth=4).model.label == "custom (vit_s, depth 12 -> 4)"
    small = recipe("small_data", depth=4, width=128, heads=4, image_size=56, patch_size=7).model
    assert small.label == "custom (vit_s, depth 12 -> 4, width 384 -> 128, 2 more)" and small.name == "vit_s"
    assert recipe("demo").model.label == "demo" and recipe("demo", depth=4).model.label == "custom"
    assert recipe("demo", image_size=32, mask_ratio=0.5).model.label == "demo"
    assert recipe("small_data", objective="mae").model.label == "vit_s"  # one decoder of its own is no other size
    assert model_config("vit_s_54", variant="release").label == "vit_s_54"
    assert model_config("vit_s_54", variant="release", width=192).decoder_depth == 1
