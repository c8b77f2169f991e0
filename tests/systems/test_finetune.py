"""Whole fine-tuning runs, from a pre-trained checkpoint to a classifier that other libraries load."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from mirl.engine.checkpoints.best import read_best
from mirl.engine.checkpoints.pretrained import load_encoder
from mirl.engine.checkpoints.reader import CheckpointReader
from mirl.engine.cli import dispatch
from mirl.engine.configuration.flags import build_parser, parse
from mirl.engine.models.pixels import normalise_images
from mirl.engine.transfer.classification.command_line import FINETUNE
from mirl.engine.transfer.classification.load import load_classifier
from tests.support.runs import equal_tensors, losses, records

SHORT = [
    "--batch-size", "8", "--epochs", "4", "--warmup-steps", "1", "--lr", "3e-3", "--log-every", "1",
    "--no-tensorboard", "--loader-threads", "1", "--ema", "0.9", "--label-smoothing", "0", "--layer-decay", "0.9",
    "--seed", "20261122",
]  # fmt: skip
STEPS = 12


def write_labelled(root: Path, count: int, seed: int) -> Path:
    """Two classes that a colour tells apart, in noise."""
    rng = np.random.default_rng(seed)
    for label, colour in (("cold", (90, 120, 200)), ("warm", (210, 120, 70))):
        (root / label).mkdir(parents=True)
        for number in range(count):
            pixels = np.array(colour) + rng.normal(0, 40, (40, 40, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / label / f"{number:02d}.png")
    return root


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("labelled")
    found = {"train": write_labelled(root / "train", 13, 0), "val": write_labelled(root / "val", 7, 1)}
    other = write_labelled(root / "other", 2, 2)
    (other / "warm").rename(other / "hot")
    single = root / "single"
    (single / "cold").mkdir(parents=True)
    lines = []
    for number, path in enumerate(sorted((root / "train").rglob("*.png"))):
        path_there = single / "cold" / f"{number}.png"
        path_there.write_bytes(path.read_bytes())
        lines.append(f"{path}\t{7 * (number % 2)}\n")
    (root / "list.txt").write_text("".join(lines))
    return found | {"other": other, "single": single, "list": root / "list.txt"}


@pytest.fixture(scope="module")
def pretrained(_server, tmp_path_factory, folders) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    run = _server.start(folder, "--data", folders["train"], "--steps", 2, "--out", "run", ranks=1)
    assert run.end(60) == [0], run.output()[-3000:]
    return folder / "run"


def scores(out: Path) -> list[dict]:
    return [record for record in records(out) if "val_top1_percent" in record]


def test_two_ranks_resumed_in_bf16_under_zero2(server, pretrained, folders, tmp_path):
    """Stopped and resumed, average of the weights included, to the bit."""
    common = ["--checkpoint", pretrained, "--data", folders["train"], "--val", folders["val"], *SHORT]
    common += ["--checkpoint-every", "6", "--keep-checkpoints", "0", "--precision", "bf16"]
    common += ["--head-init", "random"]  # a probe is right for all of these images already
    whole = server.start(tmp_path, *common, "--out", "whole", entry="finetune")
    assert whole.end(120) == [0, 0], whole.output()[-3000:]
    again = [*common, "--out", "resumed", "--resume", "whole/checkpoints/step-00000006"]
    resumed = server.start(tmp_path, *again, entry="finetune")
    assert resumed.end(120) == [0, 0], resumed.output()[-3000:]
    one, other = tmp_path / "whole", tmp_path / "resumed"
    assert sorted(losses(other)) == list(range(7, STEPS + 1))
    assert losses(other) == {step: loss for step, loss in losses(one).items() if step > 6}
    last = f"checkpoints/step-{STEPS:08d}"
    assert equal_tensors(one / last, other / last)
    # After one step at the warm-up's rate the fp32 weights are near the pre-trained ones, closer than bf16 can tell.
    early = tmp_path / "early"
    first_step = server.start(
        tmp_path, *common, "--lr", "1e-9", "--epochs", 1, "--out", "early", ranks=1, entry="finetune"
    )
    assert first_step.end(60) == [0], first_step.output()[-3000:]
    name = "encoder.blocks.3.mlp.fc1.weight"
    before = load_encoder(pretrained)[1][name.removeprefix("encoder.")].flatten()
    newest = CheckpointReader(early / "checkpoints" / (early / "checkpoints" / "latest").read_text().strip())
    assert (newest.read(name, "weight", 0, before.numel()) - before).abs().max() < 1e-6
    averages = [CheckpointReader(out / last).read("head.weight", "ema", 0, 64) for out in (one, other)]
    assert torch.equal(*averages)
    smaller = server.start(tmp_path, *again, "--image-size", 48, "--out", "third", ranks=1, entry="finetune")
    assert smaller.end(60) == [2]
    assert "image_height is 48 and" in smaller.output() and "; image_width is 48, it was" in smaller.output()
    assert "as before, or accept the new value by --change image_height image_width" in smaller.output()
    # Evaluated after every epoch of three steps: weights and average, each image once on two ranks.
    found = scores(one)
    assert [record["step"] for record in found] == [3, 6, 9, 12]
    assert all(record["val_images"] == 14 and "val_ema_top1_percent" in record for record in found)
    assert found[-1]["val_top1_percent"] == 100.0
    assert scores(other)[-1] == found[-1]
    # The best of them, of either weights, is kept and named at the end.
    best = read_best(one / "checkpoints")
    assert best is not None and (one / "checkpoints" / best.checkpoint).is_dir()
    prefix = "val_ema_" if best.weights == "ema" else "val_"
    assert best.score_percent == max(max(r["val_top1_percent"], r["val_ema_top1_percent"]) for r in found)
    assert next(r for r in found if r["step"] == best.step)[prefix + "top1_percent"] == best.score_percent
    best_weights = load_classifier(one / "checkpoints" / best.checkpoint, weights=best.weights)[0].state_dict()
    newest = load_classifier(one, which="last", weights="ema")[0].state_dict()
    for name, tensor in load_classifier(one)[0].state_dict().items():
        assert torch.equal(tensor, best_weights[name])
    assert best.step == 12 or not torch.equal(newest["head.weight"], best_weights["head.weight"])
    said = (one / "log.txt").read_text()
    assert f"best        whole/checkpoints/{best.checkpoint}: epoch {best.step // 3}" in said
    assert "mirl evaluate whole --val VAL" in said and "mirl predict whole IMAGE ..." in said


@pytest.mark.parametrize("size", [None, "48"], ids=["same size", "other size"])
def test_exported_classifier_is_timms(server, pretrained, folders, tmp_path, size):
    out = tmp_path / "run"
    arguments = ["--checkpoint", pretrained, "--data", folders["train"], *SHORT, "--precision", "fp32", "--out", out]
    arguments += ["--rand-augment", "off", *(["--image-size", size] if size else [])]
    run = server.start(tmp_path, *arguments, ranks=1, entry="finetune")
    assert run.end(90) == [0], run.output()[-3000:]
    said = run.output()
    for weights in ("last", "ema"):
        target = tmp_path / f"timm-{weights}"
        export = ["export", out, "--to", "timm", "--out", target, "--weights", weights]
        assert dispatch([*map(str, export)]) == 0
        theirs = timm.create_model(f"local-dir:{target}", pretrained=True).eval()
        ours, config = load_classifier(out, weights=weights)
        assert config.classes == ("cold", "warm") and ours.config.image_height == int(size or 32)
        side = ours.config.image_height
        images = torch.randint(0, 256, (3, side, side, 3), generator=torch.Generator().manual_seed(0)).byte()
        with torch.no_grad():
            expected = theirs(normalise_images(images, ours.config.mean, ours.config.std, torch.float32))
            torch.testing.assert_close(ours(images), expected, rtol=1e-5, atol=1e-5)  # float32, other kernels
    second = ["--checkpoint", out, "--data", folders["train"], *SHORT, "--epochs", 1, "--out", tmp_path / "second"]
    again = server.start(tmp_path, *second, "--rand-augment", "off", ranks=1, entry="finetune")
    if size:
        assert "positions are resampled from 4x4 patches to 6x6 patches" in said
        assert again.end(60) == [2] and "with positions of its own" in again.output()
    else:
        assert again.end(60) == [0], again.output()[-3000:]


def test_truncated_and_fresh_blocks(server, folders, tmp_path):
    """A truncated model is fine-tuned in its full depth; --reinit-last replaces blocks; both are said."""
    truncated = ["--segments", 1, "--no-did", "--objective", "truncated", "--truncated-depth", 2]
    source = server.start(tmp_path, *truncated, "--data", folders["train"], "--steps", 1, "--out", "source", ranks=1)
    assert source.end(60) == [0], source.output()[-3000:]
    out = tmp_path / "run"
    arguments = ["--checkpoint", "source", "--data", folders["train"], *SHORT, "--epochs", "1", "--reinit-last", "1"]
    arguments += ["--rand-augment", "off", "--precision", "fp32", "--out", out]
    run = server.start(tmp_path, *arguments, ranks=1, entry="finetune")
    assert run.end(60) == [0], run.output()[-3000:]
    said = run.output()
    assert "blocks 2 to 3 are fresh: the model was pre-trained truncated to 2" in said
    assert "the last 1 of 4 blocks are initialised afresh" in said
    model, config = load_classifier(out)
    assert len(model.encoder.blocks) == 4 and config.source.truncated_depth == 2 and config.model.depth == 4
    assert json.loads((out / "config.json").read_text())["finetune"]["reinit_last"] == 1


MISTAKES = {
    "no data": (["--checkpoint", "{run}"], "data is not given"),
    "no checkpoint": (["--data", "{train}"], "checkpoint is not given"),
    "flat folder": (["--checkpoint", "{run}", "--data", "{train}/cold"], "num_classes is not given|label"),
    "too few classes": (["--checkpoint", "{run}", "--data", "{train}", "--num-classes", "1"], "the data has 2 classes"),
    "other classes": (["--checkpoint", "{run}", "--data", "{train}", "--val", "{other}"], "classes of data and val"),
    "one class": (["--checkpoint", "{run}", "--data", "{single}"], "num_classes is 1"),
    "label of a list": (
        ["--checkpoint", "{run}", "--data", "{list}", "--num-classes", "2"],
        "data has label 7 and num_classes is 2: give at least 8",
    ),
    "label of a list to evaluate on": (
        ["--checkpoint", "{run}", "--data", "{list}", "--val", "{list}", "--num-classes", "2"],
        "val has label 7 and there are 2 classes",
    ),
    "names and numbers": (
        ["--checkpoint", "{run}", "--data", "{train}", "--val", "{list}"],
        "classes of data have names and those of val are numbers alone, .*: give both as class folders",
    ),
    "resuming pre-training": (["--data", "{train}", "--resume", "{run}"], "is of pre-training: start from it by"),
    "too many fresh": (["--checkpoint", "{run}", "--data", "{train}", "--reinit-last", "9"], "reinit_last is 9"),
    "odd": (
        ["--checkpoint", "{run}", "--data", "{train}", "--batch-size", "7", "--mixup", "0.8"],
        "micro_batch is 7 and mixup",
    ),
    "layer decay": (["--layer-decay", "1.5"], "layer_decay is 1.5"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name, server, pretrained, folders, tmp_path):
    arguments, message = MISTAKES[name]
    filled = [text.format(run=pretrained, **folders) for text in arguments]
    # Given first, so that a case may give it again.
    first = ["--batch-size", "8", "--epochs", "1", "--warmup-epochs", "0", "--out", "out"]
    run = server.start(tmp_path, *first, *filled, ranks=1, entry="finetune")
    assert run.end(60) == [2], run.output()[-2000:]
    assert re.search(message, run.output()) and "Traceback" not in run.output()
    if name != "label of a list":  # found when its image is read
        assert not (tmp_path / "out").exists()


def test_flags_of_pretraining_alone_are_not_offered():
    options = {option for action in build_parser(FINETUNE)._actions for option in action.option_strings}
    assert {"--layer-decay", "--checkpoint", "--image-size", "--batch-size", "--resume"} <= options
    assert not {"--segments", "--init-from", "--vgg-weights", "--pictures"} & options
    config = parse(FINETUNE, ["--recipe", "vit_b_48", "--checkpoint", "x"])
    assert (config.optim.epochs, config.optim.warmup_epochs, config.finetune.layer_decay) == (60, 30, 0.88)


def test_a_run_begins_with_the_probe_and_says_how_it_ends_against_it(server, pretrained, folders, tmp_path):
    """On two ranks, which share the features; resumed, it is held against the same probe."""
    base = ["--checkpoint", pretrained, "--data", folders["train"], "--val", folders["val"], "--no-tensorboard"]
    base += ["--batch-size", 8, "--epochs", 2, "--loader-threads", 1, "--precision", "fp32", "--lr", "1e-7"]
    run = server.start(tmp_path, *base, "--out", "run", "--checkpoint-every", 3, entry="finetune")
    assert run.end(120) == [0, 0], run.output()[-3000:]
    said = run.output()
    (found,) = re.findall(r"head begins as the linear probe .* on 26 training images, top-1 ([0-9.]+)%", said)
    # At such a rate the classifier stays what it was: the probe, whose figure is taken by other code.
    assert scores(tmp_path / "run")[-1]["val_top1_percent"] == pytest.approx(float(found), abs=0.01)
    assert scores(tmp_path / "run")[-1]["val_start_probe_top1_percent"] == pytest.approx(float(found), abs=0.01)
    assert f"a linear probe of the encoder it began from has {found}%" in said and "NOT AS GOOD" not in said
    assert read_best(tmp_path / "run" / "checkpoints").step > 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["finetune"]["mixup"] == 0 and config["finetune"]["rand_augment"] == "off"
    assert config["data"]["centre_crops"] == 0.95 and config["finetune"]["head_init"] == "probe"
    longer = server.start(tmp_path, *base, "--epochs", 3, "--out", "run", "--resume", "auto", ranks=1, entry="finetune")
    assert longer.end(120) == [0], longer.output()[-3000:]
    assert f"a linear probe of the encoder it began from has {found}%" in longer.output()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["data"]["centre_crops"] == 0.95, "a resumed run keeps what its first start settled"
    spoiled = server.start(
        tmp_path, *base, "--lr", 10, "--clip-grad", 0, "--out", "bad", "--max-nonfinite-steps", 99, ranks=1,
        entry="finetune",
    )  # fmt: skip
    assert spoiled.end(120) == [0], spoiled.output()[-3000:]
    worse = max(record["val_top1_percent"] for record in scores(tmp_path / "bad")) < float(found) - 0.005
    assert ("NOT AS GOOD AS THE PROBE" in spoiled.output()) == worse
    assert (read_best(tmp_path / "bad" / "checkpoints").step == 0) == worse
