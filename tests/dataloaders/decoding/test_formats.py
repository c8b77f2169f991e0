"""Every kind of file through the whole loader."""

from __future__ import annotations

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from mirl.dataloaders import build_train_loader, load_images

SIZE = (48, 64)


@pytest.fixture
def zoo(tmp_path, photo, encoded):
    """One photograph in every form that people have, named for it; some with a suffix that lies."""
    image = photo(1)
    rgba = image.convert("RGBA")
    rgba.putalpha(Image.linear_gradient("L").resize(image.size))
    files = {
        "baseline.jpg": encoded(image, quality=95),
        "progressive.JPEG": encoded(image, quality=95, progressive=True),
        "cmyk.jpg": encoded(image.convert("CMYK"), quality=95),
        "grey.jpg": encoded(image.convert("L"), quality=95),
        "rotated.jpg": encoded(image.transpose(Image.Transpose.ROTATE_90), quality=95, orientation=6),
        "rgb.png": encoded(image, "PNG"),
        "alpha.png": encoded(rgba, "PNG"),
        "palette.png": encoded(image.convert("P"), "PNG"),
        "bilevel.png": encoded(image.convert("1"), "PNG"),
        "really_a_png.jpg": encoded(image, "PNG"),
        "lossy.webp": encoded(image, "WEBP", quality=95),
        "lossless.webp": encoded(image, "WEBP", lossless=True),
        "rotated.webp": encoded(image.transpose(Image.Transpose.ROTATE_90), "WEBP", lossless=True, orientation=6),
        "plain.tif": encoded(image, "TIFF"),
        "lzw.tiff": encoded(image, "TIFF", compression="tiff_lzw"),
        "rotated.tif": encoded(image.transpose(Image.Transpose.ROTATE_90), "TIFF", orientation=6),
        "cmyk.tif": encoded(image.convert("CMYK"), "TIFF"),
        "still.gif": encoded(image, "GIF"),
        "map.bmp": encoded(image, "BMP"),
        "map.ppm": encoded(image, "PPM"),
    }
    folder = tmp_path / "zoo"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("channels", [3, 1])
def test_every_format_shows_the_same_photograph_upright(zoo, channels):
    options = {"scale": (1.0, 1.0), "ratio": (4 / 3, 4 / 3), "flip": False}
    count = len(list(zoo.iterdir()))
    with build_train_loader(
        zoo, image_size=SIZE, micro_batch=count, channels=channels, threads=1, bad_image_limit=0, **options
    ) as loader:
        batch = loader.next_micro_batch()
        assert not loader.bad_images
        names = [path.rsplit("/")[-1] for path in loader.paths(batch.sample_ids)]
    assert sorted(names) == sorted(path.name for path in zoo.iterdir())
    shown = dict(zip(names, batch.images.float(), strict=True))
    colour, grey = shown["rgb.png"], shown["rgb.png"].mean(-1, keepdim=True)
    for name, image in shown.items():
        reference = grey if name in ("grey.jpg", "bilevel.png") else colour
        # Levels of 255. JPEG at quality 95, 256 colours, grey by another formula: a few levels on average; dithering
        # to two levels, much blurred by the resize, tens. A wrong turn is above 50.
        limit = {"bilevel.png": 45, "grey.jpg": 30, "cmyk.tif": 3, "palette.png": 12, "still.gif": 12}.get(name, 4)
        assert (image - reference).abs().mean() < limit, name


def test_load_images_takes_the_same_files(zoo):
    paths = sorted(zoo.iterdir())
    images = load_images(paths, image_size=(96, 128))
    assert images.shape == (len(paths), 96, 128, 3) and images.dtype == torch.uint8
    exact = {path.name: image for path, image in zip(paths, images, strict=True)}
    lossless = ("really_a_png.jpg", "lossless.webp", "rotated.webp", "plain.tif", "lzw.tiff", "rotated.tif", "map.ppm")
    for name in lossless:
        assert torch.equal(exact[name], exact["rgb.png"]), name


def test_load_images_crops_the_centre_and_names_what_it_cannot_use(zoo, tmp_path):
    square = load_images([zoo / "rgb.png"], image_size=(96, 96))
    whole = load_images([zoo / "rgb.png"], image_size=(96, 128))
    assert torch.equal(square[0], whole[0][:, 16:112])
    bad = tmp_path / "bad.jpg"
    bad.write_bytes((zoo / "baseline.jpg").read_bytes()[:900])
    for path, reason in ((bad, "bad.jpg: "), (tmp_path / "none.jpg", "none.jpg: the file no longer exists")):
        with pytest.raises(ValueError, match=reason):
            load_images([zoo / "rgb.png", path], image_size=(96, 96))


def array_folder(tmp_path, dtype, channels, form, count=8):
    folder = tmp_path / f"{dtype}-{channels}-{form}"
    folder.mkdir()
    rng = np.random.default_rng(0)
    top = {"uint8": 255, "uint16": 65535, "float32": 1.0}[dtype]
    arrays = []
    for number in range(count):
        # One value per channel and file: crops and resizing leave it as it is.
        values = (rng.random(channels) * top).astype(dtype)
        array = np.broadcast_to(values, (40, 50, channels)).copy()
        arrays.append(values)
        if form == "npy":
            np.save(folder / f"{number}.npy", array)
        elif form == "npy_chw":
            np.save(folder / f"{number}.npy", array.transpose(2, 0, 1))
        else:
            tifffile.imwrite(folder / f"{number}.tif", array, photometric="minisblack")
    return folder, np.stack(arrays)


@pytest.mark.parametrize("form", ["npy", "npy_chw", "tif"])
@pytest.mark.parametrize(
    ("dtype", "channels"), [("uint8", 5), ("uint16", 4), ("float32", 2), ("uint16", 3), ("uint16", 1)]
)
def test_arrays_with_any_number_of_channels(tmp_path, dtype, channels, form):
    folder, values = array_folder(tmp_path, dtype, channels, form)
    mean, std = tuple(0.1 * i + 0.3 for i in range(channels)), tuple(0.2 + 0.1 * i for i in range(channels))
    with build_train_loader(
        folder, image_size=SIZE, micro_batch=8, channels=channels, mean=mean, std=std, threads=1, bad_image_limit=0
    ) as loader:
        batch = loader.next_micro_batch()
    expected = values[batch.sample_ids].astype(np.float64)
    if dtype == "uint8":
        assert batch.images.shape == (8, *SIZE, channels) and batch.images.dtype == torch.uint8
        shown = batch.images.numpy()
    else:
        assert batch.images.shape == (8, channels, *SIZE) and batch.images.dtype == torch.float32
        scale = 65535 if dtype == "uint16" else 1
        expected = (expected / scale - np.array(mean)) / np.array(std)
        shown = batch.images.permute(0, 2, 3, 1).numpy()
    # Constant images: the resize weights add up to 1 within a few float32 roundings.
    assert np.abs(shown - expected[:, None, None, :]).max() < 1e-4


def test_an_array_of_another_kind_is_a_broken_image(tmp_path):
    folder, _ = array_folder(tmp_path, "uint16", 4, "npy")
    np.save(folder / "3.npy", np.zeros((40, 50, 4), np.uint8))
    np.save(folder / "5.npy", np.zeros((40, 50, 3), np.uint16))
    (folder / "6.npy").write_bytes((folder / "1.npy").read_bytes()[:500])
    with build_train_loader(
        folder, image_size=SIZE, micro_batch=8, channels=4, threads=1, bad_image_limit=1.0
    ) as loader:
        loader.next_micro_batch()
        reasons = {bad.path[-5:]: bad.reason for bad in loader.bad_images}
    assert set(reasons) == {"3.npy", "5.npy", "6.npy"}
    assert "uint8, those of the data set uint16" in reasons["3.npy"]
    assert "(40, 50, 3), expected [H, W, 4]" in reasons["5.npy"]


def test_channels_that_the_files_do_not_have_are_refused(tmp_path):
    folder, _ = array_folder(tmp_path, "uint16", 4, "tif")
    with pytest.raises(ValueError, match=r"channels is 5, but of .*0.tif its shape is \(40, 50, 4\)"):
        build_train_loader(folder, image_size=SIZE, micro_batch=8, channels=5)
    with pytest.raises(ValueError, match="mean has 3 numbers, channels is 4"):
        build_train_loader(folder, image_size=SIZE, micro_batch=8, channels=4, mean=(0, 0, 0), std=(1, 1, 1))
