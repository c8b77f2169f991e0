"""The training loader: the same images for any number of ranks, exact resume, labels, state, timing."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

from mirl.dataloaders import build_train_loader
from mirl.dataloaders.decoding.samples import SampleReader
from mirl.keyed import keyed_u64

SIZE = (32, 48)


def seen(data, steps, *, world_size=1, micro_batch=8, accumulation=1, start=None, **options):
    """{(epoch, position): (sample id, image bytes)} of some steps on all ranks, and the state at the end."""
    found, states = {}, []
    for rank in range(world_size):
        settings = {"image_size": SIZE, "seed": 5, "threads": 1} | options
        with build_train_loader(
            data, micro_batch=micro_batch, accumulation=accumulation, rank=rank, world_size=world_size, **settings
        ) as loader:
            if start is not None:
                loader.load_state_dict(start)
            for _ in range(steps * accumulation):
                batch = loader.next_micro_batch()
                assert batch.images.shape == (micro_batch, *SIZE, 3) and batch.images.dtype == torch.uint8
                for i in range(micro_batch):
                    key = (batch.epoch, int(batch.positions[i]))
                    assert key not in found
                    found[key] = (int(batch.sample_ids[i]), batch.images[i].numpy().tobytes())
            states.append(loader.state_dict())
    assert all(state == states[0] for state in states)
    return found, states[0]


def test_images_of_a_step_do_not_depend_on_the_division_among_ranks(jpeg_folder):
    folder = jpeg_folder(21)
    one, _ = seen(folder, 4)
    assert len(one) == 32 and {epoch for epoch, _ in one} == {0, 1}
    assert seen(folder, 4, world_size=2, micro_batch=4)[0] == one
    assert seen(folder, 4, world_size=8, micro_batch=1)[0] == one
    assert seen(folder, 4, world_size=2, micro_batch=1, accumulation=4, threads=2)[0] == one
    assert seen(folder, 4, seed=6)[0] != one


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_resume_at_another_world_size_goes_on_with_the_same_images(jpeg_folder, stop):
    folder = jpeg_folder(21)  # two steps an epoch: the stops are in an epoch and at its border
    whole, end = seen(folder, 5)
    first, state = seen(folder, stop, world_size=2, micro_batch=4)
    assert state["step"] == stop
    second, other_end = seen(folder, 5 - stop, start=state, world_size=4, micro_batch=2)
    assert first | second == whole
    assert other_end == end


def test_a_jump_back_drops_what_was_made_ahead(jpeg_folder):
    with build_train_loader(jpeg_folder(), image_size=SIZE, micro_batch=4, threads=1) as loader:
        start = loader.state_dict()
        first = [loader.next_micro_batch() for _ in range(3)]
        loader.load_state_dict(start)
        again = [loader.next_micro_batch() for _ in range(3)]
        for a, b in zip(first, again, strict=True):
            assert np.array_equal(a.positions, b.positions) and torch.equal(a.images, b.images)


def test_state_in_the_middle_of_a_step_is_that_of_its_start(jpeg_folder):
    with build_train_loader(jpeg_folder(), image_size=SIZE, micro_batch=2, accumulation=3, threads=1) as loader:
        for _ in range(5):
            loader.next_micro_batch()
        assert loader.state_dict()["step"] == loader.step == 1


def test_an_epoch_shows_every_image_once_and_crops_differ_between_epochs(jpeg_folder):
    found, _ = seen(jpeg_folder(24), 6)
    for epoch in (0, 1):
        assert sorted(found[epoch, position][0] for position in range(24)) == list(range(24))
    by_id = [{found[e, p][0]: found[e, p][1] for p in range(24)} for e in (0, 1)]
    assert all(by_id[0][i] != by_id[1][i] for i in range(24))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 6}, "seed is 6, the checkpoint has 5"),
        ({"micro_batch": 4}, "effective_batch is 4, the checkpoint has 8; choose micro_batch x accumulation"),
    ],
)
def test_a_state_of_another_run_is_refused(jpeg_folder, change, message):
    folder = jpeg_folder()
    _, state = seen(folder, 1)
    settings = {"image_size": SIZE, "micro_batch": 8, "seed": 5, "threads": 1} | change
    with build_train_loader(folder, **settings) as loader, pytest.raises(ValueError, match=message):
        loader.load_state_dict(state)


def test_a_data_set_that_changed_is_refused_and_one_that_moved_is_not(jpeg_folder):
    folder = jpeg_folder()
    _, state = seen(folder, 1)
    moved = folder.rename(folder.parent / "elsewhere")
    with build_train_loader(moved, image_size=SIZE, micro_batch=8, seed=5, threads=1) as loader:
        loader.load_state_dict(state)
    (moved / "000.jpg").rename(moved / "new.jpg")
    with (
        build_train_loader(moved, image_size=SIZE, micro_batch=8, seed=5, threads=1) as loader,
        pytest.raises(ValueError, match="restore the data set as it was"),
    ):
        loader.load_state_dict(state)


def test_images_of_a_step_have_its_size_and_show_the_same_windows(jpeg_folder):
    folder = jpeg_folder(21)
    sizes = {0: (16, 24), 1: SIZE, 2: (8, 12), 3: SIZE}
    settings = {"image_size": SIZE, "micro_batch": 4, "accumulation": 2, "seed": 5, "threads": 1, "centred": 0.3}
    with build_train_loader(folder, **settings) as loader:
        whole = [loader.next_micro_batch() for _ in range(8)]
    for start in range(4):  # fresh, and after a resume
        with build_train_loader(folder, **settings) as loader:
            if start:
                loader.load_state_dict(loader.state_dict() | {"step": start})
            loader.take_image_sizes(lambda step: sizes.get(step, SIZE))  # batches past the end are begun too
            for number in range(2 * start, 8):
                batch, before = loader.next_micro_batch(), whole[number]
                size = sizes[number // 2]
                assert batch.images.shape == (4, *size, 3)
                assert np.array_equal(batch.sample_ids, before.sample_ids)
                if size == SIZE:
                    assert torch.equal(batch.images, before.images)
                else:  # the same pixels, made smaller: the average of an image stays
                    means, wanted = (each.images.float().mean((1, 2, 3)) for each in (batch, before))
                    assert (means - wanted).abs().max() < 2


def test_labels_are_those_of_the_images_that_are_shown(jpeg_folder):
    root = jpeg_folder(6, name="set/b").parent
    jpeg_folder(5, name="set/a")
    with build_train_loader(root, image_size=SIZE, micro_batch=11, threads=1, labels=True) as loader:
        assert loader.source.classes == ["a", "b"]
        batch = loader.next_micro_batch()
        folders = [path.split("/")[-2] for path in loader.paths(batch.sample_ids)]
        assert [loader.source.classes[label] for label in batch.labels.tolist()] == folders
        assert batch.labels.dtype == torch.int64


def test_the_transform_sees_every_batch(jpeg_folder):
    def brighten(batch):
        batch.images = batch.images.float() + 1000 * batch.epoch
        return batch

    with build_train_loader(
        jpeg_folder(8), image_size=SIZE, micro_batch=8, threads=1, batch_transform=brighten
    ) as loader:
        assert loader.next_micro_batch().images.max() < 1000 <= loader.next_micro_batch().images.min()


def test_waiting_is_counted_only_when_the_data_is_late(jpeg_folder, monkeypatch):
    with build_train_loader(jpeg_folder(), image_size=SIZE, micro_batch=4, threads=1) as loader:
        loader.next_micro_batch()
        time.sleep(0.5)  # the training step; two batches are made meanwhile
        before = loader.wait_seconds
        loader.next_micro_batch()
        assert loader.wait_seconds - before < 0.1

    slow_start = SampleReader.start

    def start(self, *arguments):
        time.sleep(0.2)
        return slow_start(self, *arguments)

    monkeypatch.setattr(SampleReader, "start", start)
    with build_train_loader(jpeg_folder(name="slow"), image_size=SIZE, micro_batch=4, threads=1) as loader:
        begin = time.perf_counter()
        for _ in range(8):
            loader.next_micro_batch()
        took = time.perf_counter() - begin
        assert took > 1.6
        assert loader.wait_seconds == pytest.approx(took, rel=0.05)  # nothing else was done but to wait


def test_closing_ends_every_thread_and_may_be_repeated(jpeg_folder):
    def ours():
        return {thread.name for thread in threading.enumerate() if thread.name.startswith("mirl-")}

    loader = build_train_loader(jpeg_folder(), image_size=SIZE, micro_batch=4, threads=2)
    loader.next_micro_batch()
    assert any(name == "mirl-data" for name in ours())
    loader.close()
    loader.close()
    assert not ours()


def test_an_error_in_the_background_reaches_the_loop_and_stays(jpeg_folder, monkeypatch):
    with build_train_loader(jpeg_folder(), image_size=SIZE, micro_batch=4, threads=1) as loader:

        def fail(*_):
            raise RuntimeError("the decoder is on fire")

        monkeypatch.setattr(loader._decoder, "submit", fail)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="on fire"):
                loader.next_micro_batch()


def test_positions_are_a_key_of_the_sample(jpeg_folder):
    with build_train_loader(jpeg_folder(), image_size=SIZE, micro_batch=4, threads=1) as loader:
        keys = [keyed_u64(9, 0, b.epoch, b.positions) for b in (loader.next_micro_batch() for _ in range(12))]
    assert len(np.unique(np.concatenate(keys))) == 48


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"micro_batch": 100}, "24 images, fewer than one step of 100"),
        ({"bad_image_limit": 2.0}, "bad_image_limit is 2.0"),
        ({"channels": 4}, "channels is 4, but .* is not an array file"),
        ({"layout": "folders"}, "layout is 'folders', must be one of auto, files, tar"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_decoded(jpeg_folder, change, message):
    with pytest.raises(ValueError, match=message):
        build_train_loader(jpeg_folder(), **({"image_size": SIZE, "micro_batch": 4} | change))
