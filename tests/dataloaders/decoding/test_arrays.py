"""Array files: what is an image of the set is decided by one reader, for training, validation and pictures."""

from __future__ import annotations

import io

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from mirl.dataloaders import build_train_loader, load_images, open_source
from mirl.dataloaders.decoding import headers
from mirl.dataloaders.decoding.arrays import ArrayFormat, detect_array_format
from mirl.dataloaders.errors import ImageError
from mirl.dataloaders.tools.validate import validate_data
from mirl.dataloaders.train_loader import first_array_format

SIZE = (16, 16)


def tiff(array: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "TIFF", **options)
    return buffer.getvalue()


@pytest.fixture
def tiles(tmp_path):
    """Six float tiles of four channels: 1 has an infinity, 0 and 3 have NaN."""
    folder = tmp_path / "tiles"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(6):
        tile = rng.random((20, 20, 4), dtype=np.float32) * 4 - 1
        if number in (0, 3):
            tile[:2] = np.nan
        if number == 1:
            tile[0, 0, 0] = np.inf
        np.save(folder / f"{number}.npy", tile)
    return folder


def test_what_validation_calls_good_is_what_training_takes(tiles):
    options = {"image_size": SIZE, "micro_batch": 6, "channels": 4, "threads": 1}
    with build_train_loader(tiles, bad_image_limit=1.0, **options) as loader:
        batch = loader.next_micro_batch()
        replaced = {bad.path.rpartition("/")[2]: bad.reason for bad in loader.bad_images}
    assert torch.isfinite(batch.images).all()
    report = validate_data(tiles, channels=4, progress=False)
    assert {row.path: row.reason for row in report.bad} == replaced
    assert set(replaced) == {"0.npy", "1.npy", "3.npy"}
    assert replaced["0.npy"].startswith("160 of its 1600 numbers are NaN or infinite")
    assert replaced["1.npy"].startswith("1 of its 1600 numbers are NaN or infinite")
    low, high = report.value_range
    assert -1 <= low < -0.9 and 2.9 < high <= 3 and "values of the arrays: -" in str(report)
    with build_train_loader(tiles, bad_image_limit=0, **(options | {"micro_batch": 3})) as loader:
        assert loader.num_images == 3
        loader.next_micro_batch()


def test_every_file_is_asked_for_its_kind(tmp_path):
    rng = np.random.default_rng(0)
    for number, dtype in enumerate([np.uint16, np.uint16, np.uint8, np.float32, np.int16]):
        np.save(tmp_path / f"{number}.npy", (rng.random((20, 20, 3)) * 100).astype(dtype))
    Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(tmp_path / "9.png")
    report = validate_data(tmp_path, progress=False)
    assert {row.path: row.reason for row in report.bad} == {
        "2.npy": "its numbers are uint8, those of the data set uint16",
        "3.npy": "its numbers are float32, those of the data set uint16",
        "4.npy": "its numbers are int16, those of the data set uint16",
        "9.png": "neither a .npy nor a TIFF file",
    }


def test_numbers_that_a_picture_cannot_hold_are_not_clipped(tmp_path, photo):
    photo(0).save(tmp_path / "0.jpg")
    (tmp_path / "1.tif").write_bytes(tiff(np.random.default_rng(0).random((20, 20)).astype(np.float32)))
    (tmp_path / "2.tif").write_bytes(tiff(np.full((20, 20), 70000, np.int32)))
    (tmp_path / "3.tif").write_bytes(tiff(np.full((20, 20), 60000, np.uint16)))
    reasons = {row.path: row.reason for row in validate_data(tmp_path, progress=False).bad}
    assert reasons == {
        "1.tif": "its numbers are floats, those of the data set 8-bit pictures",
        "2.tif": "its values are 70000 to 70000, a picture's are 0 to 65535",
    }


def test_all_splits_are_validated_each_with_its_manifest(jpeg_folder):
    root = jpeg_folder(3, name="root/train").parent
    for name in ("val", "test"):
        (jpeg_folder(2, name=f"root/{name}") / "001.jpg").write_bytes(b"")
    report = validate_data(root, progress=False)
    assert report.num_images == 7 and [row.path for row in report.bad] == ["val/001.jpg", "test/001.jpg"]
    assert [path.parent.name for path in report.manifests] == ["train", "val", "test"]
    assert open_source(root, split="val").num_images == 1 and open_source(root).num_images == 3
    with pytest.raises(ValueError, match="holds train, val, test: give one of them"):
        validate_data(root, manifest=root / "m.tsv")


@pytest.mark.parametrize("compression", ["tiff_lzw", "jpeg", "tiff_adobe_deflate", "group4", "raw"])
def test_tiff_that_pillow_reads_is_a_picture(tmp_path, photo, compression):
    pictures = [photo(number).convert("1") if compression == "group4" else photo(number) for number in range(4)]
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / f"{number}.tif", compression=compression)
    source = open_source(tmp_path)
    assert first_array_format(source, 3) is None
    assert not validate_data(tmp_path, progress=False).bad
    with build_train_loader(tmp_path, image_size=SIZE, micro_batch=4, threads=1, bad_image_limit=0) as loader:
        assert loader.next_micro_batch().images.shape == (4, *SIZE, 3)


def test_bilevel_tiff_without_compression_is_a_picture(photo):
    buffer = io.BytesIO()
    photo(0).convert("1").save(buffer, "TIFF")
    assert detect_array_format(buffer.getvalue(), "x.tif", 1) is None


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_numbers_in_a_compression_that_tifffile_lacks_are_read(dtype):
    array = (np.random.default_rng(0).random((30, 20)) * 1000).astype(dtype)
    data = tiff(array, compression="tiff_lzw")
    found = detect_array_format(data, "x.tif", 1)
    assert found == ArrayFormat(1, np.dtype(dtype))
    assert np.array_equal(found.read(data)[:, :, 0], array)


def test_a_tiff_that_unpacks_to_more_than_the_limit_is_not_unpacked(monkeypatch):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, np.zeros((400, 500, 4), np.uint16), compression="zlib", photometric="minisblack")
    monkeypatch.setattr(headers, "max_pixels", lambda: 199_999)
    monkeypatch.setattr(tifffile, "imread", lambda *_: pytest.fail("it was unpacked"))
    with pytest.raises(ImageError, match="400 x 500 pixels, 200000 in all, more than the limit of 199999"):
        ArrayFormat(4, np.dtype(np.uint16)).read(buffer.getvalue())
    with pytest.raises(ImageError, match="expected .H, W, 3."):
        ArrayFormat(3, np.dtype(np.uint16)).read(buffer.getvalue())


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_few_images_are_those_of_the_evaluation_loader(tmp_path, dtype):
    from mirl.dataloaders import build_eval_loader

    rng = np.random.default_rng(0)
    for number, shape in enumerate([(20, 30, 2), (40, 16, 2), (16, 1000, 2)]):
        np.save(tmp_path / f"{number}.npy", (rng.random(shape) * 1000).astype(dtype))
    options = {"image_size": SIZE, "channels": 2, "mean": (0.2, 100.0), "std": (0.1, 7.0), "resize_short": 18}
    with build_eval_loader(tmp_path, batch_size=3, labels=False, threads=1, **options) as loader:
        batch = next(iter(loader))
        alone = load_images(loader.paths([0, 1, 2]), **options)
    assert torch.equal(alone, batch.images) and alone.dtype == torch.float32
    plain = load_images(sorted(tmp_path.iterdir()), **(options | {"mean": None, "std": None}))
    expected = (plain - torch.tensor([0.2, 100.0]).view(1, 2, 1, 1)) / torch.tensor([0.1, 7.0]).view(1, 2, 1, 1)
    assert torch.allclose(alone, expected)


def test_suspects_of_a_loss_that_is_not_finite_are_the_largest_numbers(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(8):
        tile = rng.random((20, 20, 3), dtype=np.float32)
        np.save(tmp_path / f"{number}.npy", tile * {5: -1e30, 6: 1e20}.get(number, 1))
    with build_train_loader(tmp_path, image_size=SIZE, micro_batch=8, threads=1) as loader:
        ids = loader.next_micro_batch().sample_ids
        assert [path.rpartition("/")[2] for path in loader.suspects(ids)[:2]] == ["5.npy", "6.npy"]


def test_suspects_among_pictures_stay_in_order(jpeg_folder):
    with build_train_loader(jpeg_folder(6), image_size=SIZE, micro_batch=6, threads=1) as loader:
        ids = loader.next_micro_batch().sample_ids
        assert loader.suspects(ids) == loader.paths(ids)
