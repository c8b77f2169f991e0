"""Evaluation: every image once on every number of ranks, labels, and nothing broken counted."""

from __future__ import annotations

import numpy as np
import pytest

from mirl.dataloaders import build_eval_loader, load_images

SIZE = (32, 32)


@pytest.fixture
def classes(jpeg_folder):
    root = jpeg_folder(9, name="set/a").parent
    jpeg_folder(8, name="set/b")
    return root


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_image_once_with_its_label(classes, world_size):
    seen, lengths = [], set()
    for rank in range(world_size):
        with build_eval_loader(
            classes, image_size=SIZE, batch_size=4, rank=rank, world_size=world_size, threads=1
        ) as loader:
            assert loader.classes == ["a", "b"] and loader.num_images == 17
            lengths.add(len(loader))
            batches = list(loader)
            assert len(batches) == len(loader)
            for batch in batches:
                assert batch.images.shape == (4, *SIZE, 3)
                seen += [
                    (int(i), int(y)) for i, y, v in zip(batch.sample_ids, batch.labels, batch.valid, strict=True) if v
                ]
    assert len(lengths) == 1
    assert sorted(seen) == [(i, int(i >= 9)) for i in range(17)]


def test_every_pass_is_the_same_and_equals_load_images(classes):
    with build_eval_loader(classes, image_size=SIZE, batch_size=17, resize_short=40, threads=1) as loader:
        (first,), (second,) = list(loader), list(loader)
        assert (first.images == second.images).all()
        alone = load_images(loader.paths(first.sample_ids), image_size=SIZE, resize_short=40)
        assert (alone == first.images).all()


def test_a_pass_may_be_left_early(classes):
    with build_eval_loader(classes, image_size=SIZE, batch_size=2, threads=1) as loader:
        for _ in range(3):
            assert next(iter(loader)).sample_ids.tolist() == [0, 1]
        assert sum(batch.valid.sum() for batch in loader) == 17


def test_a_broken_image_is_named_and_not_counted(classes):
    (classes / "a/003.jpg").write_bytes(b"")
    (classes / "b/007.jpg").write_bytes(b"<html>")  # the last one, which padding repeats
    with build_eval_loader(classes, image_size=SIZE, batch_size=4, threads=1) as loader:
        valid = np.concatenate([batch.valid for batch in loader])
        assert [path.path[-9:] for path in loader.bad_images] == ["a/003.jpg", "b/007.jpg"]
    assert valid.sum() == 15 and not valid[3] and not valid[16:].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"rank": 1}, "rank is 1, must be in 0..0"),
        ({"image_size": (0, 5)}, "image_size is"),
        ({"resize_short": 0}, "resize_short is 0"),
    ],
)
def test_wrong_settings_are_refused(classes, change, message):
    with pytest.raises(ValueError, match=message):
        build_eval_loader(classes, **({"image_size": SIZE, "batch_size": 4} | change))
