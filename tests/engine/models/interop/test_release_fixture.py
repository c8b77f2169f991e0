"""What the authors' released model computed: loss, predictions and gradients, from its own checkpoint, in float32."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from mirl.engine.models import MIRL, ModelConfig, load_release, read_release_checkpoint, release_to_state_dict
from mirl.engine.models.interop.release import our_key
from tests.engine.models.helpers import make_reference
from tests.support.files import CreatesFile
from tests.support.launch import CHECKOUT

FIXTURES = CHECKOUT / "tests" / "fixtures"
CHECKPOINT = FIXTURES / "release_mirl_tiny.pd"
CONFIG = ModelConfig(
    variant="release", depth=6, width=24, heads=4, segments=6, image_height=64, image_width=64,
    decoder_width=16, decoder_heads=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    with np.load(FIXTURES / "release_mirl_tiny.npz", allow_pickle=False) as file:
        return dict(file)


@pytest.fixture
def model() -> MIRL:
    model = MIRL(CONFIG)
    load_release(model, CHECKPOINT)
    return model


def inputs(expected: dict[str, np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(expected["imgs"]), torch.from_numpy(expected["noise"])


def test_loss_and_every_gradient(model: MIRL, expected: dict[str, np.ndarray]) -> None:
    images, noise = inputs(expected)
    output = model(images, noise=noise)
    # float32 sums in another order, of numbers near 1.
    assert abs(output.loss.item() - expected["loss"]) < 1e-6
    np.testing.assert_allclose(output.terms.numpy(), expected["terms"], rtol=0, atol=1e-6)
    assert np.array_equal(output.mask.mask_BN.numpy(), expected["mask"] == 1)
    output.loss.backward()
    wanted = {our_key(key.removeprefix("grad/")): value for key, value in expected.items() if key.startswith("grad/")}
    actual = dict(model.named_parameters())
    assert wanted.keys() == actual.keys()
    for name, value in wanted.items():
        value = value.T if value.ndim == 2 else value
        # The bound of the fixture's own notes; gradients are up to 1e-2.
        np.testing.assert_allclose(actual[name].grad.numpy(), value, rtol=0, atol=1e-7, err_msg=name)


def test_predictions_of_engine_and_reference(model: MIRL, expected: dict[str, np.ndarray]) -> None:
    images, noise = inputs(expected)
    with torch.no_grad():
        full = model(images, noise=noise, full=True)
        reference = make_reference(model)(images, noise)
    for index in range(6):
        for name, output in (("engine", full), ("reference", reference)):
            prediction = output.predictions[index].numpy()
            # float32, numbers near 1
            np.testing.assert_allclose(prediction, expected[f"pred{index}"], rtol=0, atol=1e-6, err_msg=name)


def test_file_holds_the_weights_of_the_fixture(expected: dict[str, np.ndarray]) -> None:
    arrays = read_release_checkpoint(CHECKPOINT)
    wanted = {key.removeprefix("w/"): value for key, value in expected.items() if key.startswith("w/")}
    assert wanted.keys() <= arrays.keys()
    for key, value in wanted.items():
        assert np.array_equal(arrays[key], value), key


def test_a_missing_key_is_refused() -> None:
    arrays = read_release_checkpoint(CHECKPOINT)
    del arrays["decoder_embed0_1.weight"]
    with pytest.raises(ValueError, match=r"embeds\.0\.weight is missing"):
        release_to_state_dict(arrays, MIRL(CONFIG))


def test_an_unknown_key_is_refused() -> None:
    arrays = read_release_checkpoint(CHECKPOINT) | {"decoder_blocks0.0.norm9.weight": np.zeros(16, np.float32)}
    with pytest.raises(ValueError, match=r"decoder_blocks0\.0\.norm9\.weight has no place in this model"):
        release_to_state_dict(arrays, MIRL(CONFIG))


def test_another_shape_is_refused() -> None:
    arrays = read_release_checkpoint(CHECKPOINT) | {"mask_token3": np.zeros((1, 1, 8), np.float32)}
    with pytest.raises(
        ValueError, match=r"mask_token3 has shape \[1, 1, 8\], decoders\.4\.mask_token needs \[1, 1, 16\]"
    ):
        release_to_state_dict(arrays, MIRL(CONFIG))


def test_other_positions_are_refused() -> None:
    arrays = read_release_checkpoint(CHECKPOINT) | {"pos_embed": np.zeros((1, 17, 24), np.float32)}
    with pytest.raises(ValueError, match="pos_embed is not the fixed sin-cos table"):
        release_to_state_dict(arrays, MIRL(CONFIG))


def test_the_papers_variant_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a model of variant 'release'"):
        load_release(MIRL(ModelConfig(depth=2, width=24, heads=2)), CHECKPOINT)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    path, ran = tmp_path / "evil.pd", tmp_path / "ran"
    path.write_bytes(pickle.dumps({"model": OrderedDict(cls_token=("name", CreatesFile(ran)))}))
    with pytest.raises(ValueError, match="which a checkpoint of the release does not need"):
        read_release_checkpoint(path)
    assert not ran.exists()
    with path.open("rb") as file:
        pickle.load(file)
    assert ran.exists(), "the test's pickle is harmless: it proves nothing"


@pytest.mark.parametrize("content", [b"", b"<html>", pickle.dumps([1, 2]), pickle.dumps({"model": {"cls_token": 3}})])
def test_a_file_of_another_kind_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "other.pd"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="other.pd cannot be read as a checkpoint of the MIRL release"):
        read_release_checkpoint(path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.pd"
    path.write_bytes(CHECKPOINT.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="cannot be read"):
        read_release_checkpoint(path)
