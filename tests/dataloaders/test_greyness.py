"""A data set is grey if nothing that is looked at in it has a colour."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from skimage import data

from mirl.dataloaders import open_source
from mirl.dataloaders.greyness import all_grey, is_grey
from mirl.dataloaders.train_loader import first_array_format


def found(folder, channels=3) -> bool:
    source = open_source(folder)
    return all_grey(source, channels, first_array_format(source, channels))


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_grey_pictures_are_grey_however_they_are_stored(tmp_path, suffix, mode):
    for number in range(3):
        grey = Image.fromarray(data.chelsea()).convert("L").crop((number * 50, 0, number * 50 + 90, 70))
        grey.convert(mode).save(tmp_path / f"{number}.{suffix}")
    assert found(tmp_path)


@pytest.mark.parametrize("coloured", [0, 31, 63])
def test_one_picture_in_colour_among_those_looked_at_is_enough(tmp_path, coloured):
    for number in range(64):
        picture = Image.fromarray(data.chelsea()[:40, :40])
        (picture if number == coloured else picture.convert("L")).save(tmp_path / f"{number:02d}.png")
    assert not found(tmp_path)


def test_broken_pictures_say_nothing(tmp_path):
    (tmp_path / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    Image.new("RGB", (8, 8), (7, 7, 7)).save(tmp_path / "0.png")
    assert found(tmp_path)
    Image.new("RGB", (8, 8), (7, 7, 12)).save(tmp_path / "2.png")
    assert not found(tmp_path)


def test_arrays_count_by_their_numbers(tmp_path):
    grey = np.repeat(np.random.default_rng(0).random((8, 8, 1), np.float32), 3, axis=2)
    np.save(tmp_path / "0.npy", grey)
    assert found(tmp_path)
    grey[3, 4, 1] += 0.001
    np.save(tmp_path / "1.npy", grey)
    assert not found(tmp_path)


def test_a_single_channel_has_nothing_to_be_equal_to(tmp_path):
    Image.new("L", (8, 8), 7).save(tmp_path / "0.png")
    assert not found(tmp_path, channels=1) and not is_grey(np.zeros((4, 4, 1), np.uint8))
