"""Image sizes of a run: what may be written, what is refused, and how a recipe's follow another image."""

from __future__ import annotations

import json

import pytest

from mirl.engine.configuration.config import PretrainConfig
from mirl.engine.configuration.flags import parse
from mirl.engine.configuration.overrides import override_by_keyword
from mirl.engine.models import MODEL_NAMES
from mirl.engine.pretraining.command_line import PRETRAIN
from mirl.engine.pretraining.recipes import recipe
from mirl.engine.training.image_sizes import StepSizes
from mirl.engine.transfer.classification.command_line import FINETUNE
from mirl.errors import UserError


def sizes(*flags: str) -> tuple[str, ...]:
    """Of a run on images of 64 pixels in patches of 8, with flags that change it."""
    return parse(PRETRAIN, ["--image-size", "64", "--patch-size", "8", *flags]).data.image_sizes


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (["32", "48@.5", "64@0.85"], ("32", "48@0.5", "64@0.85")),
        (["32x32", "64@1e-3"], ("32", "64@0.001")),
        (["64", "48@0.25", "64@0.75"], ("64", "48@0.25", "64@0.75")),  # smaller in the middle
        (["64"], ("64",)),
        (["96x128", "192X256@0.5", "--image-size", "192x256"], ("96x128", "192x256@0.5")),
        (["144x176", "192x256@0.5", "--image-size", "192x256", "--patch-size", "16"], ("144x176", "192x256@0.5")),
    ],
)
def test_what_may_be_written(given, read):
    assert sizes("--image-sizes", *given) == read


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["half", "64@0.5"], "image_sizes has 'half': give SIDE or HEIGHTxWIDTH in pixels"),
        (["32", "64@nan"], "image_sizes has '64@nan': give SIDE"),
        (["0", "64@0.5"], "image_sizes has '0': give SIDE"),
        (["32@0.1", "64@0.5"], "image_sizes begins with 32@0.1: the first size holds from the start"),
        (["32", "64"], "image_sizes is 32 64: give every size after the first a share of the run, rising and below 1"),
        (["32", "48@0.6", "64@0.5"], "image_sizes is 32 48@0.6 64@0.5: give every size"),
        (["32", "64@1"], "image_sizes is 32 64@1.0: give every size"),
        (["32", "48@0.5"], "image_sizes ends with 48@0.5 and image_size is 64: end with .*, e.g. 64@0.85"),
        (["72", "64@0.5"], "image_sizes has 72 and image_size is 64, for which memory is reserved: give none"),
        (["36", "64@0.5"], "image_sizes has 36 and patch_size is 8: give multiples of it, e.g. 32 or 40"),
        (["32x40", "64@0.5"], "image_sizes has 32x40 and image_size is 64: give both sides .*, e.g. 32x32"),
        (["96", "192x256@0.5", "--image-size", "192x256"], "image_sizes has 96 and .*, e.g. 96x128"),
        (["8", "64@0.5"], "image_sizes has 8 and mask_ratio is 0.75, which keeps 0 of its 1 patches: give a larger"),
    ],
)
def test_what_does_not_fit_is_one_line(given, message):
    with pytest.raises(UserError, match=f"^{message}") as caught:
        sizes("--image-sizes", *given)
    assert "\n" not in str(caught.value)


def test_they_are_of_pretraining_and_survive_being_written_down(tmp_path):
    with pytest.raises(UserError, match="unknown flag --image-sizes"):
        parse(FINETUNE, ["--image-sizes", "32", "64@0.5"])
    config = recipe("demo", image_sizes=(32, "48@0.5", "64@0.8"))
    assert PretrainConfig.from_dict(json.loads(config.to_json()), source="its own") == config
    (tmp_path / "mine.yaml").write_text("image_sizes: [32, 48@0.5, 64@0.8]\n")
    assert parse(PRETRAIN, ["--config", str(tmp_path / "mine.yaml")]).data == config.data
    written = config.to_dict()
    del written["data"]["image_sizes"]  # of a version without them
    assert PretrainConfig.from_dict(written, source="old").data.image_sizes == ()


@pytest.mark.parametrize(
    ("changes", "followed"),
    [
        ({"image_size": 96}, ("48", "72@0.5", "96@0.8")),
        ({"image_size": (96, 128)}, ("48x64", "72x96@0.5", "96x128@0.8")),
        ({"patch_size": 16}, ("32", "48@0.5", "64@0.8")),
        ({"patch_size": 32, "image_size": 128}, ("64", "96@0.5", "128@0.8")),
        ({"model": "vit_b"}, ("112", "160@0.5", "224@0.8")),
        ({"image_size": 96, "image_sizes": "96"}, ("96",)),
        ({"mask_ratio": 0.5}, ("32", "48@0.5", "64@0.8")),
    ],
)
def test_those_of_a_recipe_follow_another_image_or_patch_unless_they_are_given(changes, followed):
    base = recipe("tiny", image_sizes=("32", "48@0.5", "64@0.8"))
    assert override_by_keyword(base, changes).data.image_sizes == followed


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_the_fast_recipe_is_for_every_model_and_has_half_of_the_flops(name):
    config = parse(PRETRAIN, ["--recipe", "fast", "--model", name])
    assert (config.model.label, config.optim.optimizer) == (name, "muon")
    assert config.data.image_sizes == ("128", "160@0.5", "224@0.85")
    assert StepSizes.of(config, 31_200).mean_cost == pytest.approx(0.5, abs=0.02)
