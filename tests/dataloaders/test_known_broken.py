"""A run whose images turned out to be broken goes on in its own order, with or without a manifest that says so."""

from __future__ import annotations

import logging

import pytest

from mirl.dataloaders import build_train_loader
from mirl.dataloaders.tools.validate import validate_data
from mirl.errors import UserError

SETTINGS = {"image_size": (32, 32), "micro_batch": 4, "seed": 1, "threads": 1}


def shown(loader, steps: int) -> list[tuple[list[int], bytes]]:
    with loader:
        batches = [loader.next_micro_batch() for _ in range(steps)]
        return [(batch.sample_ids.tolist(), batch.images.numpy().tobytes()) for batch in batches]


@pytest.mark.parametrize("named", ["folder", "manifest"])
def test_after_validation_the_images_are_those_of_a_run_that_tolerates_them(named, jpeg_folder, caplog):
    folder = jpeg_folder(20)
    for number, path in enumerate(sorted(folder.rglob("*.jpg"))):
        if number % 6 == 1:
            path.write_bytes(path.read_bytes()[:200])
    tolerant = build_train_loader(folder, bad_image_limit=1.0, **SETTINGS)
    with tolerant:
        for _ in range(3):
            tolerant.next_micro_batch()
        state = tolerant.state_dict()
        wanted = [tolerant.next_micro_batch() for _ in range(12)]
        wanted = [(batch.sample_ids.tolist(), batch.images.numpy().tobytes()) for batch in wanted]
    report = validate_data(folder, progress=False)
    data = folder if named == "folder" else report.manifest
    caplog.set_level(logging.WARNING)
    # A fresh run leaves them out; the checkpoint's own refuses to mix the two orders, unless it is told of it.
    with build_train_loader(data, bad_image_limit=0, **SETTINGS) as fresh:
        assert fresh.num_images == 20 - len(report.bad)
        with pytest.raises(UserError, match="restore the data set as it was"):
            fresh.load_state_dict(state)
    resumed = build_train_loader(data, bad_image_limit=0, resumed_fingerprint=state["fingerprint"], **SETTINGS)
    resumed.load_state_dict(state)
    assert shown(resumed, 12) == wanted
    assert resumed.bad_images == [] and resumed.num_images == 20
    assert f"{len(report.bad)} of 20 images, called broken by the manifest, keep their places" in caplog.text
    # What it saves is again the data set that it began with.
    assert resumed.state_dict()["fingerprint"] == state["fingerprint"]


def test_a_file_that_breaks_later_is_still_counted(jpeg_folder):
    folder = jpeg_folder(20)
    with build_train_loader(folder, **SETTINGS) as first:
        state = first.state_dict()
    paths = sorted(folder.rglob("*.jpg"))
    paths[1].write_bytes(b"")
    validate_data(folder, progress=False)
    paths[2].write_bytes(b"")
    with build_train_loader(folder, resumed_fingerprint=state["fingerprint"], bad_image_limit=1, **SETTINGS) as loader:
        loader.load_state_dict(state)
        for _ in range(10):
            loader.next_micro_batch()
        assert [bad.path for bad in loader.bad_images] == [str(paths[2])]


def test_an_image_that_is_gone_is_still_another_data_set(jpeg_folder):
    folder = jpeg_folder(20)
    with build_train_loader(folder, **SETTINGS) as first:
        state = first.state_dict()
    sorted(folder.rglob("*.jpg"))[1].unlink()
    validate_data(folder, progress=False)
    with (
        build_train_loader(folder, resumed_fingerprint=state["fingerprint"], **SETTINGS) as loader,
        pytest.raises(UserError, match=r"it had 20 images and now there are 19.*broken files need not be deleted"),
    ):
        loader.load_state_dict(state)
