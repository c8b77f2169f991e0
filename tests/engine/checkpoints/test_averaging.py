"""Averages of weights: the mean of checkpoints, and the average that a run kept."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mirl.engine.checkpoints.averaging import newest_of, write_average
from mirl.engine.checkpoints.files import write_weights
from mirl.engine.checkpoints.pretrained import load_pretrained
from mirl.engine.commands import average, export
from mirl.engine.models import MIRL, model_config
from mirl.errors import UserError

SIZE = {
    "depth": 2, "width": 16, "heads": 2, "segments": 2, "decoder_width": 16, "decoder_heads": 2, "decoder_depth": 1,
    "patch_size": 8, "image_height": 16, "image_width": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def models() -> list[MIRL]:
    torch.manual_seed(0)
    return [MIRL(model_config("vit_s", **SIZE)) for _ in range(3)]


@pytest.fixture
def a_run(tmp_path, models) -> Path:
    for number, model in enumerate(models, 1):
        state = {"step": number, "config": {"model": dataclasses.asdict(model.config)}}
        path = tmp_path / "run" / "checkpoints" / f"step-{number:08d}"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_weights(path, dict(model.named_parameters()), state)
    return tmp_path / "run"


def test_the_mean_of_the_last_two_is_theirs(a_run, models, capsys):
    assert average.main([str(a_run), "--last", "2", "--out", str(a_run / "mean")]) == 0
    assert "the mean of step-00000002, step-00000003" in capsys.readouterr().out
    found = load_pretrained(a_run / "mean")
    for name, parameter in found.named_parameters():
        two = [dict(model.named_parameters())[name].double() for model in models[1:]]
        torch.testing.assert_close(parameter.double(), (two[0] + two[1]) / 2, rtol=1e-7, atol=1e-9)


def test_an_export_averages_too_and_leaves_nothing_else(a_run, models, capsys):
    out = a_run / "mean.safetensors"
    assert export.run([str(a_run), "--average", "3", "--to", "safetensors", "--out", str(out)]) == 0
    assert "mean of step-00000001, step-00000002, step-00000003" in capsys.readouterr().out
    expected = torch.stack([model.encoder.blocks[1].mlp.fc2.weight for model in models]).mean(dim=0)
    torch.testing.assert_close(load_file(out)["blocks.1.mlp.fc2.weight"], expected)
    assert sorted(path.name for path in a_run.iterdir()) == ["checkpoints", "mean.safetensors"]


def test_what_cannot_be_averaged_is_refused_in_one_line(a_run, models):
    def refused(text, *flags):
        with pytest.raises(UserError, match=text) as error:
            average.main([*map(str, flags), "--out", str(a_run / "new")])
        assert "\n" not in str(error.value) and not (a_run / "new").exists()

    refused("has 3 checkpoints: give at most that many", a_run, "--last", 4)
    refused("give 2 checkpoints or more", a_run, "--last", 1)
    refused("holds no average of its weights", a_run, "--ema")
    refused("give one of --last N", a_run)
    refused("give one of --last N", a_run, "--ema", "--last", 2)
    refused("is no run with checkpoints", a_run / "nowhere", "--last", 2)
    other = MIRL(model_config("vit_s", **SIZE | {"width": 32}))
    write_weights(
        a_run / "wide", dict(other.named_parameters()), {"config": {"model": dataclasses.asdict(other.config)}}
    )
    refused("is of another architecture", a_run / "checkpoints" / "step-00000001", a_run / "wide")
    newest = a_run / "checkpoints" / "step-00000003"
    (newest / "rank-00000-of-00001.safetensors").write_bytes(b"")
    refused("is damaged", a_run, "--last", 2)
    with pytest.raises(UserError, match="--which and --weights"):
        export.run([str(a_run), "--average", "2", "--which", "last", "--to", "hf", "--out", str(a_run / "new")])


def test_a_name_that_is_taken_is_refused(a_run):
    (a_run / "taken").mkdir()
    with pytest.raises(UserError, match="exists"):
        average.main([str(a_run), "--last", "2", "--out", str(a_run / "taken")])
    with pytest.raises(UserError, match="exists"):
        write_average(a_run / "taken", newest_of(a_run, 2))
