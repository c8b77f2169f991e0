"""Whole detection runs of a tiny Mask R-CNN: what they write, that a resumed one is the same, and bad input."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mirl.engine.checkpoints.pretrained import load_encoder
from mirl.engine.checkpoints.reader import CheckpointReader
from mirl.engine.cli import dispatch
from mirl.engine.errors import Preempted
from mirl.engine.transfer.detection.config import DetectConfig
from mirl.engine.transfer.detection.heads import TERMS
from mirl.engine.transfer.detection.load import load_detector
from mirl.engine.transfer.detection.recipes import detect_recipe
from mirl.engine.transfer.detection.run import detect
from mirl.engine.transfer.detection.task import DetectTask
from mirl.errors import UserError
from tests.engine.models.helpers import tiny_config
from tests.support.runs import records

STEPS = 3


@pytest.fixture
def asked(composites, checkpoint, tmp_path):
    """asked(out, **changes): the configuration of a run of three steps of four composites."""
    encoder = checkpoint(tiny_config(depth=6, segments=2, patch_size=8, image_height=32, image_width=32))

    def make(out: str, **changes) -> DetectConfig:
        settings = {
            "checkpoint": str(encoder), "data": str(composites / "train"),
            "annotations": str(composites / "train.json"), "val": str(composites / "val"),
            "val_annotations": str(composites / "val.json"), "out": str(tmp_path / out), "image_size": 64,
            "channels": 8, "regions": 8, "steps": STEPS, "warmup_steps": 1, "batch_size": 4, "micro_batch": 2,
            "eval_every": 0.0, "checkpoint_every": 1, "keep_checkpoints": 0, "precision": "fp32", "device": "cpu",
            "drop_path": 0.1, "loader_threads": 1, "pictures": 2, "picture_every": 2, "log_every": 1,
            "tensorboard": False, "attention": "math",
        }  # fmt: skip
        return detect_recipe("small_data", **(settings | changes))

    return make


def weights_of(out: Path, step: int) -> dict[str, torch.Tensor]:
    return CheckpointReader(out / "checkpoints" / f"step-{step:08d}").weights()


def test_a_run_writes_what_it_says_and_a_resumed_one_is_the_same(asked, composites, monkeypatch, capsys, tmp_path):
    out = detect(asked("whole"))
    said = capsys.readouterr().out
    assert "Mask R-CNN, variant paper" in said and "10 classes" in said and "12 images, " in said
    lines = [line for line in records(out) if "loss" in line]
    assert len(lines) == STEPS and {f"loss_{term}" for term in TERMS} <= set(lines[0])
    assert [path.name for path in sorted((out / "pictures").iterdir())] == ["step-00000002.png", "step-00000003.png"]
    (judged,) = [line for line in records(out) if "val_mask_AP" in line]
    assert judged["val_images"] == 5 and "val_box_AR_100" in judged
    report = json.loads((out / "evaluation" / "evaluation.json").read_text())
    assert set(report["of_classes"]) and report["step"] == STEPS
    assert isinstance(json.loads((out / "evaluation" / "results.json").read_text()), list)
    assert json.loads((out / "checkpoints" / "best.json").read_text())["metric"] == "mask AP"
    state = CheckpointReader(out / "checkpoints" / f"step-{STEPS:08d}").state["config"]
    assert state["category_ids"][:3] == [1, 2, 4] and state["classes"][0] == "star"

    # Ended by a signal in its second step, and gone on with.
    steps = []

    def terminate(self, applied):
        steps.append(applied)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(DetectTask, "after_step", terminate)
    with pytest.raises(Preempted, match="after step 2 of 3"):
        detect(asked("parts"))
    monkeypatch.undo()
    stopped = sorted(path.name for path in (tmp_path / "parts" / "checkpoints").glob("step-*"))
    assert stopped == ["step-00000001", "step-00000002"]
    parts = detect(asked("parts", resume="auto"))
    whole, again = weights_of(out, STEPS), weights_of(parts, STEPS)
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert (out / "evaluation" / "results.json").read_bytes() == (parts / "evaluation" / "results.json").read_bytes()
    moved = weights_of(out, 1)
    assert any(not torch.equal(whole[name], moved[name]) for name in whole if name.startswith("encoder.blocks.0."))

    # Its encoder is one as any other, at the image size of pre-training, whose positions it stretches.
    source, weights = load_encoder(out)
    assert source.grid == (4, 4) and torch.equal(weights["cls_token"], whole["encoder.cls_token"])
    # The checkpoint is a detector for whoever takes it.
    model, config = load_detector(out)
    assert config.classes == tuple(state["classes"]) and not model.training
    with pytest.raises(UserError, match="is a detector of 10 classes, made from .*: mirl evaluate needs"):
        dispatch(["evaluate", str(out), "--val", str(composites / "val")])


def test_windows_and_jitter_train_too_and_accumulation_and_recomputation_change_nothing(asked):
    common = {"variant": "vitdet", "window": 4, "steps": 1, "warmup_steps": 0, "val_annotations": "", "val": "",
              "pictures": 0}  # fmt: skip
    plain = weights_of(detect(asked("plain", **common)), 1)
    again = weights_of(detect(asked("again", **common, activation_checkpointing="every")), 1)
    assert not any(name.startswith("pyramid.fpn") for name in plain)
    for name, value in plain.items():
        torch.testing.assert_close(again[name], value, msg=name)


BAD = {
    "no annotations": ({"annotations": ""}, "annotations is not given: name a COCO file"),
    "no data": ({"data": ()}, "data is not given: name the folder"),
    "no checkpoint": ({"checkpoint": ""}, "checkpoint is not given: name a pre-trained checkpoint"),
    "a folder of labels": ({"annotations": "TRAIN"}, "a folder: give a COCO file .* mirl segment"),
    "val without its file": ({"val_annotations": ""}, "val is .* and val_annotations is not given"),
    "other pictures": ({"data": "VAL"}, "names 7 of 12 images that are not in .*: give the folder"),
    "size": ({"image_size": (96, 64)}, "image_size is 96x64: .* give 64x96"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_nothing_is_written(name, asked, composites, tmp_path):
    changes, text = BAD[name]
    places = {"TRAIN": str(composites / "train"), "VAL": str(composites / "val")}
    changes = {key: places.get(value, value) if isinstance(value, str) else value for key, value in changes.items()}
    with pytest.raises(UserError, match=text) as refused:
        detect(asked("bad", **changes))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "bad").exists()


def test_the_command_line_refuses_before_torch_is_loaded(run, composites, checkpoint, tmp_path):
    encoder = checkpoint(tiny_config(depth=6, segments=2, patch_size=8, image_height=32, image_width=32))
    values = json.loads((composites / "val.json").read_text())
    values["categories"][2]["name"] = "moon"
    (tmp_path / "other.json").write_text(json.dumps(values))
    command = [sys.executable, "-m", "mirl.engine.cli", "detect", "--checkpoint", encoder, "--data",
               composites / "train", "--annotations", composites / "train.json", "--val", composites / "val",
               "--val-annotations", tmp_path / "other.json", "--out", tmp_path / "out"]  # fmt: skip
    done = run(*command)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: val_annotations is") and "val has 'moon'" in line
    assert not (tmp_path / "out").exists()


def test_the_demo_says_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="runs/demo is not there: run mirl pretrain first"):
        dispatch(["detect", "--demo"])
    assert not list(tmp_path.iterdir())


def test_a_resumed_run_refuses_other_annotations_and_classes(asked, composites, tmp_path):
    changes = {"steps": 1, "warmup_steps": 0, "val_annotations": "", "val": "", "pictures": 0}
    detect(asked("first", **changes))
    values = json.loads((composites / "train.json").read_text())
    fewer = tmp_path / "fewer.json"
    fewer.write_text(json.dumps(values | {"annotations": values["annotations"][1:]}))
    longer = changes | {"steps": 2, "resume": "auto", "annotations": str(fewer)}
    with pytest.raises(UserError, match="fingerprint is .* or other annotations"):
        detect(asked("first", **longer))
    renamed = values | {"categories": [item | {"name": f"{item['name']}s"} for item in values["categories"]]}
    fewer.write_text(json.dumps(renamed))
    with pytest.raises(UserError, match="whose 10 classes are not the 10 of"):
        detect(asked("first", **longer))
    with pytest.raises(UserError, match="channels is 16 and .* was trained with 8"):
        detect(asked("first", **(longer | {"channels": 16})))


def test_predict_writes_overlays_and_json_and_tells_what_it_cannot_read(asked, composites, tmp_path, capsys):
    run = detect(asked("run", steps=1, warmup_steps=0, val_annotations="", val="", pictures=0))
    pictures = tmp_path / "some"
    pictures.mkdir()
    for name in ("00003.png", "00006.png"):  # a grey one, and one twice as wide as high
        (pictures / name).write_bytes((composites / "train" / name).read_bytes())
    (pictures / "broken.png").write_bytes(b"no picture")
    capsys.readouterr()
    assert dispatch(["predict", str(run), str(pictures), "--out", str(tmp_path / "found"), "--min-score", "0"]) == 0
    said = capsys.readouterr().out
    assert "broken.png  not read: " in said and "3 images: " in said
    rows = json.loads((tmp_path / "found" / "detections.json").read_text())
    grey, wide, broken = rows
    assert "error" in broken and (wide["height"], wide["width"]) == (64, 128)
    assert len(grey["objects"]) > 5, "at score 0 an untrained detector finds much"
    for item in grey["objects"]:
        assert 0 <= item["box"][0] < item["box"][2] <= 64 and item["mask"]["size"] == [64, 64]
    overlay = np.asarray(Image.open(tmp_path / "found" / grey["overlay"]))
    assert overlay.shape == (256, 256, 3) and (overlay[..., 0] != overlay[..., 1]).any(), "nothing is drawn in colour"
    for arguments, text in (
        (["--out", str(tmp_path / "found")], "which is not empty: give another folder or --overwrite"),
        (["--out", str(tmp_path / "table.csv")], "give a folder"),
        (["--min-score", "2", "--out", str(tmp_path / "new")], "min_score is 2.0: give a number from 0 to 1"),
    ):
        with pytest.raises(UserError, match=text):
            dispatch(["predict", str(run), str(pictures), *arguments])
    assert not (tmp_path / "new").exists()
