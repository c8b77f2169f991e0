"""A resumed run has the settings of its checkpoint, or names on purpose those that it changes."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex

import pytest

from mirl.engine.checkpoints.reader import CheckpointReader, locate
from mirl.engine.configuration.config import PretrainConfig
from mirl.engine.configuration.flags import parse
from mirl.engine.pretraining.command_line import PRETRAIN, parse_pretrain
from mirl.engine.training.resumed_settings import FIXED, FREE, compare_settings, keep_settled, require_known_changes
from mirl.engine.training.run_folder import write_config
from mirl.engine.transfer.classification.command_line import FINETUNE
from mirl.engine.transfer.classification.config import FinetuneConfig
from mirl.engine.transfer.detection.config import DetectConfig
from mirl.engine.transfer.segmentation.config import SegmentConfig
from mirl.errors import UserError
from tests.support.launch import FIXTURES

RUNS = FIXTURES / "run_0_1_0"
FLAGS = json.loads((RUNS / "expected.json").read_text())["flags"]
READERS = {kind: CheckpointReader(locate(RUNS / kind)) for kind in ("pretrain", "finetune")}
COMMANDS = {"pretrain": PRETRAIN, "finetune": FINETUNE}


def compare(*flags: object, kind: str = "pretrain") -> list[str]:
    config = parse(COMMANDS[kind], [*map(str, FLAGS[kind]), "--data", "images", "--resume", "auto", *map(str, flags)])
    require_known_changes(config)
    return compare_settings(keep_settled(config, READERS[kind]), READERS[kind])


@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_the_same_command_goes_on_without_a_word(kind):
    assert compare(kind=kind) == []


@pytest.mark.parametrize(
    ("kind", "flags", "name", "flag"),
    [
        ("pretrain", ["--lr", "0.5"], "lr is 0.5 and ", "--lr "),
        ("pretrain", ["--weight-decay", "0.3"], "weight_decay is 0.3 and ", "--weight-decay 0.05"),
        ("pretrain", ["--betas", "0.8", "0.9"], "betas is 0.8 0.9 and ", "--betas 0.9 0.95"),
        ("pretrain", ["--clip-grad", "7"], "clip_grad is 7 and ", "--clip-grad "),
        ("pretrain", ["--mask-ratio", "0.25"], "mask_ratio is 0.25 and ", "--mask-ratio "),
        ("pretrain", ["--norm-pix"], "norm_pix is True and ", "--no-norm-pix"),
        ("pretrain", ["--no-flip"], "flip is False and ", "--flip"),
        ("pretrain", ["--crop-scale", "0.5", "0.6"], "crop_scale is 0.5 0.6 and ", "--crop-scale "),
        ("pretrain", ["--objective", "multi_decoder"], "objective is multi_decoder and ", "--objective mirl"),
        ("pretrain", ["--schedule", "step"], "schedule is step and ", "--schedule cosine"),
        ("pretrain", ["--mean", "0.1", "0.2", "0.3"], "mean is 0.1 0.2 0.3 and ", "--mean 0.485 0.456 0.406"),
        ("pretrain", ["--choices", "default"], "choices is default and ", "--choices auto"),
        ("finetune", ["--mixup", "0.3"], "mixup is 0.3 and ", "--mixup "),
        ("finetune", ["--rand-augment", "rand-m3-n1"], "rand_augment is rand-m3-n1 and ", "--rand-augment "),
        ("finetune", ["--layer-decay", "0.4"], "layer_decay is 0.4 and ", "--layer-decay "),
        ("finetune", ["--reinit-last", "1"], "reinit_last is 1 and ", "--reinit-last 0"),
        ("finetune", ["--pool", "token"], "pool is token and ", "--pool avg"),
    ],
)  # fmt: skip
def test_another_experiment_is_refused_and_a_change_on_purpose_is_told(kind, flags, name, flag):
    with pytest.raises(UserError) as refused:
        compare(*flags, kind=kind)
    text = str(refused.value)
    setting = flags[0].removeprefix("--").removeprefix("no-").replace("-", "_")
    assert text.startswith(name) and f"{flag}" in text and f"--change {setting}" in text and "\n" not in text
    as_before = shlex.split(re.search(r": give (.*) as before", text)[1])
    assert compare(*flags, *as_before, kind=kind) == [], "a flag that comes later holds"
    assert compare(*flags, *re.search(r"(--change .*)$", text)[1].split(), kind=kind) != []
    (line,) = compare(*flags, "--change", setting, kind=kind)
    assert f"{setting} " in line and " -> " in line
    assert compare(*flags, "--change", setting.replace("_", "-"), kind=kind) == [line]


def test_image_sizes_belong_to_the_experiment():
    with pytest.raises(UserError, match="^image_sizes is 16 and .* was trained with none: .* --change image_sizes$"):
        compare("--image-sizes", "16")
    (line,) = compare("--image-sizes", "16", "--change", "image_sizes")
    assert "image_sizes none -> 16" in line


def test_all_that_differ_are_listed_at_once_and_those_that_were_named_are_not():
    flags = ["--lr", "0.5", "--mask-ratio", "0.25", "--no-flip"]
    with pytest.raises(UserError, match="mask_ratio is 0.25 and .*; flip is False, it was True; lr is 0.5, it was "):
        compare(*flags)
    with pytest.raises(UserError, match=r"flip is False and .* --change flip$"):
        compare(*flags, "--change", "lr", "mask_ratio")


@pytest.mark.parametrize("name", ["width", "batch_size", "seed", "segments"])
def test_what_the_weights_or_the_order_of_images_rest_on_cannot_be_changed(name):
    with pytest.raises(UserError, match=f"change is {name}: it cannot change within a run"):
        compare("--change", name)


def test_a_wrong_name_is_refused_with_the_nearest():
    with pytest.raises(UserError, match="change is mask_ration, which is no setting: give mask_ratio"):
        compare("--change", "mask_ration")


def test_other_batches_are_refused_with_the_mend_that_works():
    with pytest.raises(UserError, match="batch_size is 2 and .*--batch-size .*--micro-batch sets the accumulation"):
        compare("--batch-size", 2)


def test_a_longer_run_is_told_and_a_shorter_one_refused():
    saved = READERS["pretrain"].state["config"]["optim"]
    assert saved["steps"], "the fixture counts steps"
    (line,) = compare("--steps", saved["steps"] + 50, "--warmup-steps", saved["warmup_steps"])
    assert f"steps {saved['steps']} -> {saved['steps'] + 50}" in line
    with pytest.raises(UserError, match=f"steps is .*: give --steps {saved['steps']} as before"):
        compare("--steps", saved["steps"] - 1, "--warmup-steps", saved["warmup_steps"])
    assert compare("--steps", saved["steps"] - 1, "--warmup-steps", saved["warmup_steps"], "--change", "steps")


def test_the_warm_up_that_a_longer_run_has_by_default_is_welcome_and_another_is_not():
    saved = READERS["pretrain"].state["config"]["optim"]
    assert (saved["steps"], saved["warmup_steps"]) == (6, 1) and READERS["pretrain"].state["applied_steps"] == 3
    (line,) = compare("--steps", 50, "--warmup-steps", 5)
    assert "steps 6 -> 50, warmup_steps 1 -> 5" in line
    (line,) = compare("--steps", 50, "--warmup-steps", 2)  # over by now
    assert "warmup_steps 1 -> 2" in line
    with pytest.raises(UserError, match="warmup_steps is 20 and .*: give --warmup-steps 1 as before"):
        compare("--steps", 50, "--warmup-steps", 20)
    with pytest.raises(UserError, match="warmup_steps is 2 and .*--change warmup_steps"):
        compare("--warmup-steps", 2)


def test_the_same_length_in_epochs_is_the_same_length():
    state = READERS["pretrain"].state
    saved = state["config"]["optim"]
    epochs = saved["steps"] / state["steps_per_epoch"]
    assert compare("--steps", 0, "--epochs", epochs, "--warmup-steps", saved["warmup_steps"]) == compare()


def test_a_learning_rate_given_in_another_way_is_the_same():
    saved = READERS["pretrain"].state["config"]["optim"]
    peak = saved["lr"] or saved["base_lr"] * saved["batch_size"] / 256
    base = peak * 256 / saved["batch_size"]
    assert compare("--lr", 0, "--base-lr", repr(base)) == compare()


def test_where_and_how_it_computes_is_free():
    flags = ["--micro-batch", 1, "--deepspeed-config", "zero1", "--log-every", 7, "--compile", "off", "--out", "other",
             "--keep-checkpoints", 9, "--max-bad-images", 0.5, "--max-minutes", 3]  # fmt: skip
    (line,) = compare(*flags)
    assert "deepspeed_config" in line and "log_every" in line and "other," not in line


def test_every_name_of_the_tables_is_a_setting():
    sections = {
        **PretrainConfig.sections(),
        **FinetuneConfig.sections(),
        **SegmentConfig.sections(),
        **DetectConfig.sections(),
    }
    for section, names in FREE.items():
        assert names <= {field.name for field in dataclasses.fields(sections[section])}, section
    assert {field.name for kind in sections.values() for field in dataclasses.fields(kind)} >= FIXED
    assert not FIXED & {name for names in FREE.values() for name in names}


def test_the_configuration_of_the_past_is_kept(tmp_path):
    first = parse_pretrain(["--steps", "20", "--lr", "1e-4"])
    second = parse_pretrain(["--steps", "20", "--lr", "1e-3"])
    for config, step in ((first, 0), (first, 5), (second, 9)):
        write_config(config, tmp_path, step)
    assert json.loads((tmp_path / "config.json").read_text())["optim"]["lr"] == 1e-3
    (line,) = (tmp_path / "config-history.jsonl").read_text().splitlines()
    entry = json.loads(line)
    assert (entry["step"], entry["config"]["optim"]["lr"]) == (9, 1e-4) and entry["time"] > 0
