"""Sizes from headers: every format and EXIF orientation as Pillow sees them, and no crash on damaged files."""

from __future__ import annotations

import io
import os
import subprocess
import sys

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


def with_stray_bytes(data: bytes, stray: bytes) -> bytes:
    """The JPEG with bytes between two of its segments, as some cameras write them."""
    at = data.index(b"\xff\xdb")
    return data[:at] + stray + data[at:]


@pytest.mark.parametrize("stray", [b"\0\0", bytes(11), b"\x13\xff\xff"])
@pytest.mark.parametrize("orientation", [None, 6])
def test_stray_bytes_between_segments_are_for_pillow_to_judge(photo, encoded, stray, orientation):
    whole = encoded(photo(1), orientation=orientation)
    data = with_stray_bytes(whole, stray)
    header, plain = read_header(data), read_header(whole)
    assert (header.height, header.width, header.format) == (plain.height, plain.width, "JPEG")
    assert np.array_equal(decode_with_pillow(data), decode_with_pillow(whole))


def test_images_with_stray_bytes_are_trained_on(tmp_path, photo, encoded):
    from mirl.dataloaders import build_train_loader
    from mirl.dataloaders.tools.validate import validate_data

    for number in range(4):
        data = encoded(photo(number))
        (tmp_path / f"{number}.jpg").write_bytes(with_stray_bytes(data, bytes(11)) if number < 2 else data)
    assert not validate_data(tmp_path, progress=False).bad
    with build_train_loader(tmp_path, image_size=(32, 32), micro_batch=4, threads=1, bad_image_limit=0) as loader:
        assert sorted(loader.next_micro_batch().sample_ids) == [0, 1, 2, 3] and not loader.bad_images


def large_png(height: int, width: int) -> bytes:
    """Grey, all black: a few kilobytes whatever its size."""
    buffer = io.BytesIO()
    Image.new("1", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def test_the_limit_is_named_with_what_moves_it(tmp_path):
    """In a process of its own, since the limit is read once and Pillow's goes with it."""
    path = tmp_path / "large.png"
    path.write_bytes(large_png(13000, 14000))
    code = (
        "import sys; from mirl.dataloaders.decoding.headers import *\n"
        "data = open(sys.argv[1], 'rb').read()\n"
        "try: print(read_header(data).height, decode_with_pillow(data, 1).shape)\n"
        "except Exception as error: print(type(error).__name__, error)"
    )

    def run(**variables: str) -> str:
        command = [sys.executable, "-W", "ignore", "-c", code, str(path)]
        return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=True).stdout

    refused = run()
    assert "ImageError its header says 13000 x 14000 pixels, 182000000 in all, more than the limit of 178" in refused
    assert refused.strip().endswith("or export MIRL_MAX_IMAGE_PIXELS=182000000")
    assert run(MIRL_MAX_IMAGE_PIXELS="182_000_000").strip() == "13000 (13000, 14000, 1)"
    assert "more than the limit of 1000:" in run(MIRL_MAX_IMAGE_PIXELS="1000")
    assert "UserError MIRL_MAX_IMAGE_PIXELS is 'many': give a number" in run(MIRL_MAX_IMAGE_PIXELS="many")


def test_a_format_that_only_pillow_knows_has_the_same_limit():
    """Pillow refuses it when it is opened, before the size could be compared."""
    header = b"BM" + bytes(12) + (40).to_bytes(4, "little") + (60000).to_bytes(4, "little") * 2
    data = header + (1).to_bytes(2, "little") + (24).to_bytes(2, "little") + bytes(24)
    with pytest.raises(ImageError, match="limit.*or export MIRL_MAX_IMAGE_PIXELS="):
        read_header(data)
