"""G = 1 without DID is MAE: equal to Hugging Face's ViTMAEForPreTraining with the same weights and the same noise."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from mirl.engine.models import MIRL
from tests.engine.models.helpers import gradients, make_inputs, make_model, tiny_config

# float64; only the order of sums differs
FLOAT64 = 1e-10


def huggingface_model(model: MIRL) -> nn.Module:
    """A ViTMAEForPreTraining of the size and with the weights of ``model``."""
    # Earlier versions have other parameter names.
    transformers = pytest.importorskip(
        "transformers", minversion="5.23", reason="needs: pip install 'transformers>=5.23'"
    )
    config = model.config
    other = transformers.ViTMAEForPreTraining(
        transformers.ViTMAEConfig(
            hidden_size=config.width, num_hidden_layers=config.depth, num_attention_heads=config.heads,
            intermediate_size=config.mlp_width, layer_norm_eps=1e-6, image_size=config.image_height,
            patch_size=config.patch_size, num_channels=config.channels, decoder_hidden_size=config.decoder_width,
            decoder_num_attention_heads=config.decoder_heads, decoder_num_hidden_layers=config.decoder_depth,
            decoder_intermediate_size=config.decoder_mlp_width, mask_ratio=config.mask_ratio,
            norm_pix_loss=config.norm_pix, attn_implementation="sdpa",  # its eager softmax rounds to float32
        )
    ).double()  # fmt: skip
    # Constructed without a checkpoint, it has zeros for positions; these are the two calls that fill them in.
    other.vit.embeddings.patch_embeddings.projection._is_hf_initialized = False
    other.vit.embeddings.initialize_weights()
    other.decoder.initialize_weights(config.num_patches)
    state = {
        ours: value for key, value in model.state_dict().items() for ours, value in huggingface_entries(key, value)
    }
    missing, unexpected = other.load_state_dict(state, strict=False)
    # Both fixed tables are theirs: that they equal ours is part of what is tested.
    assert sorted(missing) == ["decoder.decoder_pos_embed", "vit.embeddings.position_embeddings"]
    assert not unexpected
    return other


def huggingface_entries(key: str, value: Tensor) -> list[tuple[str, Tensor]]:
    """Their key and value for one of ours; three for q, k and v."""
    renames = [
        (r"^encoder\.cls_token", "vit.embeddings.cls_token"),
        (r"^encoder\.patch_embed\.proj", "vit.embeddings.patch_embeddings.projection"),
        (r"^encoder\.norm", "vit.layernorm"),
        (r"^encoder\.blocks", "vit.layers"),
        (r"^embeds\.1", "decoder.decoder_embed"),
        (r"^mask_token", "decoder.mask_token"),
        (r"^decoders\.1\.norm", "decoder.decoder_norm"),
        (r"^decoders\.1\.head", "decoder.decoder_pred"),
        (r"^decoders\.1\.blocks", "decoder.decoder_layers"),
        (r"\.norm1\.", ".layernorm_before."),
        (r"\.norm2\.", ".layernorm_after."),
        (r"\.attn\.proj\.", ".attention.o_proj."),
    ]
    for pattern, theirs in renames:
        key = re.sub(pattern, theirs, key)
    if ".attn.qkv." not in key:
        return [(key, value)]
    names = [key.replace(".attn.qkv.", f".attention.{letter}_proj.") for letter in "qkv"]
    return list(zip(names, value.chunk(3), strict=True))


@pytest.mark.parametrize("norm_pix", [True, False])
def test_equal_to_huggingface(norm_pix: bool) -> None:
    config = tiny_config(
        objective="mae", segments=1, did=False, decoder_depth=2, image_height=24, image_width=24, norm_pix=norm_pix
    )
    model = make_model(config)
    other = huggingface_model(model)
    images, noise = make_inputs(config, dtype=torch.float64)
    expected = other(images, noise=noise)
    output = model(images, noise=noise, full=True)
    assert torch.equal(output.mask.mask_BN, expected.mask == 1)
    torch.testing.assert_close(output.predictions[0], expected.logits, rtol=FLOAT64, atol=FLOAT64)
    masked_only = model(images, noise=noise)
    torch.testing.assert_close(masked_only.loss, expected.loss, rtol=FLOAT64, atol=FLOAT64)

    expected.loss.backward()
    theirs = {name: parameter.grad for name, parameter in other.named_parameters() if parameter.requires_grad}
    ours = gradients(model, masked_only.loss)
    compared = set()
    for key, gradient in ours.items():
        for name, part in huggingface_entries(key, gradient):
            torch.testing.assert_close(
                part, theirs[name], rtol=FLOAT64, atol=FLOAT64, msg=lambda text, n=name: f"{n}: {text}"
            )
            compared.add(name)
    assert compared == theirs.keys()
