"""Pixels of fixed windows against Pillow: decoding, orientation, bicubic resize, mirror, evaluation crop."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from mirl.dataloaders.decoding.crops import evaluation_windows
from mirl.dataloaders.decoding.dali_pipeline import DaliDecoder, DecodeJob
from mirl.dataloaders.decoding.resize import CpuResizer, resize_bicubic

SIZE = (64, 64)
WINDOWS = [(0, 0, 300, 400), (10, 21, 200, 150), (150, 3, 64, 64), (40, 40, 30, 41), (7, 100, 290, 260)]


def pillow(data: bytes, window, mirrored, size=SIZE) -> np.ndarray:
    top, left, height, width = window
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    image = image.crop((left, top, left + width, top + height)).resize(size[::-1], Image.Resampling.BICUBIC)
    return np.asarray(ImageOps.mirror(image) if mirrored else image).astype(int)


def finish(job: DecodeJob, in_dali: bool, image_size: tuple[int, int] = SIZE) -> np.ndarray:
    """The images of a job by the path of CPU users, or with DALI's resize as on a GPU."""
    decoder = DaliDecoder(
        batch_size=len(job.encoded), image_size=image_size, channels=3, threads=1, device_id=None, finish=in_dali
    )
    decoder.submit(job, lambda i: pytest.fail(f"sample {i} was refused"))
    images = decoder.collect()
    if not in_dali:
        resizer = CpuResizer(image_size, threads=2)
        images = resizer(images, job.mirrored, job.sizes, job.offsets, job.image_size)
        resizer.close()
    decoder.close()
    return images.numpy().astype(int)


def assert_close(ours: np.ndarray, theirs: np.ndarray, in_dali: bool) -> None:
    """Levels of 255. torch resizes with Pillow's fixed-point arithmetic: equal but for the rounding of a few pixels.

    DALI's resize agrees with the exact float result to a level when it enlarges; when it shrinks, its tabulated kernel
    is off at sharp edges, by 10 levels where the photograph is shrunk 4.7 times, 0.2 on average.
    """
    difference = np.abs(ours - theirs)
    assert difference.max() <= (16 if in_dali else 2)
    assert np.quantile(difference, 0.99) <= (3 if in_dali else 1)
    assert difference.mean() <= (0.4 if in_dali else 0.02)


@pytest.mark.parametrize("in_dali", [False, True])
@pytest.mark.parametrize("orientation", [None, 2, 3, 4, 5, 6, 7, 8])
def test_windows_of_upright_jpegs_are_those_of_pillow(photo, encoded, orientation, in_dali):
    width, height = (300, 400) if orientation in (5, 6, 7, 8) else (400, 300)  # upright: 400 wide
    data = encoded(photo(3, width, height), quality=95, orientation=orientation)
    mirrored = np.array([False, True, True, False, True])
    job = DecodeJob([np.frombuffer(data, np.uint8)] * 5, np.array(WINDOWS, np.int32), mirrored)
    ours = finish(job, in_dali)
    theirs = np.stack([pillow(data, *pair) for pair in zip(WINDOWS, mirrored, strict=True)])
    assert_close(ours, theirs, in_dali)
    # The test can see a wrong turn: the unmirrored window is far away.
    assert np.abs(ours[1][:, ::-1] - theirs[1]).mean() > 10


@pytest.mark.parametrize("in_dali", [False, True])
def test_a_job_of_another_size_is_what_a_decoder_of_that_size_makes(photo, encoded, in_dali):
    files = [np.frombuffer(encoded(photo(3, 400, 300)), np.uint8)] * 2
    geometry = np.array(WINDOWS[:2], np.int32), np.array([True, False])
    ours = finish(DecodeJob(files, *geometry, image_size=(40, 24)), in_dali)
    assert ours.shape == (2, 40, 24, 3)
    assert np.array_equal(ours, finish(DecodeJob(files, *geometry), in_dali, image_size=(40, 24)))


@pytest.mark.parametrize("in_dali", [False, True])
@pytest.mark.parametrize(("width", "height"), [(400, 300), (300, 400), (333, 100), (64, 64)])
def test_evaluation_equals_resize_and_centre_crop(photo, encoded, width, height, in_dali):
    data = encoded(photo(4, width, height), "PNG")
    geometry = evaluation_windows(np.array([(height, width)]), 73, SIZE)
    ours = finish(DecodeJob([np.frombuffer(data, np.uint8)], *geometry), in_dali)[0]
    long = int(73 * max(width, height) / min(width, height))
    size = (73, long) if width < height else (long, 73)
    top, left = round((size[1] - 64) / 2), round((size[0] - 64) / 2)
    whole = Image.open(io.BytesIO(data)).resize(size, Image.Resampling.BICUBIC)
    theirs = np.asarray(whole.crop((left, top, left + 64, top + 64))).astype(int)
    assert_close(ours, theirs, in_dali)


def test_float_resize_is_the_same_kernel(photo):
    pixels = np.asarray(photo(5, 200, 150))
    as_float = resize_bicubic(np.ascontiguousarray(pixels, np.float32), SIZE)
    as_uint8 = resize_bicubic(pixels.copy(), SIZE)
    difference = (as_float.clamp(0, 255) - as_uint8.float()).abs()
    # 8 bits are rounded after each axis, and overshoot at sharp edges is clipped after the first, as in Pillow.
    assert difference.mean() <= 0.4 and difference.max() <= 6


def test_many_channels_are_resized_each_by_itself():
    pixels = torch.rand(40, 50, 7, generator=torch.Generator().manual_seed(0)).numpy()
    whole = resize_bicubic(pixels, (16, 24))
    for channel in range(7):
        alone = resize_bicubic(np.ascontiguousarray(pixels[:, :, channel : channel + 1]), (16, 24))
        assert torch.allclose(whole[:, :, channel], alone[:, :, 0], atol=1e-6)  # float32 sums in another order


def test_an_image_of_the_output_size_is_not_touched(photo):
    pixels = np.asarray(photo(5, 64, 64)).copy()
    assert np.array_equal(resize_bicubic(pixels, SIZE).numpy(), pixels)


def test_decoded_windows_stay_as_they_are_while_later_batches_are_decoded(photo, encoded):
    files = [np.frombuffer(encoded(photo(number, 200, 150)), np.uint8) for number in range(12)]
    windows, mirrored = np.tile(np.int32([0, 0, 150, 200]), (4, 1)), np.zeros(4, bool)
    decoder = DaliDecoder(batch_size=4, image_size=SIZE, channels=3, threads=2, device_id=None)
    for first in (0, 4):
        decoder.submit(DecodeJob(files[first : first + 4], windows, mirrored), pytest.fail)
    held = decoder.collect()
    copies = [window.copy() for window in held]
    for repeat in range(20):
        decoder.submit(DecodeJob(files[8:] if repeat % 2 else files[4:8], windows, mirrored), pytest.fail)
        decoder.collect()
    assert all(np.array_equal(window, copy) for window, copy in zip(held, copies, strict=True))
    decoder.close()
