"""The recipes say what the paper says and what it does not; the command line offers what detection has."""

from __future__ import annotations

import inspect
import json

import pytest

from mirl.engine.cli import dispatch
from mirl.engine.configuration.flags import build_parser, parse
from mirl.engine.models.config import model_config
from mirl.engine.transfer.detection.command_line import DETECT
from mirl.engine.transfer.detection.recipes import RECIPES, detect_recipe
from mirl.engine.transfer.detection.run import refuse_full_matrix, with_models
from mirl.errors import UserError

FIGURES = {"vit_b": ("49.3", "43.7"), "vit_b_48": ("46.5",)}


@pytest.mark.parametrize("name", ["vit_b", "vit_s_54", "vit_b_24", "vit_b_48", "vitdet_b"])
def test_a_recipe_names_its_sources_and_claims_no_measurement(name):
    text = " ".join((inspect.getdoc(RECIPES[name]) or "").split())
    assert "ot measured here" in text and "Inherited:" in text and "Command:" in text
    assert all(figure in text for figure in FIGURES.get(name, ()))


@pytest.mark.parametrize("name", ["vit_b", "vit_s_54", "vit_b_24", "vit_b_48"])
def test_the_paper_recipes_are_the_1x_schedule(name):
    config = detect_recipe(name)
    assert config.optim.epochs == 12 and config.optim.schedule == "step"
    assert [round(12 * share) for share in config.optim.step_at] == [9, 11]
    assert (config.detect.variant, config.detect.image_height, config.detect.image_width) == ("paper", 800, 1333)


def test_the_deep_recipes_move_the_lowest_block_as_little_as_the_shallow_one():
    lowest = {
        name: detect_recipe(name).detect.layer_decay ** (model_config(name).depth + 1)
        for name in ("vit_b", "vit_s_54", "vit_b_48")
    }
    assert lowest["vit_s_54"] == pytest.approx(lowest["vit_b"], rel=0.8)
    assert lowest["vit_b_48"] == pytest.approx(lowest["vit_b"], rel=0.8)


def test_padded_sizes_are_whole_windows_and_whole_patches():
    paper = with_models(detect_recipe("vit_b"), model_config("vit_b")).encoder
    assert (paper.image_height, paper.image_width, paper.segments) == (800, 1344, 1)
    jitter = with_models(detect_recipe("vitdet_b"), model_config("vit_b")).encoder
    assert (jitter.image_height, jitter.image_width) == (1024, 1024)
    with pytest.raises(UserError, match="image_size is 800x0: give both numbers"):
        with_models(detect_recipe("vit_b", image_size=(800, 0)), model_config("vit_b"))


def test_the_help_offers_what_detection_has_and_nothing_of_other_runs():
    flags = {flag for action in build_parser(DETECT)._actions for flag in action.option_strings}
    assert {"--annotations", "--variant", "--window", "--step-at", "--pictures", "--image-size"} <= flags
    assert not {"--mask-ratio", "--mixup", "--crop-scale", "--labels"} & flags
    assert parse(DETECT, ["--recipe", "vitdet_b"]).detect.window == 16


def test_summary_tells_windows_from_global_attention(capsys):
    assert dispatch(["summary", "--task", "detect", "--model", "vit_b_48", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["encoder_global_gflop"] / row["encoder_windows_gflop"] == pytest.approx(row["global_over_windows"])
    assert row["global_over_windows"] == pytest.approx(2629 / 1566, rel=5e-3)  # counted by hand
    with pytest.raises(UserError, match="task is detect and --depth is given"):
        dispatch(["summary", "--task", "detect", "--depth", "3"])


def test_a_gpu_never_forms_the_matrix_of_4096_tokens():
    source = model_config("vit_b")
    asked = with_models(detect_recipe("vitdet_b", attention="math"), source)
    assert asked.encoder.num_patches == 4096
    with pytest.raises(UserError, match="attention is math, which forms a matrix of 4096 x 4096"):
        refuse_full_matrix(asked, "cuda")
    refuse_full_matrix(asked, "cpu")
    refuse_full_matrix(with_models(detect_recipe("vitdet_b"), source), "cuda")
