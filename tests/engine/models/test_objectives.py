"""The objectives beside mirl, mae and multi_decoder, and the extra losses, against their definitions written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_laplace
from torch import nn
from torchvision.models import vgg16

from mirl.engine.models.masking import mask_from_noise
from mirl.engine.models.objectives.frequency import split_frequencies
from mirl.engine.models.objectives.objective import feature_loss, objective_terms
from mirl.engine.models.objectives.perceptual import LAYERS, PerceptualLoss, read_vgg
from mirl.engine.models.pixels import normalise_images, normalise_patches, patchify
from mirl.engine.models.teacher import EmaTeacher
from mirl.errors import UserError
from tests.engine.models.helpers import NO_SKIPS, assert_same, gradients, make_inputs, make_model, tiny_config

FLOAT64 = 1e-12  # sums of a few thousand float64 values in another order


# --- the two parts of an image


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.5])
def test_parts_add_up_and_fine_is_minus_half_sigma_squared_times_the_curvature(sigma):
    y, x = torch.meshgrid(*(torch.arange(size, dtype=torch.float64) for size in (40, 48)), indexing="ij")
    image = (0.3 * x**2 - 0.1 * y**2 + 2 * x - y + 5)[None, None]
    coarse, fine = split_frequencies(image, sigma)
    torch.testing.assert_close(coarse + fine, image, rtol=1e-15, atol=0)  # one rounding
    radius = round(4 * sigma) + 1
    inside = fine[..., radius:-radius, radius:-radius]
    # The Laplacian of a parabola is a constant, here 2 * (0.3 - 0.1), and blurring leaves it.
    torch.testing.assert_close(inside, torch.full_like(inside, -(sigma**2) / 2 * 0.4), rtol=0, atol=1e-9)


def test_laplacian_of_gaussian_is_that_of_scipy():
    image = torch.randn(2, 3, 24, 31, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigma = 1.5
    _, fine = split_frequencies(image, sigma)
    expected = (
        -(sigma**2) / 2 * np.stack([[gaussian_laplace(c, sigma, mode="mirror") for c in i] for i in image.numpy()])
    )
    # scipy does not correct its sampled kernel, whose sum is off by 5e-4 at this width.
    np.testing.assert_allclose(fine.numpy(), expected, atol=3e-3 * np.abs(expected).max())


def test_a_filter_wider_than_the_image():
    coarse, fine = split_frequencies(torch.ones(1, 1, 3, 1, dtype=torch.float64), 2.0)
    torch.testing.assert_close(coarse, torch.ones_like(coarse))
    assert fine.abs().max() < 1e-12


# --- coarse_to_fine, fine_to_coarse


@pytest.mark.parametrize("objective", ["coarse_to_fine", "fine_to_coarse"])
@pytest.mark.parametrize("norm_pix", [True, False])
def test_shallow_and_deep_decoders_get_the_two_parts(objective, norm_pix):
    config = tiny_config(segments=4, objective=objective, norm_pix=norm_pix)
    images, noise = make_inputs(config)
    model = make_model(config)
    output = model(images, noise=noise, full=True)
    pixels = normalise_images(images, config.mean, config.std, torch.float64)
    coarse, fine = split_frequencies(pixels, config.log_sigma)
    shallow, deep = (coarse, fine) if objective == "coarse_to_fine" else (fine, coarse)
    expected = []
    for number, prediction in enumerate(output.predictions):
        target = patchify(shallow if number < 2 else deep, config.patch_size)
        target = normalise_patches(target) if norm_pix else target
        expected.append((prediction - target).square()[output.mask.mask_BN].mean())
    assert model.term_names == ("decoder_1", "decoder_2", "decoder_3", "decoder_4")
    assert_same({"terms": output.terms}, {"terms": torch.stack(expected)}, FLOAT64)
    assert_same({"loss": output.loss}, {"loss": torch.stack(expected).mean()}, FLOAT64)


@pytest.mark.parametrize("objective", ["coarse_to_fine", "fine_to_coarse"])
def test_skips_change_nothing(objective):
    config = tiny_config(segments=4, objective=objective)
    images, noise = make_inputs(config)
    fast, plain = make_model(config), make_model(config, NO_SKIPS)
    first, second = fast(images, noise=noise), plain(images, noise=noise)
    assert_same({"loss": first.loss, "terms": first.terms}, {"loss": second.loss, "terms": second.terms}, FLOAT64)
    assert_same(gradients(fast, first.loss), gradients(plain, second.loss), FLOAT64)


# --- truncated


def test_truncated_is_mae_on_the_first_blocks():
    truncated = tiny_config(objective="truncated", truncated_depth=3, segments=1, did=False, decoder_depth=2)
    mae = tiny_config(objective="mae", depth=3, segments=1, did=False, decoder_depth=2)
    images, noise = make_inputs(mae)
    one, other = make_model(truncated), make_model(mae)
    assert len(one.encoder.blocks) == 3 and one.config.depth == 4
    assert torch.equal(one(images, noise=noise).loss, other(images, noise=noise).loss)


# --- feature loss


@pytest.mark.parametrize("skips", [None, NO_SKIPS], ids=["skips", "plain"])
@pytest.mark.parametrize("objective", ["mirl", "multi_decoder"])
def test_feature_loss_is_the_same_sum_over_features(objective, skips):
    config = tiny_config(segments=4, objective=objective, feature_loss=0.3)
    images, noise = make_inputs(config)
    model = make_model(config, skips)
    features: dict[int, torch.Tensor] = {}
    for g in range(1, 5):
        model.decoders[str(g)].feature_head.register_forward_hook(lambda _m, _i, out, g=g: features.update({g: out}))
    target = torch.randn(len(images), config.num_patches, config.width, dtype=torch.float64)
    output = model(images, noise=noise, teacher_features=target)
    mask = output.mask.mask_BN
    wanted = target[mask]
    pairs = [(1, 4), (2, 3)] if objective == "mirl" else [(1,), (2,), (3,), (4,)]

    def masked(feature):
        full = feature.shape[1] == config.num_patches
        return feature[mask] if full else feature.flatten(0, 1)

    errors = [(sum(masked(features[g]) for g in pair) - wanted).square().mean() for pair in pairs]
    expected = torch.stack(errors).mean()
    assert model.term_names[-1] == "feature"
    assert_same({"term": output.terms[-1]}, {"term": expected}, FLOAT64)
    pixels = output.terms[:-1].mean()
    assert_same({"loss": output.loss}, {"loss": pixels + 0.3 * expected}, FLOAT64)
    gradients(model, output.loss)  # every parameter has a part in it


def test_feature_loss_is_float32_whatever_its_inputs():
    config = tiny_config(segments=4)
    _, noise = make_inputs(config)
    mask, terms = mask_from_noise(noise, config.mask_ratio), objective_terms(config)
    generator = torch.Generator().manual_seed(2)
    shape = (3, config.num_masked, config.width)
    features = [torch.randn(shape, generator=generator).bfloat16() for _ in range(4)]
    target = torch.randn(3, config.num_patches, config.width, generator=generator)
    exact = feature_loss(terms, [feature.double() for feature in features], target.double(), mask)
    for rounded_target in (target, target.bfloat16()):
        loss = feature_loss(terms, features, rounded_target, mask)
        assert loss.dtype == torch.float32
        # A bfloat16 target is off by up to 0.4 %, both ways; a bfloat16 sum would be off by as much in one.
        bound = 1e-6 if rounded_target is target else 1e-3
        assert loss.item() == pytest.approx(exact.item(), rel=bound)


def test_teacher_sees_all_patches_and_moves_slowly():
    config = tiny_config(segments=4, feature_loss=1.0)
    images, _ = make_inputs(config, batch=2)
    model = make_model(config, dtype=torch.float32)
    teacher = EmaTeacher(model, config, decay=0.9)
    features = teacher(images)
    assert features.shape == (2, config.num_patches, config.width) and not features.requires_grad
    # Normalised over the width, without scale and shift.
    torch.testing.assert_close(features.mean(-1), torch.zeros(2, config.num_patches), rtol=0, atol=1e-5)
    torch.testing.assert_close(features.var(-1, unbiased=False), torch.ones(2, config.num_patches), rtol=1e-3, atol=0)

    name = "encoder.blocks.2.mlp.fc1.weight"
    before = teacher.state_dict()[name].clone()
    with torch.no_grad():
        dict(model.named_parameters())[name].add_(1.0)
    teacher.update(model)
    torch.testing.assert_close(teacher.state_dict()[name], before + 0.1, rtol=1e-5, atol=1e-6)
    assert not torch.equal(teacher(images), features)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_feature_loss_without_its_target_is_refused():
    config = tiny_config(feature_loss=1.0)
    images, noise = make_inputs(config)
    model = make_model(config)
    with pytest.raises(ValueError, match=r"feature_loss is 1.0: give teacher_features \[3, 24, 24\]"):
        model(images, noise=noise)
    assert len(model(images, noise=noise, full=True).terms) == 1  # pictures need no teacher


# --- perceptual loss


@pytest.fixture(scope="module")
def vgg_state():
    torch.manual_seed(3)
    return {f"features.{key}": value for key, value in vgg16(weights=None).features.state_dict().items()}


class PixelLoss(nn.Module):
    """In place of the VGG, so that what it is shown can be checked."""

    def targets(self, true):
        return [true]

    def forward(self, predicted, wanted):
        self.predicted, (self.true,) = predicted.detach(), wanted
        return (predicted - self.true).square().mean()


@pytest.mark.parametrize("norm_pix", [True, False])
def test_perceptual_loss_sees_the_image_with_masked_patches_as_predicted(norm_pix):
    config = tiny_config(segments=2, vgg_loss=0.5, norm_pix=norm_pix)
    images, noise = make_inputs(config)
    model = make_model(config, dtype=torch.float32)
    seen = PixelLoss()
    model.set_perceptual(seen)
    output = model(images, noise=noise)
    full = model(images, noise=noise, full=True)
    true = patchify(seen.true, config.patch_size)
    shown = patchify(seen.predicted, config.patch_size)
    mask = output.mask.mask_BN
    assert torch.equal(shown[~mask], true[~mask])
    predicted = full.predictions[0] + full.predictions[1]
    if norm_pix:
        predicted = predicted * (true.var(-1, keepdim=True) + 1e-6).sqrt() + true.mean(-1, keepdim=True)
    torch.testing.assert_close(shown[mask], predicted[mask], rtol=1e-4, atol=1e-5)  # float32 in another order
    torch.testing.assert_close(output.terms[-1], (shown - true).square().mean())
    torch.testing.assert_close(output.loss, output.terms[0] + 0.5 * output.terms[1])
    gradients(model, output.loss)
    assert not any("perceptual" in name for name in model.state_dict())


def test_vgg_features_are_those_of_torchvision(vgg_state):
    loss = PerceptualLoss(vgg_state, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    whole = vgg16(weights=None).features
    whole.load_state_dict({key.removeprefix("features."): value for key, value in vgg_state.items()})
    values = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    x, expected = (values - mean) / std, []
    for index, layer in enumerate(whole):
        x = layer(x).clone()
        if index in LAYERS:
            expected.append(x.clone())
    for actual, wanted in zip(loss.extract((values - 0.5) / 0.25), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())
    assert loss(values, loss.targets(values)) == 0 and not any(
        parameter.requires_grad for parameter in loss.parameters()
    )


def test_files_that_are_no_vgg(tmp_path, vgg_state):
    with pytest.raises(UserError, match="no such file"):
        read_vgg(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("not weights")
    with pytest.raises(UserError, match="vgg_weights: .*cannot be read"):
        read_vgg(tmp_path / "text.pth")
    torch.save({key: value for key, value in vgg_state.items() if "features.5." not in key}, tmp_path / "cut.pth")
    with pytest.raises(UserError, match=r"features\.5\.weight is missing"):
        PerceptualLoss(read_vgg(tmp_path / "cut.pth"), (0.5,) * 3, (0.5,) * 3)


def test_vgg_loss_without_its_network_is_refused():
    config = tiny_config(vgg_loss=1.0)
    images, noise = make_inputs(config)
    with pytest.raises(ValueError, match="set_perceptual"):
        make_model(config)(images, noise=noise)
