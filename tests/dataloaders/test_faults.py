"""Broken images in training: named, replaced, counted, and never a step more or less on any rank."""

from __future__ import annotations

import os
import re

import numpy as np
import pytest

from mirl.dataloaders import TooManyBadImages, build_train_loader
from mirl.dataloaders.decoding.samples import SampleReader

SIZE = (32, 32)
HTML = b"<!DOCTYPE html><html><head><title>404 Not Found</title></head></html>"


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def wrong_crc(data: bytes) -> bytes:
    """A PNG whose header and end are whole: only DALI finds out, and loses the batch."""
    return data[: len(data) // 2] + bytes(64) + data[len(data) // 2 + 64 :]


FAULTS = {
    "cut": (cut, "truncated|cut|end of"),
    "empty": (lambda data: b"", "the file is empty"),
    "html": (lambda data: HTML, "an HTML or XML page"),
    "noise": (lambda data: np.random.default_rng(0).bytes(3000), "not an image"),
    "deleted": (None, "no longer exists"),
}


def open_loader(folder, **options):
    settings = {"image_size": SIZE, "micro_batch": 4, "seed": 1, "threads": 1, "bad_image_limit": 1.0}
    return build_train_loader(folder, **(settings | options))


def collect(folder, steps=6, loader=None, **options):
    """{position: (id, image bytes)} and the loader's record of bad images."""
    with loader or open_loader(folder, **options) as loader:
        found = {}
        for _ in range(steps):
            batch = loader.next_micro_batch()
            for i, position in enumerate(batch.positions.tolist()):
                found[batch.epoch, position] = (int(batch.sample_ids[i]), batch.images[i].numpy().tobytes())
        return found, loader.bad_images, loader.bad_encounters


def break_file(path, fault):
    damage, _ = FAULTS[fault]
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))


@pytest.mark.parametrize("fault", FAULTS)
def test_one_bad_image_on_one_of_two_ranks(jpeg_folder, fault, caplog):
    folder = jpeg_folder(24)
    good, none_bad, _ = collect(folder)
    assert not none_bad and len(good) == 24
    broken = 7
    loaders = [open_loader(folder, rank=rank, world_size=2, micro_batch=2) for rank in (0, 1)]
    break_file(folder / f"{broken:03d}.jpg", fault)  # after the listing, before the reading
    results = [collect(folder, loader=loader) for loader in loaders]
    ranks_with_bad = [result for result in results if result[1]]
    assert len(ranks_with_bad) == 1
    ((_, bad_images, encounters),) = ranks_with_bad
    (bad,) = bad_images
    assert encounters == 1
    assert bad.path.endswith("007.jpg") and bad.replaced_by != bad.path
    assert re.search(FAULTS[fault][1], bad.reason), bad.reason
    assert "007.jpg" in caplog.text and "shown instead" in caplog.text
    # Both ranks made all their steps, and only that one place shows another image.
    found = results[0][0] | results[1][0]
    assert found.keys() == good.keys()
    changed = [key for key in good if found[key] != good[key]]
    assert changed == [(bad.epoch, bad.position)]
    assert good[changed[0]][0] == broken != found[changed[0]][0]


@pytest.mark.parametrize("fault", ["cut", "wrong_crc"])
def test_the_replacement_is_the_same_for_any_world_size_and_after_a_resume(jpeg_folder, photo, encoded, fault):
    folder = jpeg_folder(20)
    for number in (3, 11):
        (folder / f"{number:03d}.jpg").write_bytes(
            (cut if fault == "cut" else wrong_crc)(encoded(photo(number), "PNG"))
        )
    whole, bad_images, encounters = collect(folder, steps=15)
    assert len(bad_images) == 2 and encounters == 6  # each once in each of three epochs
    by_two = [collect(folder, steps=15, rank=rank, world_size=2, micro_batch=2)[0] for rank in (0, 1)]
    assert by_two[0] | by_two[1] == whole
    with open_loader(folder) as loader:
        for _ in range(7):
            loader.next_micro_batch()
        state = loader.state_dict()
    resumed = open_loader(folder)
    resumed.load_state_dict(state)
    rest, _, _ = collect(folder, steps=8, loader=resumed)
    assert rest == {key: value for key, value in whole.items() if key in rest} and len(rest) == 32


def test_several_refused_by_dali_in_one_batch(jpeg_folder, photo, encoded):
    folder = jpeg_folder(12)
    for number in (0, 1, 2, 3, 4):
        (folder / f"{number:03d}.jpg").write_bytes(wrong_crc(encoded(photo(number), "PNG")))
    found, bad_images, _ = collect(folder, steps=4, micro_batch=12)
    assert len(bad_images) == 5
    assert {index for index, _ in found.values()} == set(range(5, 12))


def test_a_file_that_dali_refuses_and_pillow_reads_is_shown(jpeg_folder, monkeypatch):
    folder = jpeg_folder(8)
    good, _, _ = collect(folder, steps=4)
    from mirl.dataloaders.decoding.dali_pipeline import DaliDecoder

    build, refused = DaliDecoder._build, []

    class Refusing:
        """DALI, but it refuses one JPEG file, in the batch and alone."""

        def __init__(self, pipe):
            self.pipe, self.poisoned = pipe, False

        def feed_input(self, name, data):
            if name == "encoded":
                self.poisoned = self.poisoned or any(part.tobytes() == refused[0] for part in data)
            self.pipe.feed_input(name, data)

        def share_outputs(self):
            if self.poisoned:
                raise RuntimeError("refused")
            return self.pipe.share_outputs()

        def __getattr__(self, name):
            return getattr(self.pipe, name)

    refused.append((folder / "005.jpg").read_bytes())
    monkeypatch.setattr(DaliDecoder, "_build", lambda self, *a: Refusing(build(self, *a)))
    found, bad_images, _ = collect(folder, steps=4)
    assert not bad_images
    assert found == good  # Pillow and DALI use the same JPEG library: the pixels are equal


def test_past_the_limit_the_run_stops_at_a_known_step(jpeg_folder):
    folder = jpeg_folder(24)
    for number in range(0, 24, 4):
        (folder / f"{number:03d}.jpg").write_bytes(b"")
    with open_loader(folder, bad_image_limit=0.1) as loader:  # 2 of 24 are allowed, the third stops
        with pytest.raises(TooManyBadImages, match=r"3 of 24 images .* more than the 2 .* validate-data"):
            for _ in range(6):
                loader.next_micro_batch()
        assert len(loader.bad_images) >= 3
        stopped_at = loader.step
    with open_loader(folder, bad_image_limit=0.1, raise_on_bad_limit=False) as loader:
        for step in range(6):
            loader.next_micro_batch()
            assert loader.too_many_bad == (step + 1 >= stopped_at)
        assert "bad_image_limit 0.1" in str(loader.bad_limit_error())


def test_limit_zero_tolerates_nothing_and_the_default_one_image_of_a_small_set(jpeg_folder):
    folder = jpeg_folder(24)
    (folder / "000.jpg").write_bytes(b"")
    with open_loader(folder, bad_image_limit=0, micro_batch=24) as loader, pytest.raises(TooManyBadImages):
        loader.next_micro_batch()
    with open_loader(folder, bad_image_limit=0.001, micro_batch=24) as loader:
        loader.next_micro_batch()
        assert [os.path.basename(bad.path) for bad in loader.bad_images] == ["000.jpg"]


def test_what_was_made_ahead_but_not_taken_is_not_counted(jpeg_folder):
    folder = jpeg_folder(24)
    for path in folder.iterdir():
        if path.name != "000.jpg":
            path.write_bytes(b"")
    with open_loader(folder, micro_batch=1) as loader:
        assert loader.bad_encounters == 0
        loader.next_micro_batch()
        assert loader.bad_encounters <= 1


def test_when_nothing_can_be_read_the_error_says_so(jpeg_folder):
    folder = jpeg_folder(24)
    loader = open_loader(folder)
    for path in folder.iterdir():
        path.write_bytes(b"")
    with loader, pytest.raises(ValueError, match="the file is empty.*run mirl validate-data"):
        loader.next_micro_batch()


def test_a_data_set_of_nothing_but_broken_files_is_refused_at_the_start(jpeg_folder):
    folder = jpeg_folder(8)
    for path in folder.iterdir():
        path.write_bytes(HTML)
    # Detected by the first batch at the latest; a page is not an array, so the format itself is taken for pictures.
    with open_loader(folder) as loader, pytest.raises(ValueError, match="HTML or XML page"):
        loader.next_micro_batch()


def test_the_reader_gives_up_on_the_same_image_only(jpeg_folder):
    from mirl.dataloaders.sources.opening import open_source

    folder = jpeg_folder(8)
    (folder / "002.jpg").write_bytes(b"")
    reader = SampleReader(open_source(folder), seed=0, threads=1)
    samples = reader.finish(reader.start([1, 2, 3], 0, [0, 1, 2]))
    assert [sample.wanted for sample in samples] == [1, 2, 3]
    assert [bool(sample.reason) for sample in samples] == [False, True, False]
    assert samples[1].index not in (2,)
    reader.close()
