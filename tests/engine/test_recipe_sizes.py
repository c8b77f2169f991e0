"""What the help and the docstrings say of each recipe's memory is what the estimate says.

`python -m tests.engine.test_recipe_sizes` prints the texts that belong into the two files of sizes.
"""

from __future__ import annotations

import inspect
import json

import pytest

from mirl.engine.accounting.flops import CLASSES
from mirl.engine.accounting.machines import Machine, memory_by_machine
from mirl.engine.accounting.run_memory import classifier_footprint, pretraining_footprint, segmenter_footprint
from mirl.engine.models import model_config
from mirl.engine.pretraining import recipe_sizes as of_pretraining
from mirl.engine.pretraining.recipes import RECIPES
from mirl.engine.transfer.classification import recipe_sizes as of_finetuning
from mirl.engine.transfer.classification import recipes as finetuning
from mirl.engine.transfer.classification.classifier import encoder_config
from mirl.engine.transfer.detection import recipe_sizes as of_detection
from mirl.engine.transfer.detection import recipes as detection
from mirl.engine.transfer.detection.run import USUAL_CLASSES, detection_footprint, with_models
from mirl.engine.transfer.segmentation import recipe_sizes as of_segmentation
from mirl.engine.transfer.segmentation import recipes as segmentation
from mirl.engine.transfer.segmentation.run import CLASSES as PIXEL_CLASSES
from tests.support.launch import CHECKOUT

ENCODERS = {"small_data": "vit_s", "vit_b_48": "vit_b_48", "vit_s_54": "vit_s_54"}


def pretraining_text(name: str) -> str:
    config = RECIPES[name]()
    model, batch = config.model, config.optim.batch_size

    def footprint(machine: Machine):
        return pretraining_footprint(config, machine.precision, on_gpu=machine.on_gpu)

    memory = ", ".join(memory_by_machine(footprint, batch))
    return f"{model.image_height}x{model.image_width} pixels, batch {batch}; estimated memory: {memory}"


def finetuning_text(name: str) -> str:
    config = finetuning.RECIPES[name]()
    section, batch = config.finetune, config.optim.batch_size
    model = encoder_config(model_config(ENCODERS[name]), section.drop_path or 0.0)

    def footprint(machine: Machine):
        return classifier_footprint(
            model, CLASSES, machine.precision, on_gpu=machine.on_gpu, averaged=bool(section.ema),
            paired=bool(section.mixup or section.cutmix),
        )  # fmt: skip

    memory = ", ".join(memory_by_machine(footprint, batch))
    return f"pixels of pre-training, batch {batch}; estimated memory for {ENCODERS[name]} at 224x224: {memory}"


SEGMENTED = {
    "small_data": "vit_s", "demo": "demo", "vit_b": "vit_b", "vit_s_54": "vit_s_54", "vit_b_24": "vit_b_24",
    "vit_b_48": "vit_b_48",
}  # fmt: skip


def segmenting_text(name: str) -> str:
    config = segmentation.RECIPES[name]()
    section, batch, encoder = config.segment, config.optim.batch_size, SEGMENTED[name]
    source = RECIPES["demo"]().model if encoder == "demo" else model_config(encoder)
    model = config.resized(encoder_config(source, section.drop_path))

    def footprint(machine: Machine):
        return segmenter_footprint(
            model, PIXEL_CLASSES, section.head_channels, machine.precision, on_gpu=machine.on_gpu, group=2
        )

    memory = ", ".join(memory_by_machine(footprint, batch))
    size = f"{model.image_height}x{model.image_width}"
    pixels = f"crops of {size}" if section.image_height else "pixels of pre-training"
    return f"{pixels}, batch {batch}; estimated memory for {encoder} at {size}, {PIXEL_CLASSES} classes: {memory}"


def detecting_text(name: str) -> str:
    encoder = SEGMENTED.get(name, "vit_b")
    source = RECIPES["demo"]().model if encoder == "demo" else model_config(encoder)
    config = with_models(detection.RECIPES[name](), source)

    def footprint(machine: Machine):
        return detection_footprint(config, machine.precision, on_gpu=machine.on_gpu)

    batch, size = config.optim.batch_size, f"{config.size[0]}x{config.size[1]}"
    memory = ", ".join(memory_by_machine(footprint, batch))
    return f"up to {size}, batch {batch}; estimated memory for {encoder}, {USUAL_CLASSES} classes: {memory}"


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_the_size_of_a_pretraining_recipe_is_the_estimate(name):
    assert of_pretraining.SIZES[name] == pretraining_text(name)


@pytest.mark.parametrize("name", sorted(finetuning.RECIPES))
def test_the_size_of_a_finetuning_recipe_is_the_estimate(name):
    assert of_finetuning.SIZES[name] == finetuning_text(name)


@pytest.mark.parametrize("name", sorted(detection.RECIPES))
def test_the_size_of_a_detection_recipe_is_the_estimate(name):
    assert of_detection.SIZES[name] == detecting_text(name)


@pytest.mark.parametrize("name", sorted(segmentation.RECIPES))
def test_the_size_of_a_segmentation_recipe_is_the_estimate(name):
    assert of_segmentation.SIZES[name] == segmenting_text(name)


@pytest.mark.parametrize("name", ["demo", "small_data"])
def test_the_docstring_of_a_recipe_says_its_size(name):
    assert f"Size: {of_pretraining.SIZES[name]}" in words(inspect.getdoc(RECIPES[name]))


@pytest.mark.parametrize("name", sorted(finetuning.RECIPES))
def test_the_docstring_of_a_finetuning_recipe_says_its_size(name):
    assert f"Size: {of_finetuning.SIZES[name]}" in words(inspect.getdoc(finetuning.RECIPES[name]))


def test_the_docs_say_every_size():
    text = (CHECKOUT / "docs" / "recipes.md").read_text()
    for name, size in [*of_pretraining.SIZES.items(), *of_finetuning.SIZES.items()]:
        assert f"| `{name}` | {size} |" in text


def test_the_recipe_of_the_readme_fits_on_a_laptop_and_on_one_gpu():
    for text in (of_pretraining.SIZES["small_data"], of_finetuning.SIZES["small_data"]):
        assert text.count("at micro-batch") == 3 and "too small" not in text


if __name__ == "__main__":
    print(json.dumps({name: pretraining_text(name) for name in RECIPES}, indent=4))
    print(json.dumps({name: detecting_text(name) for name in detection.RECIPES}, indent=4))
    print(json.dumps({name: segmenting_text(name) for name in segmentation.RECIPES}, indent=4))
    print(json.dumps({name: finetuning_text(name) for name in finetuning.RECIPES}, indent=4))
