"""The distribution of random crops against its closed form, a scalar implementation and torchvision's."""

from __future__ import annotations

import math
import random
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from mirl.dataloaders.decoding.crops import Augmentation, centre_windows, evaluation_crop, evaluation_windows
from mirl.dataloaders.decoding.resize import resize_bicubic

COUNT = 20_000
# Samples are fixed by their keys, so the tests are deterministic; p below this would be 1 in 1000 for a right program.
LEAST_P = 1e-3
SIZES = [(375, 500), (500, 375), (256, 256), (100, 400), (30, 300)]


def windows_of(size, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3), count=COUNT, seed=0):
    augmentation = Augmentation(image_size=(224, 224), scale=scale, ratio=ratio)
    sizes = np.tile(np.array(size), (count, 1))
    return augmentation.windows(sizes, seed, 0, np.arange(count))


def scalar_window(size, scale, ratio, rng):
    """RandomResizedCrop as its documentation tells it, one number at a time, with Python's own generator."""
    height, width = size
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    if width / height < ratio[0]:
        w, h = width, round(width / ratio[0])
    elif width / height > ratio[1]:
        w, h = round(height * ratio[1]), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


def features(windows, size):
    """Area share, log aspect ratio, relative place where there is room to move."""
    top, left, height, width = np.asarray(windows, dtype=float).T
    room_y, room_x = size[0] - height, size[1] - width
    return {
        "area": height * width / (size[0] * size[1]),
        "log_ratio": np.log(width / height),
        "top": top[room_y > 20] / room_y[room_y > 20],
        "left": left[room_x > 20] / room_x[room_x > 20],
    }


def assert_same_distribution(ours, theirs):
    for name in ours:
        if len(theirs[name]) == 0:
            assert len(ours[name]) == 0
            continue
        # Windows are whole pixels, so values repeat; noise far below a pixel's worth breaks the ties of the KS test.
        noise = np.random.default_rng(1)
        a, b = (values + noise.uniform(-1e-9, 1e-9, len(values)) for values in (ours[name], theirs[name]))
        assert stats.ks_2samp(a, b).pvalue > LEAST_P, name


def test_closed_form_where_every_attempt_fits():
    # With area up to 0.5 and this ratio every window fits in a square, so the first attempt is taken: area uniform, log
    # ratio uniform, place uniform. A large image makes rounding negligible against the KS resolution of 1 / sqrt(n).
    windows, mirrored = windows_of((4000, 4000), scale=(0.2, 0.5))
    found = features(windows, (4000, 4000))
    log_43 = math.log(4 / 3)
    for name, low, high in (("area", 0.2, 0.5), ("log_ratio", -log_43, log_43), ("top", 0, 1), ("left", 0, 1)):
        assert stats.kstest(found[name], "uniform", (low, high - low)).pvalue > LEAST_P, name
    assert stats.binomtest(int(mirrored.sum()), COUNT).pvalue > LEAST_P
    # No two numbers of a sample may be related.
    table = np.column_stack([*found.values(), mirrored])
    correlation = np.corrcoef(table.T) - np.eye(5)
    assert np.abs(correlation).max() < 4 / math.sqrt(COUNT)  # four standard deviations of an empirical correlation


@pytest.mark.parametrize("size", SIZES)
def test_distribution_equals_a_scalar_implementation(size):
    rng = random.Random(0)
    theirs = [scalar_window(size, (0.2, 1.0), (3 / 4, 4 / 3), rng) for _ in range(COUNT)]
    assert_same_distribution(features(windows_of(size)[0], size), features(theirs, size))


@pytest.mark.parametrize("size", SIZES)
def test_distribution_equals_torchvision(size):
    transforms = pytest.importorskip("torchvision.transforms", reason="torchvision needs a CUDA build of torch")
    import torch

    torch.manual_seed(0)
    image = torch.zeros(3, *size, dtype=torch.uint8)
    crop = transforms.RandomResizedCrop.get_params
    theirs = [crop(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(COUNT)]
    assert_same_distribution(features(windows_of(size)[0], size), features(theirs, size))


@pytest.mark.parametrize("size", [*SIZES, (1, 1), (1, 1000), (1000, 1), (2, 3)])
def test_windows_lie_inside_the_image_and_are_never_empty(size):
    windows, _ = windows_of(size, count=2000)
    top, left, height, width = windows.T
    assert windows.min() >= 0 and height.min() >= 1 and width.min() >= 1
    assert (top + height).max() <= size[0] and (left + width).max() <= size[1]


def test_fallback_is_the_largest_centred_window_of_an_allowed_ratio():
    windows, _ = windows_of((300, 30), scale=(0.9, 1.0), count=50)
    assert (windows == [130, 0, 40, 30]).all()  # 30 / (3/4) = 40 high, in the middle
    windows, _ = windows_of((30, 300), scale=(0.9, 1.0), count=50)
    assert (windows == [0, 130, 30, 40]).all()


def test_numbers_follow_the_position_not_the_batch():
    augmentation = Augmentation(image_size=(224, 224))
    sizes = np.tile([375, 500], (64, 1))
    whole, flips = augmentation.windows(sizes, 1, 2, np.arange(64))
    part, part_flips = augmentation.windows(sizes[:8], 1, 2, np.arange(40, 48))
    assert np.array_equal(whole[40:48], part) and np.array_equal(flips[40:48], part_flips)
    other, _ = augmentation.windows(sizes, 1, 3, np.arange(64))
    assert not np.array_equal(whole, other)


def test_no_flip_when_off():
    assert not Augmentation(image_size=(8, 8), flip=False).windows(np.full((99, 2), 50), 0, 0, np.arange(99))[1].any()


@pytest.mark.parametrize(
    ("size", "resized", "offset"),
    # Resize(256) and CenterCrop(224) by torchvision's documentation: long side int(256 * long / short), offset
    # int(round((side - 224) / 2)).
    [
        ((375, 500), (256, 341), (16, 58)),
        ((500, 375), (341, 256), (58, 16)),
        ((256, 256), (256, 256), (16, 16)),
        ((100, 333), (256, 852), (16, 314)),
    ],
)
def test_evaluation_geometry(size, resized, offset):
    windows, mirrored, sizes, offsets = evaluation_windows(np.array([size]), 256, (224, 224))
    assert windows[0].tolist() == [0, 0, *size] and not mirrored[0]
    assert tuple(sizes[0]) == resized and tuple(offsets[0]) == offset


@pytest.mark.parametrize("size", [(375, 500), (500, 375), (100, 333), (7, 5)])
def test_evaluation_crop_always_fits(size):
    for image_size in ((224, 448), (448, 224), (300, 300)):
        _, _, sizes, offsets = evaluation_windows(np.array([size]), 256, image_size)
        assert (offsets >= 0).all() and (sizes - offsets >= image_size).all()
        # The aspect ratio stays, to the rounding of the long side down to a pixel.
        long, short = max(sizes[0]), min(sizes[0])
        assert long == short * max(size) // min(size)


@pytest.mark.parametrize("size", [(375, 500), (500, 375), (256, 256), (90, 777), (56, 56)])
@pytest.mark.parametrize("image_size", [(224, 224), (192, 256), (56, 56)])
def test_a_centred_window_is_what_evaluation_sees(size, image_size):
    crop = evaluation_crop(image_size)
    _, _, resized, offsets = evaluation_windows(np.array([size]), min(crop.resized), image_size, crop.resized)
    shrink = np.array(size) / resized[0]  # source pixels of one resized pixel
    wanted = np.concatenate([offsets[0] * shrink, np.array(image_size) * shrink])
    found = centre_windows(np.array([size]), image_size)[0]
    # Evaluation rounds to a pixel of the resized image, this to one of the source.
    assert (np.abs(found - wanted) <= 1 + np.tile(shrink, 2)).all()
    assert (found[:2] >= 0).all() and (found[:2] + found[2:] <= size).all()


def test_a_share_of_the_samples_is_centred_and_the_others_are_as_without_it():
    sizes = np.tile(np.array([375, 500]), (COUNT, 1))
    places = np.arange(COUNT)
    plain = Augmentation(image_size=(224, 224)).windows(sizes, 0, 0, places)
    centre = centre_windows(sizes[:1], (224, 224))[0]
    for share in (0.3, 1.0):
        windows, mirrored = Augmentation(image_size=(224, 224), centred=share).windows(sizes, 0, 0, places)
        centred = (windows == centre).all(axis=1)
        assert stats.binomtest(int(centred.sum()), COUNT, share).pvalue > LEAST_P
        assert not mirrored[centred].any()
        assert np.array_equal(windows[~centred], plain[0][~centred])
        assert np.array_equal(mirrored[~centred], plain[1][~centred])
    again = Augmentation(image_size=(224, 224), centred=0.3).windows(sizes[:9], 0, 0, places[7:16])[0]
    assert np.array_equal(again, Augmentation(image_size=(224, 224), centred=0.3).windows(sizes, 0, 0, places)[0][7:16])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"centred": 1.5}, "centred is 1.5"),
        ({"scale": (0.0, 1.0)}, "scale is .* 0 < low <= high <= 1"),
        ({"scale": (0.5, 0.2)}, "scale"),
        ({"ratio": (2.0, 1.0)}, "ratio is"),
        ({"image_size": (0, 224)}, "image_size is"),
    ],
)
def test_wrong_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**({"image_size": (224, 224)} | change))


@pytest.mark.parametrize("short", [37, 64, 73])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("side", [1, 3, 40, 150])
def test_of_a_strip_only_what_the_crop_needs_is_resized(side, turned, short):
    """Against the whole strip resized and then cut, both with the resize of the loaders; differences in 255 levels."""
    size, length = (64, 48), 40 * side
    strip = np.random.default_rng(side).integers(0, 256, (side, length, 3), dtype=np.uint8)
    strip = np.ascontiguousarray(strip.transpose(1, 0, 2)) if turned else strip
    sizes_B2 = np.array([strip.shape[:2]])
    ((top, left, height, width),), _, (resized,), ((at, across),) = evaluation_windows(sizes_B2, short, size)
    assert height * width < side * length / 2
    ours = resize_bicubic(np.ascontiguousarray(strip[top : top + height, left : left + width]), tuple(resized))
    ours = ours[at : at + size[0], across : across + size[1]]
    least = max(short, size[1] if turned else size[0])
    whole = resize_bicubic(strip, (40 * least, least) if turned else (least, 40 * least))
    at, across = (round((total - cut) / 2) for total, cut in zip(whole.shape[:2], size, strict=True))
    theirs = whole[at : at + size[0], across : across + size[1]]
    difference = (ours.int() - theirs.int()).abs()
    assert ours.shape == theirs.shape == (*size, 3) and difference.max() <= 1


def test_the_memory_of_a_strip_is_bounded_by_its_crop():
    sizes_B2 = np.array([(1, 60000), (60000, 1), (2, 10**8), (500, 375), (17, 16 * 17)])
    for size in ((224, 224), (64, 1024), (1024, 64)):
        windows, _, resized, offsets = evaluation_windows(sizes_B2, 256, size)
        short = np.maximum(256, np.max(size))
        assert (resized.astype(np.int64).prod(axis=1) <= 17 * short**2).all()
        assert (offsets >= 0).all() and (offsets + size <= resized).all()
        assert (windows[:, :2] + windows[:, 2:] <= sizes_B2).all()
    assert (evaluation_windows(sizes_B2[3:], 256, (224, 224))[0] == [[0, 0, 500, 375], [0, 0, 17, 272]]).all()


def test_a_strip_takes_no_gigabytes(tmp_path):
    """A process of its own may use 1 GiB more than it has with the modules imported; the whole strip would take 12."""
    strip = np.random.default_rng(0).integers(0, 255, (1, 60000, 3), dtype=np.uint8)
    Image.fromarray(strip).save(tmp_path / "strip.png")
    np.save(tmp_path / "strip.npy", strip.astype(np.float32))
    code = (
        "import sys; from mirl.dataloaders import build_eval_loader, load_images\n"
        "from mirl.engine.accounting.free_memory import peak_host_memory as peak\n"
        "import torch, nvidia.dali; before = peak()\n"
        "for path in sys.argv[1:]:\n"
        "    assert load_images([path], image_size=(224, 224), resize_short=256).shape[0] == 1\n"
        "print((peak() - before) / 2**30)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "strip.png"), str(tmp_path / "strip.npy")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1
