"""Sizes from headers: every format and EXIF orientation as Pillow sees them, and no crash on damaged files."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from mirl.dataloaders.decoding.headers import as_portable_pixmap, decode_with_pillow, read_header
from mirl.dataloaders.errors import ImageError

FORMATS = [
    ("JPEG", {"quality": 90}),
    ("JPEG", {"quality": 90, "progressive": True}),
    ("PNG", {}),
    ("WEBP", {"quality": 90}),
    ("WEBP", {"lossless": True}),
    ("TIFF", {}),
]


@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
@pytest.mark.parametrize(("form", "options"), FORMATS)
def test_upright_size_of_every_format(photo, encoded, form, options, orientation):
    data = encoded(photo(1, 120, 90), form, orientation=orientation, **options)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    header = read_header(data)
    assert (header.width, header.height) == upright.size
    assert header.format == form
    assert decode_with_pillow(data).shape == (header.height, header.width, 3)


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
def test_jpeg_colour_spaces(photo, encoded, mode):
    header = read_header(encoded(photo(1).convert(mode)))
    assert (header.height, header.width, header.native) == (96, 128, True)


def test_jpeg_with_a_thumbnail_and_other_segments_before_the_frame(photo, encoded):
    exif = Image.Exif()
    exif[0x0112] = 6
    thumbnail = encoded(photo(2, 40, 30))
    data = encoded(photo(1), exif=b"Exif\0\0" + exif.tobytes()[6:] + thumbnail, comment=b"x" * 3000, dpi=(72, 72))
    header = read_header(data)
    assert (header.height, header.width) == (128, 96)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "an HTML or XML page"),
        (b"\n <html>", "an HTML or XML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "not an image of a known format"),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF", "JPEG without a frame header"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "damaged PNG header"),
    ],
)
def test_reasons(data, reason):
    with pytest.raises(ImageError, match=reason):
        read_header(data)


@pytest.mark.parametrize(("form", "options"), FORMATS)
def test_a_cut_file_is_broken_wherever_it_is_cut(photo, encoded, form, options):
    data = encoded(photo(1), form, **options)
    for keep in (len(data) // 4, len(data) // 2, len(data) - 40):
        with pytest.raises(ImageError):
            header = read_header(data[:keep])
            if not header.native:
                decode_with_pillow(data[:keep])


def test_bytes_after_the_end_do_no_harm(photo, encoded):
    data = encoded(photo(1))
    assert read_header(data + bytes(500)) == read_header(data)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow tells of the damage, then reads on
@pytest.mark.parametrize(("form", "options"), FORMATS)
def test_damaged_headers_raise_nothing_but_image_errors(photo, encoded, form, options):
    whole = encoded(photo(1), form, orientation=6, **options)
    rng = np.random.default_rng(0)
    for _ in range(150):
        data = bytearray(whole)
        for at in rng.integers(0, min(400, len(data)), 4):
            data[at] = rng.integers(0, 256)
        try:
            header = read_header(bytes(data))
            assert header.height >= 1 and header.width >= 1
        except ImageError as error:
            assert "\n" not in str(error)


def test_a_decompression_bomb_is_refused():
    png = bytearray(b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + b"IHDR" + (60000).to_bytes(4, "big") * 2)
    png += bytes(20) + b"IEND"
    with pytest.raises(ImageError, match="60000 x 60000"):
        read_header(bytes(png))


def test_sixteen_bit_grey_is_scaled_not_clipped(encoded):
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    pixels = decode_with_pillow(encoded(Image.fromarray(ramp), "PNG"), channels=1)
    assert np.array_equal(pixels[:, :, 0], (ramp // 257).astype(np.uint8))


@pytest.mark.parametrize("channels", [1, 3])
def test_pixmaps_hold_the_pixels(photo, channels):
    pixels = np.asarray(photo(1).convert("RGB" if channels == 3 else "L")).reshape(96, 128, channels)
    assert np.array_equal(decode_with_pillow(as_portable_pixmap(pixels), channels), pixels)
