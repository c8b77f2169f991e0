"""`mirl import` of weights that other programs saved: prefixes, a teacher beside a student, other names, NaN."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mirl.engine.checkpoints.pretrained import load_pretrained
from mirl.engine.commands.import_weights import run as import_weights
from mirl.engine.models import MIRL
from mirl.engine.models.interop.prefixes import strip_prefixes
from mirl.errors import UserError
from tests.engine.models.helpers import make_model, tiny_config

FLAGS = ["--heads", "3", "--decoder-heads", "2", "--image-size", "16x24"]
NAMES = [
    (r"^encoder\.", ""), (r"^embeds\.1", "decoder_embed"), (r"^decoders\.1\.(blocks|norm)", r"decoder_\1"),
    (r"^decoders\.1\.head", "decoder_pred"),
]  # fmt: skip


@pytest.fixture(scope="module")
def model() -> MIRL:
    return make_model(tiny_config(objective="mae", segments=1, did=False, decoder_depth=2), dtype=torch.float32)


@pytest.fixture
def mae(model) -> dict[str, Tensor]:
    state = {"pos_embed": model.encoder.pos_embed[None]}
    for key, value in model.state_dict().items():
        for pattern, name in NAMES:
            key = re.sub(pattern, name, key)
        state[key] = value
    return state


def imported(content: object, folder: Path, *flags: str) -> dict[str, Tensor]:
    torch.save(content, folder / "file.pth")
    import_weights([str(folder / "file.pth"), "--out", str(folder / "imported"), *FLAGS, *flags])
    return load_pretrained(folder / "imported").state_dict()


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
@pytest.mark.parametrize(
    ("prefix", "told"),
    [
        ("module.", None),
        ("_orig_mod.", "'_orig_mod.' of torch.compile is taken off"),
        ("module._orig_mod.", "'_orig_mod.' of torch.compile is taken off"),
        ("_orig_mod.module.", "'module.' is taken off"),
        ("backbone.", "'backbone.' is taken off"),
        ("encoder.", "'encoder.' is taken off"),
        ("model.", "'model.' is taken off"),
        ("model.image_tower._orig_mod.", "'model.image_tower.' is taken off"),
    ],
)
def test_what_other_programs_put_before_the_names_is_taken_off(wrapper, prefix, told, model, mae, tmp_path, capsys):
    state = {prefix + key: value for key, value in mae.items()}
    assert equal(imported({wrapper: state} if wrapper else state, tmp_path), model.state_dict())
    lines = [line for line in capsys.readouterr().out.splitlines() if "taken off" in line]
    assert len(lines) == (told is not None) and all(told in line and "file.pth: " in line for line in lines)


def test_blocks_compiled_one_by_one(model, mae, tmp_path):
    state = {re.sub(r"^(blocks\.\d+)\.", r"\1._orig_mod.", key): value for key, value in mae.items()}
    assert equal(imported(state, tmp_path), model.state_dict())


@pytest.mark.parametrize("form", ["two dicts", "one dict"])
def test_of_a_student_and_a_teacher_the_teacher_is_taken(form, model, mae, tmp_path, capsys):
    """DINO's files hold two dicts, DINOv2's and iBOT's one."""
    pair = {"student": {key: value + 1 for key, value in mae.items()}, "teacher": mae}
    content: dict = {name: {f"module.backbone.{key}": value for key, value in pair[name].items()} for name in pair}
    if form == "one dict":
        content = {"model": {f"{name}.{key}": value for name in pair for key, value in content[name].items()}}
    assert equal(imported(content | {"epoch": 3}, tmp_path), model.state_dict())
    assert "the teacher's weights are taken" in (told := capsys.readouterr().out) or (
        "of 2 encoders 'teacher.module.backbone.' is taken, 'student.module.backbone.' left out" in told
    )


def test_a_classifier_around_the_encoder_needs_the_leave_to_drop_its_head(model, mae, tmp_path):
    state = {f"backbone.{key}": value for key, value in mae.items()} | {"head.weight": torch.ones(5, 24)}
    with pytest.raises(UserError, match=r"head\.weight has no place in this model.*--allow-missing"):
        imported(state, tmp_path)
    assert equal(imported(state, tmp_path, "--allow-missing"), model.state_dict())


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (["vit.embeddings.patch_embeddings.projection.weight"], "those of Hugging Face's transformers (vit.embeddings"),
        (["visual.conv1.weight", "visual.class_embedding"], "those of CLIP (visual.conv1.weight)"),
        (["layer4.2.conv3.weight"], "those of a ResNet"),
        (["net.a.weight"], "its keys begin with 'net.a.weight': it is no Vision Transformer"),
        (["a.patch_embed.proj.weight", "b.patch_embed.proj.weight"], "it holds 2 encoders, 'a.', 'b.'"),
        (["patch_embed.proj.weight", "norm.bias", "_orig_mod.norm.bias"], "it holds norm.bias with a prefix and with"),
        (["b.patch_embed.proj.weight", "b.norm.bias", "norm.bias"], "it holds norm.bias with a prefix and without"),
    ],
)
def test_what_cannot_be_taken_off_is_named(keys, told, tmp_path):
    torch.save({key: torch.ones(2, 2) for key in keys}, tmp_path / "file.pth")
    with pytest.raises(UserError) as caught:
        import_weights([str(tmp_path / "file.pth"), "--out", str(tmp_path / "imported"), *FLAGS])
    assert told in str(caught.value) and "file.pth: " in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "imported").exists()


def test_a_bare_encoder_is_taken_before_others():
    state = {
        key: torch.ones(1) for key in ("patch_embed.proj.weight", "model_ema.patch_embed.proj.weight", "norm.bias")
    }
    stripped, notes = strip_prefixes(state)
    assert stripped.keys() == {"patch_embed.proj.weight", "norm.bias"}
    assert notes == ["of 2 encoders 'the bare one' is taken, 'model_ema.' left out"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", ["blocks.0.mlp.fc1.weight", "decoder_pred.bias", "cls_token", "pos_embed"])
@pytest.mark.parametrize("flags", [[], ["--allow-missing"]])
def test_weights_that_are_no_numbers_are_refused_by_name(key, bad, flags, mae, tmp_path):
    broken = mae[key].clone()
    broken.view(-1)[:3] = bad
    with pytest.raises(UserError) as caught:
        imported(mae | {key: broken}, tmp_path, *flags)
    found = f"{key} holds 3 of {broken.numel()} numbers that are NaN or infinite"
    assert ("pos_embed is not the fixed" if key == "pos_embed" else found) in str(caught.value)
    assert not (tmp_path / "imported").exists()
