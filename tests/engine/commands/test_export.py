"""`mirl export`: the real libraries load what it writes and compute the same features."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from mirl.engine.checkpoints.files import write_weights
from mirl.engine.checkpoints.pretrained import load_encoder
from mirl.engine.commands.export import run
from mirl.engine.commands.export_formats import Exported, export_hf, export_timm
from mirl.engine.models import MIRL, ModelConfig, PatchMask
from mirl.engine.models.encoder import Encoder
from mirl.engine.models.interop.timm_keys import timm_arguments
from mirl.engine.models.positions import resample_positions
from mirl.engine.transfer.classification.classifier import Classifier
from mirl.engine.transfer.classification.config import FinetuneConfig
from mirl.engine.transfer.classification.load import load_classifier
from mirl.errors import UserError
from tests.engine.models.helpers import make_model, tiny_config

# float32: sums in another order, of numbers near 1
FLOAT32 = 1e-5
SIZES = [(16, 24), (32, 16)]  # the trained one, and one on whose grid 4x6 positions are both stretched and shrunk


def checkpoint_of(model: MIRL, folder: Path) -> Path:
    state = {"step": 0, "config": {"model": dataclasses.asdict(model.config)}}
    write_weights(folder / "checkpoint", dict(model.named_parameters()), state)
    return folder / "checkpoint"


@pytest.fixture(params=[3, 1], ids=["C=3", "C=1"])
def model(request) -> MIRL:
    return make_model(tiny_config(channels=request.param), dtype=torch.float32).eval()


@pytest.fixture
def checkpoint(model, tmp_path) -> Path:
    return checkpoint_of(model, tmp_path)


def images_of(config: ModelConfig, size: tuple[int, int]) -> Tensor:
    return torch.randn(2, config.channels, *size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def our_tokens(checkpoint: Path, images: Tensor) -> Tensor:
    """All tokens after the final norm, every patch visible, positions resampled: [B, 1 + N, D]."""
    config, weights = load_encoder(checkpoint)
    height, width = images.shape[-2:]
    plain = {"segments": 1, "did": False, "objective": "mae"}
    encoder = Encoder(dataclasses.replace(config, image_height=height, image_width=width, **plain)).eval()
    encoder.load_state_dict(weights, strict=True)
    encoder.pos_embed = resample_positions(
        MIRL(config).encoder.pos_embed, config.grid, (height // config.patch_size, width // config.patch_size)
    )
    ids = torch.arange(encoder.config.num_patches).expand(len(images), -1)
    (tokens,) = encoder(images, PatchMask(ids_keep=ids, ids_masked=ids[:, :0], ids_restore=ids))
    return tokens


def size_flag(size: tuple[int, int]) -> list[str]:
    return ["--image-size", f"{size[0]}x{size[1]}"]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("pool", ["avg", "token"])
def test_timm_computes_the_same_features(size, pool, model, checkpoint, tmp_path):
    timm = pytest.importorskip("timm", reason="needs: pip install timm")
    out = tmp_path / "timm"
    run([str(checkpoint), "--to", "timm", "--out", str(out), "--pool", pool, *size_flag(size)])
    description = json.loads((out / "config.json").read_text())
    assert description["pretrained_cfg"]["mean"] == list(model.config.mean)
    assert description["pretrained_cfg"]["std"] == list(model.config.std)
    images = images_of(model.config, size)
    expected = our_tokens(checkpoint, images)
    built = timm.models.VisionTransformer(**description["model_args"]).eval()
    built.load_state_dict(load_file(out / "model.safetensors"), strict=True)
    created = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    for vit in (built, created):
        with torch.no_grad():
            torch.testing.assert_close(vit.forward_features(images), expected, rtol=0, atol=FLOAT32)
            pooled = expected[:, 1:].mean(1) if pool == "avg" else expected[:, 0]
            torch.testing.assert_close(vit(images), pooled, rtol=0, atol=FLOAT32)


@pytest.mark.parametrize("size", SIZES)
def test_transformers_computes_the_same_features(size, model, checkpoint, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs: pip install transformers")
    out = tmp_path / "hf"
    run([str(checkpoint), "--to", "hf", "--out", str(out), *size_flag(size)])
    images = images_of(model.config, size)
    vit, loading = transformers.ViTModel.from_pretrained(out, add_pooling_layer=False, output_loading_info=True)
    assert not any(loading.values()), loading
    with torch.no_grad():
        tokens = vit.eval()(images).last_hidden_state
    torch.testing.assert_close(tokens, our_tokens(checkpoint, images), rtol=0, atol=FLOAT32)
    processor = transformers.AutoImageProcessor.from_pretrained(out)
    assert (processor.size["height"], processor.size["width"]) == size
    assert (tuple(processor.image_mean), tuple(processor.image_std)) == (model.config.mean, model.config.std)


def test_one_file_with_everything_in_its_header(model, checkpoint, tmp_path):
    out = tmp_path / "encoder.safetensors"
    run([str(checkpoint), "--to", "safetensors", "--out", str(out)])
    with safe_open(out, framework="pt") as file:
        header = {name: json.loads(value) for name, value in file.metadata().items() if name != "format"}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    weights = load_encoder(checkpoint)[1]
    assert tensors.keys() == weights.keys() | {"pos_embed"}
    assert all(torch.equal(tensors[key], value) for key, value in weights.items())
    assert torch.equal(tensors["pos_embed"][0], model.encoder.pos_embed)
    assert (header["image_size"], header["norm_eps"]) == ([16, 24], 1e-6)
    assert header["model"]["heads"] == model.config.heads


def test_a_truncated_model_is_exported_as_deep_as_it_is(tmp_path):
    timm = pytest.importorskip("timm", reason="needs: pip install timm")
    config = tiny_config(objective="truncated", truncated_depth=3, segments=1, did=False)
    checkpoint, out = checkpoint_of(make_model(config, dtype=torch.float32), tmp_path), tmp_path / "timm"
    run([str(checkpoint), "--to", "timm", "--out", str(out)])
    vit = timm.models.VisionTransformer(**json.loads((out / "config.json").read_text())["model_args"])
    assert len(vit.blocks) == 3
    vit.load_state_dict(load_file(out / "model.safetensors"), strict=True)


# --- classifiers


def classifier(checkpoint: Path, *, norm_after_pool: bool, **changed: Tensor) -> dict:
    """Arguments of `Exported` for an encoder with a head of five classes."""
    config, encoder = load_encoder(checkpoint)
    torch.manual_seed(2)
    head = {"head.weight": torch.randn(5, config.width), "head.bias": torch.randn(5)}
    if norm_after_pool:
        head |= {"fc_norm.weight": torch.randn(config.width), "fc_norm.bias": torch.randn(config.width)}
        encoder = {key: value for key, value in encoder.items() if not key.startswith("norm.")}
    size = (config.image_height, config.image_width)
    return {"encoder": encoder | changed, "config": config, "image_size": size, "head": head}


def test_a_classifier_for_timm(checkpoint, tmp_path):
    """Mean of the tokens, then its norm, then the head, on positions of its own."""
    timm = pytest.importorskip("timm", reason="needs: pip install timm")
    parts = classifier(checkpoint, norm_after_pool=True, pos_embed=torch.randn(25, 24))
    export_timm(tmp_path / "timm", Exported(pool="avg", **parts))
    vit = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    assert torch.equal(vit.pos_embed[0], parts["encoder"]["pos_embed"])
    images, head = images_of(parts["config"], (16, 24)), parts["head"]
    with torch.no_grad():
        pooled = vit.forward_features(images)[:, 1:].mean(1)
        normed = torch.nn.functional.layer_norm(pooled, (24,), head["fc_norm.weight"], head["fc_norm.bias"], 1e-6)
        expected = normed @ head["head.weight"].T + head["head.bias"]
        torch.testing.assert_close(vit(images), expected, rtol=0, atol=FLOAT32)


@pytest.mark.parametrize("norm_after_pool", [True, False])
def test_a_classifier_for_transformers(norm_after_pool, checkpoint, tmp_path):
    """The class token through the norm, which pooling it first does not change, then the head: timm's logits."""
    timm = pytest.importorskip("timm", reason="needs: pip install timm")
    transformers = pytest.importorskip("transformers", reason="needs: pip install transformers")
    exported = Exported(pool="token", **classifier(checkpoint, norm_after_pool=norm_after_pool))
    export_timm(tmp_path / "timm", exported)
    export_hf(tmp_path / "hf", exported)
    vit = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    other, loading = transformers.ViTForImageClassification.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(loading.values()), loading
    images = images_of(exported.config, (16, 24))
    with torch.no_grad():
        torch.testing.assert_close(other.eval()(images).logits, vit(images), rtol=0, atol=FLOAT32)


def test_a_mean_pooled_classifier_is_not_one_of_transformers(checkpoint, tmp_path):
    parts = classifier(checkpoint, norm_after_pool=True)
    with pytest.raises(ValueError, match="ViTForImageClassification reads the class token"):
        export_hf(tmp_path / "hf", Exported(pool="avg", **parts))
    assert timm_arguments(parts["config"], head=parts["head"])["num_classes"] == 5


@pytest.fixture
def fine_tuned(model, tmp_path):
    """Makes a checkpoint of fine-tuning with two of three classes named."""

    def make(pool: str) -> Path:
        torch.manual_seed(2)
        trained = Classifier(model.config, num_classes=3, pool=pool)
        settings = {name: {} for name in FinetuneConfig.sections()} | {"recipe": "", "finetune": {"pool": pool}}
        settings["optim"] = {"epochs": 1}
        config = dataclasses.asdict(model.config)
        settings |= {"classes": ["cat", "dog"], "source": config, "model": config}
        state = {"step": 0, "config": settings}
        write_weights(tmp_path / "fine", dict(trained.named_parameters()), state)
        return tmp_path / "fine"

    return make


def test_names_of_classes_are_exported(fine_tuned, tmp_path):
    checkpoint = fine_tuned("token")
    for kind, name in (("timm", "timm"), ("hf", "hf"), ("safetensors", "file.safetensors")):
        run([str(checkpoint), "--to", kind, "--out", str(tmp_path / name)])
    assert json.loads((tmp_path / "timm" / "config.json").read_text())["label_names"] == ["cat", "dog"]
    described = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert described["id2label"] == {"0": "cat", "1": "dog", "2": "LABEL_2"}
    assert described["label2id"] == {"cat": 0, "dog": 1, "LABEL_2": 2}
    with safe_open(tmp_path / "file.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["classes"]) == ["cat", "dog"]


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_the_encoder_of_a_classifier_gives_its_features(pool, fine_tuned, model, tmp_path):
    timm = pytest.importorskip("timm", reason="needs: pip install timm")
    checkpoint, images = fine_tuned(pool), images_of(model.config, (16, 24))
    run([str(checkpoint), "--to", "timm", "--out", str(tmp_path / "timm"), "--encoder-only"])
    vit = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    assert vit.num_classes == 0
    with torch.no_grad():
        expected = load_classifier(checkpoint)[0].features(images)
        torch.testing.assert_close(vit(images), expected, rtol=0, atol=FLOAT32)
    to_hf = [str(checkpoint), "--to", "hf", "--out", str(tmp_path / "hf"), "--encoder-only"]
    if pool == "avg":
        with pytest.raises(ValueError, match="its norm after the pooling, and ViTModel needs one before it"):
            run(to_hf)
        return
    transformers = pytest.importorskip("transformers", reason="needs: pip install transformers")
    run(to_hf)
    vit = transformers.ViTModel.from_pretrained(tmp_path / "hf", add_pooling_layer=False).eval()
    with torch.no_grad():
        torch.testing.assert_close(vit(images).last_hidden_state[:, 0], expected, rtol=0, atol=FLOAT32)


# --- what is refused


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--to", "timm", "--out", "taken"], "taken, which exists: give another name"),
        (["--to", "safetensors", "--out", "folder"], "give a file name that ends in .safetensors"),
        (["--to", "hf", "--out", "hf", "--pool", "avg"], "an encoder is pooled in timm, onnx, torch-export alone"),
        (
            ["--to", "hf", "--out", "hf", "--image-size", "30"],
            "image_size is 30x30 and patch_size is 4: give multiples",
        ),
        (["--to", "tflite", "--out", "file"], "invalid choice: 'tflite'"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(flags, reason, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    with pytest.raises(ValueError, match=reason):
        run([str(checkpoint), *flags])
    assert sorted(os.listdir(tmp_path)) == ["checkpoint", "taken"]


def test_a_failed_write_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    def fail(*arguments: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("mirl.engine.commands.export_formats.write_json", fail)
    with pytest.raises(OSError, match="no space left"):
        run([str(checkpoint), "--to", "timm", "--out", str(tmp_path / "timm")])
    assert os.listdir(tmp_path) == ["checkpoint"]


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        run([str(tmp_path / "nowhere"), "--to", "timm", "--out", str(tmp_path / "timm")])
