"""`mirl import`: what shapes tell of a model, and files that are not what they should be."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from torch import Tensor

from mirl.engine.commands.import_weights import run as import_weights
from mirl.engine.models.interop.mae import MAE
from mirl.engine.models.interop.match import infer_config
from mirl.engine.models.interop.release import RELEASE
from mirl.errors import UserError
from tests.support.files import CreatesFile


def published(depth: int, width: int, side: int, decoders: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The shapes of a published checkpoint at 224 pixels, without their memory."""
    shapes = {
        "patch_embed.proj.weight": (width, 3, side, side), "pos_embed": (1, 1 + (224 // side) ** 2, width), **decoders,
        **{f"blocks.{index}.mlp.fc1.bias": (4 * width,) for index in range(depth)},
    }  # fmt: skip
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


@pytest.mark.parametrize(
    ("name", "depth", "width", "side", "heads"),
    [("vit_b", 12, 768, 16, 12), ("vit_l", 24, 1024, 16, 16), ("custom", 32, 1280, 14, 16)],
)
def test_sizes_of_mae_are_known(name, depth, width, side, heads):
    decoder = {"decoder_embed.bias": (512,)}
    decoder |= {f"decoder_blocks.{index}.norm1.weight": (512,) for index in range(8)}
    config = infer_config(published(depth, width, side, decoder), MAE)
    assert (config.name, config.heads, config.decoder_heads, config.decoder_depth) == (name, heads, 16, 8)
    assert (config.image_height, config.patch_size, config.segments, config.did) == (224, side, 1, False)
    # One block less is no published size: nothing tells its heads.
    del decoder["decoder_blocks.7.norm1.weight"]
    with pytest.raises(ValueError, match="1 decoders of 7 blocks 512 wide, no published size.*: give --decoder-heads"):
        infer_config(published(depth, width, side, decoder), MAE)


@pytest.mark.parametrize(
    ("name", "depth", "width", "blocks", "decoder_width", "decoder_heads"),
    [("vit_b_48", 48, 768, 2, 512, 16), ("vit_s_54", 54, 384, 1, 384, 12)],
)
def test_sizes_of_the_release_are_known(name, depth, width, blocks, decoder_width, decoder_heads):
    decoders = {f"decoder_embed{g}.bias": (decoder_width,) for g in range(6)}
    decoders |= {f"decoder_blocks{g}.{i}.norm1.weight": (decoder_width,) for g in range(6) for i in range(blocks)}
    config = infer_config(published(depth, width, 16, decoders | {"decoder_embed0_1.weight": (1,)}), RELEASE)
    assert (config.name, config.heads, config.decoder_heads, config.segments) == (name, 12, decoder_heads, 6)
    assert (config.variant, config.did, config.decoder_depth) == ("release", True, blocks)
    assert not infer_config(published(depth, width, 16, decoders), RELEASE).did


# --- files that are not what they should be


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_file_is_run(zipped, tmp_path):
    path, ran = tmp_path / "evil.pth", tmp_path / "ran"
    torch.save(
        {"model": {"cls_token": torch.ones(1)}, "epoch": CreatesFile(ran)}, path, _use_new_zipfile_serialization=zipped
    )
    with pytest.raises(ValueError, match=r"evil\.pth cannot be read as a PyTorch checkpoint: it asks for") as told:
        import_weights([str(path), "--out", str(tmp_path / "imported")])
    assert "weights_only" not in str(told.value), "torch's advice to load it unsafely is passed on"
    assert not ran.exists()
    torch.load(path, weights_only=False)
    assert ran.exists(), "the test's file is harmless: it proves nothing"


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors", ".pd"])
@pytest.mark.parametrize("content", [b"", b"<html>", b"PK\x03\x04 cut"])
def test_a_file_of_another_kind_is_refused(suffix, content, tmp_path):
    path = tmp_path / f"file{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"file{suffix} cannot be read as a"):
        import_weights([str(path), "--out", str(tmp_path / "imported")])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"model": {"a": 3}}, "holds a int under 'a'"),
        ([torch.ones(2)], "holds a list and no state dict"),
        ({"fc.weight": torch.ones(2, 2)}, "it is no Vision Transformer"),
        ({"blocks.0.norm1.bias": torch.ones(4), "patch_embed.proj.weight": torch.ones(4, 48)}, "no convolution"),
    ],
)
def test_other_contents_are_refused(content, reason, tmp_path):
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=reason):
        import_weights([str(tmp_path / "file.pth"), "--out", str(tmp_path / "imported")])


@pytest.mark.parametrize("suffix", [".pth", ".pd"])
def test_a_small_file_cannot_claim_much_memory(suffix, tmp_path):
    path = tmp_path / f"file{suffix}"
    if suffix == ".pth":
        torch.save({"model": {"blocks.0.attn.qkv.weight": torch.ones(1).expand(1 << 20, 1 << 20)}}, path)
    else:

        class Repeated:
            def __reduce__(self) -> tuple:
                return np.ndarray, ((1 << 20, 1 << 20), "f4", bytes(4), 0, (0, 0))

        path.write_bytes(pickle.dumps({"model": {"blocks.0.attn.qkv.weight": Repeated()}}))
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.qkv\.weight claims 4398046511104"):
        import_weights([str(path), "--out", str(tmp_path / "imported")])


def test_a_few_shapes_do_not_make_a_large_model(tmp_path):
    state = {"patch_embed.proj.weight": torch.ones(1 << 16, 1, 2, 2), "blocks.0.norm1.bias": torch.ones(1)}
    torch.save(state | {"pos_embed": torch.ones(1, 5, 1)}, tmp_path / "file.pth")
    with pytest.raises(UserError, match="its encoder has .* weights and the file 262150"):
        import_weights([str(tmp_path / "file.pth"), "--out", str(tmp_path / "imported"), "--heads", "1"])


def test_nothing_is_written_over(tmp_path):
    (tmp_path / "imported").mkdir()
    torch.save({}, tmp_path / "file.pth")
    with pytest.raises(UserError, match="imported, which exists: give another folder"):
        import_weights([str(tmp_path / "file.pth"), "--out", str(tmp_path / "imported")])
    with pytest.raises(UserError, match=r"nowhere\.pth does not exist"):
        import_weights([str(tmp_path / "nowhere.pth"), "--out", str(tmp_path / "other")])
