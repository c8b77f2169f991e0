"""Small photographs and folders of them; scikit-image carries the originals."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data

ORIENTATION = 0x0112


@pytest.fixture(scope="session")
def photograph() -> Image.Image:
    """RGB, 512 x 512."""
    return Image.fromarray(data.astronaut())


@pytest.fixture(scope="session")
def photo(photograph) -> Callable[..., Image.Image]:
    """photo(number, width, height): a different cut of the photograph for each number."""

    def cut(number: int, width: int = 128, height: int = 96) -> Image.Image:
        rng = np.random.default_rng(number)
        left, top = int(rng.integers(0, 512 - width + 1)), int(rng.integers(0, 512 - height + 1))
        return photograph.crop((left, top, left + width, top + height))

    return cut


@pytest.fixture(scope="session")
def encoded() -> Callable[..., bytes]:
    """encoded(image, "JPEG", orientation=6, quality=90, ...): the bytes of a file."""

    def encode(image: Image.Image, form: str = "JPEG", *, orientation: int | None = None, **options) -> bytes:
        if orientation is not None:
            exif = Image.Exif()
            exif[ORIENTATION] = orientation
            options["exif"] = exif
        buffer = io.BytesIO()
        image.save(buffer, form, **options)
        return buffer.getvalue()

    return encode


@pytest.fixture
def jpeg_folder(tmp_path: Path, photo, encoded) -> Callable[..., Path]:
    """jpeg_folder(count): a new flat folder 000.jpg, 001.jpg, ... of different photographs."""

    def make(count: int = 24, name: str = "photos", width: int = 128, height: int = 96) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        for number in range(count):
            (folder / f"{number:03d}.jpg").write_bytes(encoded(photo(number, width, height), quality=85))
        return folder

    return make
