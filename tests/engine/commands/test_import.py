"""`mirl import` of MAE: equal to another implementation with the same weights, and what is refused."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from skimage import data
from torch import Tensor, nn

from mirl.engine.checkpoints.files import write_weights
from mirl.engine.checkpoints.pretrained import encoder_shapes, load_encoder, load_pretrained
from mirl.engine.checkpoints.reader import CheckpointReader
from mirl.engine.commands.import_weights import run as import_weights
from mirl.engine.commands.visualize import main as visualize
from mirl.errors import UserError
from tests.engine.models.helpers import make_inputs, make_model, tiny_config

MAE_HEADS = ["--heads", "3", "--decoder-heads", "2"]
# float32: sums in another order, of numbers near 1
FLOAT32 = 1e-5


@pytest.fixture(scope="module")
def huggingface() -> nn.Module:
    """A ViTMAEForPreTraining with random weights, biases and norms too."""
    # Earlier versions have other parameter names.
    transformers = pytest.importorskip(
        "transformers", minversion="5.23", reason="needs: pip install 'transformers>=5.23'"
    )
    torch.manual_seed(3)
    model = transformers.ViTMAEForPreTraining(
        transformers.ViTMAEConfig(
            hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, layer_norm_eps=1e-6,
            image_size=32, patch_size=8, decoder_hidden_size=16, decoder_num_attention_heads=2,
            decoder_num_hidden_layers=3, decoder_intermediate_size=64, norm_pix_loss=True,
        )
    ).eval()  # fmt: skip
    # Constructed without a checkpoint, it has zeros for positions; these are the two calls that fill them in.
    model.vit.embeddings.patch_embeddings.projection._is_hf_initialized = False
    model.vit.embeddings.initialize_weights()
    model.decoder.initialize_weights(16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def facebook_names(huggingface: nn.Module) -> dict[str, Tensor]:
    """Its weights and positions as facebookresearch/mae names them."""
    renames = [
        (r"vit\.embeddings\.position_embeddings", "pos_embed"),
        (r"vit\.embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
        (r"vit\.embeddings\.|decoder\.(?=mask_token|decoder_)", ""),
        (r"decoder_layers\.", "decoder_blocks."),
        (r"vit\.layers\.", "blocks."),
        (r"vit\.layernorm\.", "norm."),
        (r"layernorm_before", "norm1"),
        (r"layernorm_after", "norm2"),
        (r"attention\.o_proj", "attn.proj"),
    ]
    state = dict(huggingface.state_dict())
    for key in [key for key in state if ".q_proj." in key]:
        parts = [state.pop(key.replace(".q_proj.", f".{letter}_proj.")) for letter in "qkv"]
        state[key.replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
    renamed = {}
    for key, value in state.items():
        for pattern, name in renames:
            key = re.sub(pattern, name, key)
        renamed[key] = value
    return renamed


@pytest.fixture
def mae(huggingface) -> dict[str, Tensor]:
    return facebook_names(huggingface)


def save(state: dict[str, Tensor], folder: Path) -> str:
    torch.save({"model": state}, folder / "mae.pth")
    return str(folder / "mae.pth")


def test_a_full_mae_checkpoint(huggingface, mae, tmp_path):
    """Loss, and every predicted pixel in its place, equal to the other implementation's."""
    import_weights([save(mae, tmp_path), "--out", str(tmp_path / "imported"), *MAE_HEADS])
    model = load_pretrained(tmp_path / "imported")
    assert (model.config.objective, model.config.segments, model.config.decoder_depth) == ("mae", 1, 3)
    images, noise = torch.randn(3, 3, 32, 32), torch.rand(3, 16)
    with torch.no_grad():
        expected = huggingface(images, noise=noise)
        output = model(images, noise=noise, full=True)
    torch.testing.assert_close(output.loss, expected.loss, rtol=0, atol=FLOAT32)
    torch.testing.assert_close(output.predictions[0], expected.logits, rtol=0, atol=FLOAT32)


def test_it_can_be_visualised(mae, tmp_path, capsys):
    import_weights([save(mae, tmp_path), "--out", str(tmp_path / "imported"), *MAE_HEADS])
    Image.fromarray(data.astronaut()[:96, :96]).save(tmp_path / "image.png")
    out = tmp_path / "grid.png"
    assert visualize([str(tmp_path / "imported"), str(tmp_path / "image.png"), "--out", str(out)]) == 0
    assert Image.open(out).size > (32, 32)
    assert "masked-patch error" in capsys.readouterr().out


def test_raw_pixels_and_channel_statistics_are_taken_from_flags(mae, tmp_path):
    flags = ["--no-norm-pix", "--mean", "0.1", "0.2", "0.3", "--std", "1", "2", "3"]
    import_weights([save(mae, tmp_path), "--out", str(tmp_path / "imported"), *MAE_HEADS, *flags])
    config = load_pretrained(tmp_path / "imported").config
    assert (config.norm_pix, config.mean, config.std) == (False, (0.1, 0.2, 0.3), (1.0, 2.0, 3.0))


def test_an_encoder_alone(mae, tmp_path, capsys):
    encoder = {key: value for key, value in mae.items() if "decoder" not in key and key != "mask_token"}
    path, out = save(encoder, tmp_path), tmp_path / "imported"
    with pytest.raises(UserError, match="mae.pth is incomplete: no decoders; --allow-missing takes the encoder alone"):
        import_weights([path, "--out", str(out), "--heads", "3"])
    assert not out.exists()
    import_weights([path, "--out", str(out), "--heads", "3", "--allow-missing"])
    assert "the encoder alone (depth 2, width 24, heads 3, patch 8, image 32x32x3)" in capsys.readouterr().out
    config, weights = load_encoder(out)
    assert weights.keys() == encoder_shapes(config).keys() == encoder.keys() - {"pos_embed"}
    assert all(torch.equal(value, encoder[key]) for key, value in weights.items())
    with pytest.raises(UserError, match="holds an encoder alone: without decoders there is nothing to reconstruct"):
        load_pretrained(out)


def test_without_a_decoder_weight_only_the_encoder_is_taken(mae, tmp_path):
    del mae["decoder_blocks.1.mlp.fc1.bias"]
    path, out = save(mae, tmp_path), tmp_path / "imported"
    with pytest.raises(UserError, match=r"incomplete: decoders\.1\.blocks\.1\.mlp\.fc1\.bias is missing"):
        import_weights([path, "--out", str(out), *MAE_HEADS])
    import_weights([path, "--out", str(out), *MAE_HEADS, "--allow-missing"])
    assert len(load_encoder(out)[1]) == 2 * 12 + 5
    with pytest.raises(UserError, match="holds an encoder alone"):
        load_pretrained(out)


@pytest.mark.parametrize("flags", [[], ["--allow-missing"]])
@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("blocks.1.norm2.bias", None, r"encoder\.blocks\.1\.norm2\.bias is missing"),
        ("norm.weight", None, r"encoder\.norm\.weight is missing"),
        ("blocks.0.ls1.gamma", torch.ones(24), r"blocks\.0\.ls1\.gamma has no place in this encoder"),
        ("reg_token", torch.ones(1, 4, 24), "reg_token has no place in this encoder"),
        ("cls_token", torch.ones(1, 1, 20), r"cls_token has shape \[1, 1, 20\], encoder\.cls_token needs \[1, 1, 24\]"),
    ],
)
def test_an_encoder_that_is_not_whole_is_always_refused(flags, key, value, reason, mae, tmp_path):
    changed = {name: tensor for name, tensor in mae.items() if name != key}
    path = save(changed if value is None else changed | {key: value}, tmp_path)
    with pytest.raises(UserError, match=reason):
        import_weights([path, "--out", str(tmp_path / "imported"), *MAE_HEADS, *flags])
    assert os.listdir(tmp_path) == ["mae.pth"]


def test_only_the_encoders_tensors_are_read(mae, tmp_path, monkeypatch):
    import_weights([save(mae, tmp_path), "--out", str(tmp_path / "imported"), *MAE_HEADS])
    read, names = CheckpointReader.read, []
    monkeypatch.setattr(
        CheckpointReader, "read", lambda self, name, *rest: names.append(name) or read(self, name, *rest)
    )
    config, weights = load_encoder(tmp_path / "imported")
    assert names == [f"encoder.{name}" for name in weights] == [f"encoder.{name}" for name in encoder_shapes(config)]


def test_a_checkpoint_without_a_whole_encoder_is_none(mae, tmp_path):
    import_weights([save(mae, tmp_path), "--out", str(tmp_path / "imported"), *MAE_HEADS])
    reader = CheckpointReader(tmp_path / "imported")
    less = {name: value for name, value in reader.weights().items() if name != "encoder.blocks.1.mlp.fc2.weight"}
    write_weights(tmp_path / "less", less, reader.state)
    with pytest.raises(UserError, match=r"blocks\.1\.mlp\.fc2\.weight is missing and should be \[24, 96\]"):
        load_encoder(tmp_path / "less")
    write_weights(tmp_path / "nothing", less, {"config": {}})
    with pytest.raises(UserError, match=r"state\.json describes no model"):
        load_encoder(tmp_path / "nothing")


def test_a_classifiers_head_is_left_out_if_that_is_allowed(mae, tmp_path):
    path, out = save(mae | {"head.weight": torch.ones(10, 24), "head.bias": torch.ones(10)}, tmp_path), tmp_path / "out"
    with pytest.raises(UserError, match=r"head\.weight has no place in this model"):
        import_weights([path, "--out", str(out), *MAE_HEADS])
    import_weights([path, "--out", str(out), *MAE_HEADS, "--allow-missing"])
    assert load_pretrained(out).config.decoder_depth == 3


@pytest.mark.parametrize("key", ["pos_embed", "decoder_pos_embed"])
def test_other_positions_are_refused_by_name(key, mae, tmp_path):
    """Here with rows where MAE has columns, which no loss would show at once."""
    table = mae[key][:, 1:].unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2)
    path = save(mae | {key: torch.cat([mae[key][:, :1], table], dim=1)}, tmp_path)
    with pytest.raises(UserError, match=f"{key} is not the fixed sin-cos table of this model's image size"):
        import_weights([path, "--out", str(tmp_path / "imported"), *MAE_HEADS])


def test_rectangular_images_need_their_size(tmp_path):
    model = make_model(tiny_config(objective="mae", segments=1, did=False, decoder_depth=2), dtype=torch.float32)
    names = [(r"^encoder\.", ""), (r"^embeds\.1", "decoder_embed"), (r"^decoders\.1\.(blocks|norm)", r"decoder_\1"),
             (r"^decoders\.1\.head", "decoder_pred")]  # fmt: skip
    state = {"pos_embed": model.encoder.pos_embed[None]}
    for key, value in model.state_dict().items():
        for pattern, name in names:
            key = re.sub(pattern, name, key)
        state[key] = value
    path, out = save(state, tmp_path), tmp_path / "imported"
    with pytest.raises(UserError, match="pos_embed is of 24 patches, not a square of them: give --image-size HxW"):
        import_weights([path, "--out", str(out), *MAE_HEADS])
    with pytest.raises(UserError, match="pos_embed is not the fixed sin-cos table of this model's image size"):
        import_weights([path, "--out", str(out), *MAE_HEADS, "--image-size", "24x16"])
    import_weights([path, "--out", str(out), *MAE_HEADS, "--image-size", "16x24"])
    images, noise = make_inputs(model.config)
    with torch.no_grad():
        assert torch.equal(load_pretrained(out)(images, noise=noise).loss, model(images, noise=noise).loss)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ([], "2 blocks 24 wide and 1 decoders of 3 blocks 16 wide, no published size, .* give --heads and --decoder-"),
        (["--heads", "3"], "no published size, and weights do not tell the number of heads: give --decoder-heads"),
        (["--heads", "5", "--decoder-heads", "2"], "width is 24 and heads is 5: heads must divide width"),
        ([*MAE_HEADS, "--image-size", "wide"], "no image size"),
        ([*MAE_HEADS, "--mean", "0.5"], "mean has 1 values and channels is 3"),
    ],
)
def test_what_cannot_be_told_is_asked_for(flags, reason, mae, tmp_path):
    with pytest.raises(UserError, match=reason):
        import_weights([save(mae, tmp_path), "--out", str(tmp_path / "imported"), *flags])


def test_a_file_without_positions_needs_an_image_size(mae, tmp_path):
    del mae["pos_embed"]
    path, out = save(mae, tmp_path), tmp_path / "imported"
    with pytest.raises(UserError, match="no table pos_embed, which would tell the image size: give --image-size"):
        import_weights([path, "--out", str(out), *MAE_HEADS])
    import_weights([path, "--out", str(out), *MAE_HEADS, "--image-size", "32"])
    assert load_pretrained(out).config.image_width == 32
