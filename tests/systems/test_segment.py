"""Whole segmentation runs, from a pre-trained checkpoint to a segmenter that other libraries load."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mirl.dataloaders.pair_loader import PairReader
from mirl.dataloaders.sources.label_pairs import open_pairs
from mirl.engine.checkpoints.best import read_best
from mirl.engine.checkpoints.pretrained import load_encoder
from mirl.engine.checkpoints.reader import CheckpointReader
from mirl.engine.cli import dispatch
from mirl.engine.models.pixels import normalise_images
from mirl.engine.transfer.segmentation.evaluation import evaluate_segmenter
from mirl.engine.transfer.segmentation.load import load_segmenter, view_of
from mirl.engine.transfer.segmentation.task import BUFFER
from mirl.errors import UserError
from tests.support.runs import equal_tensors, losses, records
from tests.support.shapes import NAMES, write_shapes

SHORT = [
    "--batch-size", "4", "--steps", "6", "--warmup-steps", "1", "--lr", "3e-3", "--log-every", "1", "--no-tensorboard",
    "--loader-threads", "1", "--head-channels", "16", "--seed", "20261130", "--pictures", "2", "--picture-every", "6",
]  # fmt: skip


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    """train/ and val/; the images of val/ are of several sizes, so that they have several numbers of windows."""
    root = tmp_path_factory.mktemp("shapes")
    write_shapes(root / "train", 9)
    write_shapes(root / "val", 2, first=100)
    odd = write_shapes(root / "odd", 1, first=200, size=(40, 150))
    for folder in ("images", "labels"):
        (odd / folder / "00.png").rename(root / "val" / folder / "odd.png")
    return root


@pytest.fixture(scope="module")
def pretrained(_server, tmp_path_factory, photographs) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    run = _server.start(folder, "--data", photographs, "--steps", 1, "--pictures", 0, "--out", "run", ranks=1)
    assert run.end(60) == [0], run.output()[-3000:]
    return folder / "run"


def evaluations(out: Path) -> list[dict]:
    return [record for record in records(out) if "val_miou_percent" in record]


def start(server, folder, pretrained, sets, *arguments, **options):
    common = ["--checkpoint", pretrained, "--data", sets / "train", "--val", sets / "val", *SHORT]
    return server.start(folder, *common, *arguments, entry="segment", **options)


@pytest.fixture(scope="module")
def whole(_server, tmp_path_factory, pretrained, sets) -> Path:
    """A run of two ranks with batch norms, evaluated and saved after steps 3 and 6."""
    folder = tmp_path_factory.mktemp("whole")
    options = ["--norm", "batch", "--drop-path", "0.2", "--checkpoint-every", 3, "--keep-checkpoints", 0]
    run = start(_server, folder, pretrained, sets, *options, "--eval-every", 1.5, "--out", "run")
    assert run.end(120) == [0, 0], run.output()[-3000:]
    return folder / "run"


def test_a_resumed_run_equals_the_whole_one(server, whole, pretrained, sets, tmp_path):
    options = ["--norm", "batch", "--drop-path", "0.2", "--checkpoint-every", 3, "--keep-checkpoints", 0]
    resume = ["--eval-every", 1.5, "--out", "again", "--resume", whole / "checkpoints" / "step-00000003"]
    again = start(server, tmp_path, pretrained, sets, *options, *resume)
    assert again.end(120) == [0, 0], again.output()[-3000:]
    found = tmp_path / "again"
    assert losses(found) == {step: loss for step, loss in losses(whole).items() if step > 3}
    last = "checkpoints/step-00000006"
    assert equal_tensors(whole / last, found / last)
    names = [name for name, _ in load_segmenter(whole, which="last")[0].named_buffers()]
    one, other = (CheckpointReader(out / last) for out in (whole, found))
    assert len(names) == 28
    for name in names:
        before = CheckpointReader(whole / "checkpoints" / "step-00000003").read(name, BUFFER, 0, 16)
        assert torch.equal(one.read(name, BUFFER, 0, 16), other.read(name, BUFFER, 0, 16))
        assert not torch.equal(one.read(name, BUFFER, 0, 16), before)
    assert evaluations(found)[-1] == evaluations(whole)[-1]


def test_two_ranks_count_as_one_does(whole, sets):
    found = evaluations(whole)
    assert [record["step"] for record in found] == [3, 6] and found[-1]["val_images"] == 3
    model, config = load_segmenter(whole, which="last")
    assert config.classes == NAMES
    reader = PairReader(open_pairs([sets / "val"], [], split="val"), config.label_map, channels=3)
    scores = evaluate_segmenter(model, reader, view_of(config), torch.device("cpu"))
    assert sum(map(sum, scores.confusion)) == 2 * 46 * 64 + 38 * 150  # without the two ignored rows of each
    assert scores.metrics() == {name: found[-1][name] for name in scores.metrics()}
    ious = dict(zip(NAMES, scores.iou_percent(), strict=True))
    assert {name: found[-1][f"val_iou_percent/{name}"] for name in NAMES} == ious
    best = read_best(whole / "checkpoints")
    assert best is not None and best.metric == "mIoU"
    assert best.score_percent == max(record["val_miou_percent"] for record in found)
    picture = Image.open(whole / "pictures" / "step-00000006.png")
    assert picture.width > 3 * 192 and picture.height > 2 * 192
    assert "mIoU" in (whole / "log.txt").read_text() and "labels: 3 classes" in (whole / "log.txt").read_text()


def test_ranks_with_other_numbers_of_windows_wait_for_each_other_under_zero3(server, pretrained, sets, tmp_path):
    # Every parameter is parted, however small, so that each pass gathers all of them.
    zero = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    (tmp_path / "zero3.json").write_text(json.dumps(zero))
    run = start(
        server, tmp_path, pretrained, sets, "--steps", 1, "--warmup-steps", 0, "--deepspeed_config", "zero3.json",
        "--activation-checkpointing", "every", "--out", "run",
    )  # fmt: skip
    assert run.end(120) == [0, 0], run.output()[-3000:]
    (found,) = evaluations(tmp_path / "run")
    model, config = load_segmenter(tmp_path / "run")
    reader = PairReader(open_pairs([sets / "val"], [], split="val"), config.label_map, channels=3)
    scores = evaluate_segmenter(model, reader, view_of(config), torch.device("cpu"))
    assert scores.metrics() == {name: found[name] for name in scores.metrics()}


def test_what_the_labels_hold_is_seen_before_anything_is_written(server, pretrained, sets, tmp_path):
    wrong = write_shapes(tmp_path / "wrong", 4)
    pixels = np.array(Image.open(wrong / "labels" / "02.png"))
    pixels[7, 7] = 99
    Image.fromarray(pixels).save(wrong / "labels" / "02.png")
    run = server.start(
        tmp_path, "--checkpoint", pretrained, "--data", wrong, *SHORT, "--out", "run", entry="segment",
    )  # fmt: skip
    assert run.end(60) == [2, 2]
    (line,) = [line for line in run.output().splitlines() if line.startswith("error:")]
    assert "labels/02.png has value 99 in 1 pixels" in line and "--ignore 99" in line
    assert not (tmp_path / "run").exists()


def test_its_encoder_starts_another_run(whole, pretrained):
    config, encoder = load_encoder(whole)
    source, before = load_encoder(pretrained)
    assert config.grid == source.grid and set(before) - set(encoder) == {"norm.weight", "norm.bias"}
    assert not torch.equal(encoder["blocks.3.mlp.fc1.weight"], before["blocks.3.mlp.fc1.weight"])


def test_its_exports_are_read_by_others(whole, sets, tmp_path, capsys):
    model, _ = load_segmenter(whole)
    images = torch.randint(0, 256, (2, 32, 32, 3), generator=torch.Generator().manual_seed(0)).byte()

    def export(to: str, name: str) -> Path:
        assert dispatch(["export", str(whole), "--to", to, "--out", str(tmp_path / name)]) == 0
        return tmp_path / name

    transformers = pytest.importorskip("transformers", reason="an extra of the tests: pip install mirl-engine[test]")
    theirs = transformers.UperNetForSemanticSegmentation.from_pretrained(export("hf", "hf")).eval()
    pixels = normalise_images(images, model.config.mean, model.config.std, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(images), theirs(pixels).logits, atol=1e-4, rtol=1e-4)  # float32, other sums
    assert theirs.config.id2label == dict(enumerate(NAMES))

    state = torch.load(export("mmseg", "seg.pth"))["state_dict"]
    assert torch.equal(state["backbone.layers.2.ffn.layers.0.0.weight"], model.encoder.blocks[2].mlp.fc1.weight)
    assert torch.equal(state["backbone.layers.0.ln1.bias"], model.encoder.blocks[0].norm1.bias)
    assert torch.equal(state["neck.upsample_4x.3.weight"], model.pyramid.fpn1[3].weight)
    assert state["backbone.pos_embed"].shape == (1, 17, 32) and "decode_head.psp_modules.1.1.bn.running_var" in state
    assert len(state) == len(model.state_dict()) + 1

    # Names of mae_pretrain_vit_*.pth, but for the norm behind the last block, which a segmenter has not.
    mae = torch.load(export("mae", "mae.pth"))["model"]
    assert {name for name in mae if not name.startswith("blocks.")} == {
        "cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"
    }  # fmt: skip
    assert {name[len("blocks.0.") :] for name in mae if name.startswith("blocks.0.")} == {
        f"{layer}.{kind}"
        for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        for kind in ("weight", "bias")
    }
    said = capsys.readouterr().out
    assert "out_indices=[0, 1, 2, 3]" in said and "window_block_indexes" in said and "num_classes=3" in said
    with pytest.raises(UserError, match="give hf, mmseg, mae or safetensors"):
        export("timm", "timm")
    with pytest.raises(UserError, match=r"ends in \.pth"):
        export("mae", "mae.bin")


def test_predictions_are_pictures_and_numbers(whole, sets, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"nothing")
    image = sets / "val" / "images" / "odd.png"
    out = tmp_path / "out"
    assert dispatch(["predict", str(whole), str(image), str(broken), str(image), "--out", str(out)]) == 0
    first, second, third = json.loads((out / "predictions.json").read_text())
    assert "error" in second and third["overlay"].endswith("odd-2.png")
    labels = np.array(Image.open(first["labels"]))
    assert labels.shape == (40, 150) and sum(item["pixels"] for item in first["classes"]) == labels.size
    assert {item["label"]: item["pixels"] for item in first["classes"]} == {
        int(value): int((labels == value).sum()) for value in np.unique(labels)
    }
    assert sum(item["share"] for item in first["classes"]) == pytest.approx(1)
    assert Image.open(first["overlay"]).height > 192
    for arguments, message in ((["--out", out], "which exists"), ([], "not given"), (["--out", "x.csv"], "a folder")):
        with pytest.raises(UserError, match=message):
            dispatch(["predict", str(whole), str(image), *map(str, arguments)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "{sets}/train/images"], "give --labels FOLDER"),
        (["--data", "{sets}/train", "--val", "{tmp}/renamed"], "label value 1 is 'disc' in data and 'ball' in val"),
        (["--data", "{tmp}/coco.json"], "which are for detection"),
        (["--data", "{tmp}/empty.txt"], "is empty"),
        (["--data", "{sets}/train", "--label-map", "cityscape"], "label_map is 'cityscape': no such file"),
        (["--data", "{sets}/train", "--val-labels", "{sets}/val/labels"], "val_labels is given and val is not"),
        (["--data", "{sets}/train", "--checkpoint", "{tmp}/nowhere"], "nowhere"),
        (["--data", "{sets}/train", "--scale", "2", "1"], "scale is"),
    ],
)
def test_a_run_that_cannot_be_is_told_at_once(pretrained, sets, tmp_path, arguments, message):
    (tmp_path / "coco.json").write_text(json.dumps({"images": [], "annotations": [], "categories": []}))
    (tmp_path / "empty.txt").write_text("")
    renamed = write_shapes(tmp_path / "renamed", 1)
    (renamed / "label-map.txt").write_text("0 ground\n1 ball\n2 box\n255 ignore\n")
    places = {"sets": sets, "tmp": tmp_path}
    given = [argument.format(**places) for argument in arguments]
    with pytest.raises(UserError, match=message) as refused:
        dispatch(["segment", "--checkpoint", str(pretrained), *given, "--out", str(tmp_path / "run")])
    assert "\n" not in str(refused.value) and not (tmp_path / "run").exists()
