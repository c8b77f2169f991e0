"""What small_data leaves to the length of a run and the size of its images; flags win, the paper's are fixed."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from mirl.engine.configuration.flags import build_parser, parse
from mirl.engine.models.config import ModelConfig
from mirl.engine.training.resumed_settings import compare_settings, keep_settled
from mirl.engine.training.schedule import Durations
from mirl.engine.transfer.classification.command_line import FINETUNE
from mirl.engine.transfer.classification.config import RAND_AUGMENT
from mirl.engine.transfer.classification.rand_augment import RandAugment
from mirl.engine.transfer.classification.scaled import FULL, MILD, is_open, regularisation, settle, strength_of
from mirl.errors import UserError

FULL_VALUES = {"drop_path": 0.1, "rand_augment": RAND_AUGMENT, "random_erase": 0.25, "mixup": 0.8, "cutmix": 1.0}
FULL_VALUES |= {"label_smoothing": 0.1}
NONE = {"drop_path": 0.0, "rand_augment": "off", "random_erase": 0.0, "mixup": 0.0, "cutmix": 0.0}
NONE |= {"label_smoothing": 0.0}


def settled(*flags: object, images: int = 2712, side: int = 224):
    config = settle(parse(FINETUNE, [*map(str, flags)]), images=images, side=side)
    assert not is_open(config)
    return config


def values(config) -> dict:
    return dataclasses.asdict(regularisation(config.finetune))


def test_the_recipe_at_its_own_length_is_the_full_one():
    config = settled()
    assert values(config) == FULL_VALUES and config.data.crop_scale == pytest.approx((0.2, 1.0))


@pytest.mark.parametrize("length", [["--epochs", 2], ["--epochs", 6], ["--epochs", MILD], ["--steps", 127]])
def test_a_short_run_is_not_regularised(length):
    config = settled(*length)
    assert values(config) == NONE and config.data.crop_scale == pytest.approx((0.6, 1.0))


def test_steps_are_passes_over_the_images():
    by_epochs = settled("--epochs", 64)
    assert settled("--steps", 64 * 10, "--batch-size", 128, images=1280).finetune == by_epochs.finetune
    assert values(settled("--steps", 640, "--batch-size", 128, images=1280 * 64)) == NONE


def test_strength_rises_with_the_length_and_every_part_of_it_with_it():
    lengths = [1, MILD, 40, 60, 80, FULL, 300]
    assert [strength_of(epochs) for epochs in lengths] == pytest.approx([0, 0, 0.25, 0.5, 0.75, 1, 1])
    found = [values(settled("--epochs", epochs)) for epochs in lengths]
    for name in ("drop_path", "random_erase", "mixup", "cutmix", "label_smoothing"):
        rates = [value[name] for value in found]
        assert rates == pytest.approx([FULL_VALUES[name] * strength_of(epochs) for epochs in lengths])
    forms = [value["rand_augment"] for value in found]
    assert forms[3] == f"{RAND_AUGMENT}-p0.250" and forms[-1] == RAND_AUGMENT
    augment = RandAugment(forms[3], image_size=(32, 32), mean=(0.5,) * 3, seed=0, workers=0)
    assert {operator.prob for operator in augment._operation.ops} == {0.25}


@pytest.mark.parametrize(("side", "smallest"), [(224, 0.2), (56, (32 / 56) ** 2), (40, 0.6), (16, 0.6)])
def test_crops_of_small_images_keep_their_pixels(side, smallest):
    low, high = settled(side=side).data.crop_scale
    assert (low, high) == pytest.approx((smallest, 1.0))


def test_the_shorter_the_run_the_more_images_are_shown_as_in_evaluation():
    found = [settled("--epochs", epochs).data.centre_crops for epochs in (2, 6, 20, 40, 100)]
    assert found == pytest.approx([0.95, 0.85, 0.5, 0, 0])
    assert settled("--epochs", 2, "--centre-crops", 0.25).data.centre_crops == 0.25
    assert parse(FINETUNE, ["--recipe", "vit_b_48", "--epochs", "2"]).data.centre_crops == 0


def test_a_flag_wins_at_any_length():
    for epochs, (name, value) in itertools.product((2, 60, 100), (*FULL_VALUES.items(), *NONE.items())):
        config = settled("--epochs", epochs, "--" + name.replace("_", "-"), value)
        assert values(config)[name] == value
        others = {key: found for key, found in values(config).items() if key != name}
        assert others == {key: found for key, found in values(settled("--epochs", epochs)).items() if key != name}
    assert settled("--epochs", 2, "--crop-scale", 0.3, 0.9).data.crop_scale == (0.3, 0.9)


@pytest.mark.parametrize(("recipe", "drop_path"), [("vit_b_48", 0.0), ("vit_s_54", 0.1)])
def test_the_recipes_of_the_paper_are_fixed(recipe, drop_path):
    for length in ([], ["--epochs", "2"]):
        config = parse(FINETUNE, ["--recipe", recipe, *length])
        assert not is_open(config) and values(config) == FULL_VALUES | {"drop_path": drop_path}
        assert config.data.crop_scale == (0.08, 1.0) and config.finetune.head_init == "random"
        assert config.finetune.ema == 0.9999 and not config.optim.warmup_share


def steps(*flags: object) -> tuple[int, int]:
    config = parse(FINETUNE, [*map(str, flags)])
    found = Durations.resolve(config.optim, config.run, config.log, steps_per_epoch=21)
    return found.total_steps, found.warmup_steps


def test_the_warm_up_is_a_share_of_the_run_unless_it_is_given():
    assert steps() == (2100, 105)  # five epochs of a hundred
    assert steps("--epochs", 6) == (126, 6) and steps("--epochs", 20) == (420, 21) and steps("--steps", 40) == (40, 2)
    assert steps("--epochs", 6, "--warmup-epochs", 1) == (126, 21)
    assert steps("--epochs", 6, "--warmup-epochs", 0) == (126, 0) == steps("--epochs", 6, "--warmup-steps", 0)
    assert steps("--warmup-share", 0.5, "--epochs", 2) == (42, 21)
    assert steps("--recipe", "vit_b_48", "--warmup-share", 0.5) == (1260, 630)
    with pytest.raises(UserError, match="warmup_share is 1"):
        steps("--warmup-share", 1)


def test_help_calls_them_scaled():
    text = " ".join(build_parser(FINETUNE).format_help().split())
    assert text.count("[scaled]") == 8 and "[None]" not in text


class Saved:
    """What `compare_settings` reads of a checkpoint."""

    path = FINETUNE  # only printed

    def __init__(self, config) -> None:
        self.state = {"config": config.to_dict(), "steps_per_epoch": 21, "applied_steps": 100}


def test_a_resumed_run_goes_on_with_the_values_of_its_first_start():
    saved = Saved(dataclasses.replace(settled("--epochs", 60), model=ModelConfig(), source=ModelConfig()))
    longer = keep_settled(parse(FINETUNE, ["--epochs", "60"]), saved)
    assert not is_open(longer) and values(longer) == values(settled("--epochs", 60)) != FULL_VALUES
    assert longer.data.crop_scale == settled("--epochs", 60).data.crop_scale
    assert compare_settings(longer, saved) == []
    other = keep_settled(parse(FINETUNE, ["--epochs", "60", "--mixup", "0.1"]), saved)
    with pytest.raises(UserError, match="mixup is 0.1 and .* was trained with 0.4: give --mixup 0.4 as before"):
        compare_settings(other, saved)
