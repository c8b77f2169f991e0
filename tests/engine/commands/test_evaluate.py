"""`mirl evaluate` and `mirl predict`: their figures are those of a count by hand, whoever asks and however."""

from __future__ import annotations

import csv
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from mirl.dataloaders import build_eval_loader
from mirl.engine.analysis.features import load_frozen_encoder
from mirl.engine.checkpoints.best import Best, write_best
from mirl.engine.checkpoints.files import describe, save_tensors, write_manifest
from mirl.engine.checkpoints.pretrained import load_pretrained
from mirl.engine.cli import dispatch
from mirl.engine.commands.evaluate import main as evaluate
from mirl.engine.commands.predict import main as predict
from mirl.engine.models import ModelConfig
from mirl.engine.transfer.classification.classifier import Classifier
from mirl.engine.transfer.classification.config import FinetuneConfig, FinetuneSection
from mirl.errors import UserError
from tests.engine.conftest import write_classes
from tests.engine.models.helpers import tiny_config
from tests.support.launch import CHECKOUT, launch_environment

CONFIG = tiny_config(channels=3)
CLASSES = ("blue", "green", "red")


def write_classifier(
    folder: Path, *, seed: int, config: ModelConfig = CONFIG, pool: str = "token"
) -> dict[str, Classifier]:
    """A checkpoint of fine-tuning with weights and their average, both with heads that tell classes apart."""
    models = {}
    for kind, number in (("weight", seed), ("ema", seed + 1)):
        torch.manual_seed(number)
        models[kind] = Classifier(config, num_classes=3, pool=pool).eval()
        torch.nn.init.normal_(models[kind].head.weight)
    tensors = {
        f"{kind}/{name}@0": parameter.detach().flatten()
        for kind, model in models.items()
        for name, parameter in model.named_parameters()
    }
    settings: dict = {name: {} for name in FinetuneConfig.sections()}
    settings |= {
        "recipe": "",
        "finetune": dataclasses.asdict(FinetuneSection(pool=pool, ema=0.9, checkpoint="runs/fm")),
    }
    settings |= {"optim": {"epochs": 1}, "classes": list(CLASSES)}
    settings |= {"source": dataclasses.asdict(config), "model": dataclasses.asdict(config)}
    shapes = {name: list(parameter.shape) for name, parameter in models["weight"].named_parameters()}
    folder.mkdir(parents=True)
    path = folder / "rank-00000-of-00001.safetensors"
    save_tensors(tensors, path)
    write_manifest(
        folder, {"step": 0, "config": settings, "parameters": shapes}, {path.name: describe(path)}, world_size=1
    )
    return {"last": models["weight"], "ema": models["ema"]}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> tuple[Path, dict[str, dict[str, Classifier]]]:
    """A run of two checkpoints, whose first one with its average is recorded as the best."""
    run = tmp_path_factory.mktemp("run")
    folder = run / "checkpoints"
    models = {
        "best": write_classifier(folder / "step-00000010", seed=0),
        "newest": write_classifier(folder / "step-00000020", seed=5),
    }
    (folder / "latest").write_text("step-00000020\n")
    write_best(folder, Best(weights="ema", score_percent=50.0, images=14, step=10, epoch=1.0))
    return run, models


@pytest.fixture(scope="module")
def val(tmp_path_factory) -> Path:
    return write_classes(tmp_path_factory.mktemp("labelled") / "val", {"blue": 7, "green": 4, "red": 3})


def by_hand(model: Classifier, val: Path) -> list[tuple[int, list[float]]]:
    """(label, logits) of each image, one at a time."""
    size = (CONFIG.image_height, CONFIG.image_width)
    with build_eval_loader(val, image_size=size, batch_size=1, threads=1) as loader, torch.no_grad():
        return [(int(batch.labels), model(batch.images)[0].tolist()) for batch in loader]


def test_the_report_is_a_count_by_hand(run_folder, val, tmp_path, capsys):
    run, models = run_folder
    assert evaluate([str(run), "--val", str(val), "--out", str(tmp_path / "out"), "--batch-size", "4"]) == 0
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert report["checkpoint"].endswith("step-00000010") and report["images"] == 14
    for weights in ("last", "ema"):
        found, judged = report["weights"][weights], by_hand(models["best"][weights], val)
        confusion = [[0] * 3 for _ in range(3)]
        for label, logits in judged:
            confusion[label][max(range(3), key=logits.__getitem__)] += 1
        assert found["confusion"] == confusion
        assert found["correct"] == sum(confusion[i][i] for i in range(3))
        assert found["top1_percent"] == pytest.approx(100 * found["correct"] / 14) and found["top5_percent"] == 100
        loss = torch.nn.functional.cross_entropy(
            torch.tensor([logits for _, logits in judged]), torch.tensor([label for label, _ in judged])
        )
        assert found["loss"] == pytest.approx(loss.item(), rel=1e-5)
        for i, name in enumerate(CLASSES):
            values, named = found["by_class"][name], sum(row[i] for row in confusion)
            assert (values["images"], values["predicted"]) == (sum(confusion[i]), named)
            assert values["recall_percent"] == pytest.approx(100 * confusion[i][i] / sum(confusion[i]))
            assert values["precision_percent"] == (pytest.approx(100 * confusion[i][i] / named) if named else None)
        table = list(csv.reader((tmp_path / "out" / f"confusion-{weights}.csv").open()))
        assert table[0][1:] == list(CLASSES)
        assert [[int(cell) for cell in row[1:]] for row in table[1:]] == confusion
        with Image.open(tmp_path / "out" / f"confusion-{weights}.png") as picture:
            assert len(picture.convert("L").getcolors(1 << 16)) > 10
    said = capsys.readouterr().out
    assert "the best by validation: epoch 1 (step 10)" in said and "the central 16x24 are seen" in said
    with pytest.raises(UserError, match="out is .*out, which exists"):
        evaluate([str(run), "--val", str(val), "--out", str(tmp_path / "out")])


def test_which_checkpoint_is_taken_is_said_and_can_be_chosen(run_folder, val, tmp_path, capsys):
    run, models = run_folder
    for which, key in (("last", "newest"), ("best", "best")):
        arguments = [str(run), "--val", str(val), "--which", which, "--weights", "last", "--out", str(tmp_path / which)]
        assert evaluate(arguments) == 0
        found = json.loads((tmp_path / which / "evaluation.json").read_text())["weights"]
        judged = by_hand(models[key]["last"], val)
        assert list(found) == ["last"]
        assert found["last"]["correct"] == sum(label == logits.index(max(logits)) for label, logits in judged)
    named = run / "checkpoints" / "step-00000020"
    with pytest.raises(UserError, match="which is 'best' and .*step-00000020 is one checkpoint"):
        evaluate([str(named), "--val", str(val), "--which", "best"])
    assert "the newest of its run" in capsys.readouterr().out


def test_other_classes_are_refused_by_name(run_folder, tmp_path):
    other = write_classes(tmp_path / "val", {"blue": 1, "green": 1, "pink": 1})
    with pytest.raises(
        UserError, match="the classes of the checkpoint and val .* has class 'pink', .* lacks class 'red'"
    ):
        evaluate([str(run_folder[0]), "--val", str(other)])
    numbers = tmp_path / "list.txt"
    numbers.write_text(f"{next(other.rglob('*.png'))}\t0\n")
    with pytest.raises(UserError, match="the checkpoint have names and those of val .* are numbers alone"):
        evaluate([str(run_folder[0]), "--val", str(numbers)])


@pytest.mark.ranks
def test_two_ranks_count_each_image_once(run_folder, val, tmp_path):
    run, _ = run_folder
    command = ["-m", "mirl.engine.cli", "evaluate", run, "--val", val, "--threads", "1", "--batch-size", "4"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    together = subprocess.run(
        [*launcher, *map(str, [*command, "--out", tmp_path / "two"])],
        env=launch_environment() | {"PYTHONPATH": str(CHECKOUT)}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert together.returncode == 0, together.stderr[-3000:]
    assert evaluate([str(run), "--val", str(val), "--out", str(tmp_path / "one")]) == 0
    one, two = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("one", "two"))
    assert two["ranks"] == 2 and together.stdout.count("images evaluated") == 1
    for weights in ("last", "ema"):
        assert two["weights"][weights].pop("loss") == pytest.approx(one["weights"][weights].pop("loss"), rel=1e-6)
        assert two["weights"][weights] == one["weights"][weights]


def test_predictions_are_the_models(run_folder, val, tmp_path, capsys):
    run, models = run_folder
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    single = val / "red" / "01.png"
    listed = tmp_path / "list.txt"
    listed.write_text(f"{val / 'green' / '00.png'}\n")
    images = [single, val / "blue", tmp_path / "more", listed]
    for name in ("p.json", "p.csv"):
        assert (
            predict([str(run), *map(str, images), "--out", str(tmp_path / name), "--top", "2", "--batch-size", "4"])
            == 0
        )
    rows = json.loads((tmp_path / "p.json").read_text())
    paths = [str(single), *(str(path) for path in sorted((val / "blue").iterdir())), str(images[2] / "broken.jpg")]
    assert [row["image"] for row in rows] == [*paths, str(val / "green" / "00.png")]
    judged = [logits for label, logits in by_hand(models["best"]["ema"], val) if label == 0]
    for row, logits in zip(rows[1:8], judged, strict=True):
        expected = torch.tensor(logits).softmax(0).topk(2)
        assert [item["label"] for item in row["predictions"]] == expected.indices.tolist()
        assert [item["class"] for item in row["predictions"]] == [CLASSES[i] for i in expected.indices.tolist()]
        assert [item["probability"] for item in row["predictions"]] == pytest.approx(expected.values.tolist(), rel=1e-4)
    assert "predictions" not in rows[8] and rows[8]["error"]
    table = list(csv.DictReader((tmp_path / "p.csv").open()))
    assert [row["image"] for row in table] == [row["image"] for row in rows]
    assert [row["class_1"] for row in table[:8]] == [row["predictions"][0]["class"] for row in rows[:8]]
    assert table[8]["class_1"] == "" and table[8]["error"] == rows[8]["error"]
    assert "not read: " in capsys.readouterr().out
    with pytest.raises(UserError, match="out is .*p.csv, which exists"):
        predict([str(run), str(single), "--out", str(tmp_path / "p.csv")])
    with pytest.raises(UserError, match="nowhere.png does not exist: give image files"):
        predict([str(run), str(tmp_path / "nowhere.png")])


# --- kinds of checkpoints


@pytest.mark.parametrize("command", ["visualize", "depth-report"])
def test_a_classifier_is_refused_by_its_kind(command, run_folder, val, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rest = [str(val / "red" / "00.png")] if command == "visualize" else ["--data", str(val)]
    message = f"is a fine-tuned classifier of 3 classes, made from runs/fm: mirl {command} needs .*; give runs/fm"
    with pytest.raises(UserError, match=message):
        dispatch([command, str(run_folder[0]), *rest])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("load", [load_pretrained, load_frozen_encoder])
def test_python_says_the_same(load, tmp_path):
    write_classifier(tmp_path / "fine", seed=0, pool="avg")
    message = f"is a fine-tuned classifier of 3 classes.*: {load.__name__} needs .*; give runs/fm"
    with pytest.raises(UserError, match=message):
        load(tmp_path / "fine")


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_a_pre_trained_model_is_refused_by_its_kind(command, checkpoint, val):
    path = checkpoint(CONFIG)
    rest = ["--val", str(val)] if command == "evaluate" else [str(val)]
    message = (
        f"is a pre-trained model .*: mirl {command} needs a fine-tuned classifier; fine-tune .*--checkpoint {path}"
    )
    with pytest.raises(UserError, match=message):
        dispatch([command, str(path), *rest])


def test_probe_takes_the_features_that_the_head_sees(run_folder, val, tmp_path, capsys):
    run, _ = run_folder
    out = tmp_path / "probe.json"
    common = ["--data", str(val), "--val", str(val), "--knn-k", "3", "--epochs", "5", "--threads", "1"]
    assert dispatch(["probe", str(run), *common, "--json", str(out)]) == 0
    said = capsys.readouterr().out
    assert "a fine-tuned classifier of 3 classes, made from runs/fm; the best by validation" in said
    assert "features are those that its head sees (pool token)" in said
    assert json.loads(out.read_text())["kind"] == "classifier"
    with pytest.raises(UserError, match="pool is 'avg' and .* is a fine-tuned classifier: leave it out"):
        dispatch(["probe", str(run), *common, "--pool", "avg"])


@pytest.mark.process
@pytest.mark.parametrize("command", ["evaluate", "predict", "export", "probe", "visualize", "depth_report"])
def test_help_and_a_wrong_checkpoint_wait_for_no_torch(command):
    code = f"import mirl.engine.commands.{command}, sys; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=CHECKOUT, env=launch_environment(), capture_output=True, text=True
    )
    assert done.stdout.strip() == "False", done.stderr
