"""What `mirl validate-data` says of a data set that it has decoded."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from mirl.dataloaders.tools.overview import CLASSES_SHOWN, look_at
from mirl.dataloaders.tools.prepare import prepare_data
from mirl.dataloaders.tools.validate import validate_data


def write(folder, count, *, size=(20, 10), mode="RGB", seed=0):
    """PNG files of noise; ``size``: width and height, pixels."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        shape = size[::-1] if mode == "L" else (*size[::-1], len(mode))
        picture = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8), mode)
        picture.save(folder / f"{seed}-{number:03d}.png")
    return folder


def overview(root, **options):
    (found,) = validate_data(root, progress=False, **options).overviews
    return found


def test_classes_are_counted_and_a_small_one_is_pointed_out(tmp_path):
    for name, count in (("bag", 31), ("boot", 3), ("coat", 40)):
        write(tmp_path / name, count, seed=count)
    (tmp_path / "coat" / "40-000.png").write_bytes(b"")
    found = overview(tmp_path)
    assert found.counts == {"bag": 31, "boot": 3, "coat": 39} and found.small_classes == {"boot": 3}
    lines = "\n".join(found.lines())
    assert "classes 3: bag 31, boot 3, coat 39; smallest boot (3), largest coat (39), median 31" in lines
    assert "warning: few images of class boot (3), less than a tenth of the median class (31)" in lines
    write(tmp_path / "boot", 1, seed=99)  # 4 of 31 are more than a tenth
    found = overview(tmp_path)
    assert not found.small_classes and "warning" not in "\n".join(found.lines())


def test_a_class_whose_images_are_all_broken_is_still_one(tmp_path):
    write(tmp_path / "a", 3)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "0.png").write_bytes(b"")
    assert overview(tmp_path).counts == {"a": 3, "b": 0} and overview(tmp_path).small_classes == {"b": 0}


def test_many_classes_are_not_listed(tmp_path):
    for number in range(CLASSES_SHOWN + 1):
        write(tmp_path / f"{number:02d}", 1, seed=number, size=(4, 4))
    line = overview(tmp_path).lines()[0]
    assert line.startswith(f"classes {CLASSES_SHOWN + 1}, 1 images each") and len(line) < 120
    write(tmp_path / "07", 4, seed=50, size=(4, 4))
    line = overview(tmp_path).lines()[0]
    assert line == f"classes {CLASSES_SHOWN + 1}; smallest 00 (1), largest 07 (5), median 1"


def test_splits_have_an_overview_each(tmp_path):
    write(tmp_path / "train" / "a", 4)
    write(tmp_path / "train" / "b", 2)
    write(tmp_path / "val" / "a", 1)
    report = validate_data(tmp_path, progress=False)
    assert [(found.name, found.counts) for found in report.overviews] == [
        ("train", {"a": 4, "b": 2}), ("val", {"a": 1}),
    ]  # fmt: skip
    assert "  train: classes 2: a 4, b 2; smallest b (2)" in str(report) and "  val: classes 1: a 1" in str(report)


def test_sizes_and_modes(tmp_path):
    write(tmp_path, 3, size=(20, 10))
    write(tmp_path, 1, size=(300, 40), mode="L", seed=1)
    write(tmp_path, 1, size=(30, 12), mode="RGBA", seed=2)
    found = overview(tmp_path)
    assert (found.heights, found.widths) == ((10, 10, 40), (20, 20, 300))
    assert found.modes == {"RGB": 3, "L": 1, "RGBA": 1} and found.counts is None and found.grey == 1
    lines = "\n".join(found.lines())
    assert "height 10 / 10 / 40, width 20 / 20 / 300 pixels (least / median / greatest)" in lines
    assert "stored as 3 RGB, 1 L, 1 RGBA; 1 of them grey; used with 3 channels" in lines
    assert "classes: none" in lines


@pytest.mark.parametrize("channels", [1, 3])
def test_mean_and_deviation_are_those_of_the_pixels(tmp_path, channels):
    write(tmp_path, 5, mode="RGB" if channels == 3 else "L")
    pixels = np.stack([np.asarray(Image.open(path)) for path in sorted(tmp_path.glob("*.png"))]).reshape(-1, channels)
    found = overview(tmp_path, channels=channels)
    assert found.mean == pytest.approx(tuple((pixels / 255).mean(axis=0)), rel=1e-9)
    assert found.std == pytest.approx(tuple((pixels / 255).std(axis=0)), rel=1e-9)
    assert found.lines()[-1].startswith("mean and std of these images: --mean 0.")


def test_grey_images_get_one_mean_and_std(tmp_path):
    for number in range(3):
        grey = np.full((8, 8), 50 * number, np.uint8)
        Image.fromarray(grey).convert("RGB").save(tmp_path / f"{number}.png")
    found = overview(tmp_path)
    value, deviation = 50 / 255, np.std([0, 50, 100]) / 255
    assert found.grey == 3 and "3 RGB; all of them grey" in "\n".join(found.lines())
    assert found.lines()[-1] == (
        "mean and std of these grey images, one for all channels: "
        f"--mean{f' {value:.4g}' * 3} --std{f' {deviation:.4g}' * 3} (pretrain by itself takes ImageNet's, one for all "
        "channels too)"
    )


def test_arrays_are_told_by_their_numbers(tmp_path):
    array = np.arange(6 * 5 * 4, dtype=np.uint16).reshape(6, 5, 4) * 500
    np.save(tmp_path / "0.npy", array)
    found = overview(tmp_path, channels=4)
    assert found.modes == {"uint16": 1}
    assert found.mean == pytest.approx(tuple((array / 65535).reshape(-1, 4).mean(axis=0)))


def test_a_large_image_is_summed_in_pieces(monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 7, 3), dtype=np.uint8)
    whole = look_at(pixels, "RGB")
    monkeypatch.setattr("mirl.dataloaders.tools.overview._ROWS_AT_ONCE", 16)
    pieces = look_at(pixels, "RGB")
    assert pieces.mean == pytest.approx(whole.mean) and pieces.square == pytest.approx(whole.square)


def test_classes_of_shards_and_a_set_without_any(tmp_path):
    for name, count in (("a", 3), ("b", 2)):
        write(tmp_path / "src" / name, count, seed=count)
    prepare_data(tmp_path / "src", tmp_path / "shards", shard_size=2, progress=False)
    assert overview(tmp_path / "shards").counts == {"a": 3, "b": 2}
    listing = tmp_path / "list.txt"
    listing.write_text("".join(f"{path}\n" for path in sorted((tmp_path / "src").rglob("*.png"))))
    assert overview(listing, manifest=tmp_path / "m.tsv").counts is None
    listing.write_text("".join(f"{path}\t{len(path.parent.name)}\n" for path in (tmp_path / "src").rglob("*.png")))
    assert overview(listing, manifest=tmp_path / "m.tsv").counts == {"1": 5}
