"""Augmentation is a function of the seed and the place of an image, whatever makes it; each part can be turned off."""

from __future__ import annotations

import dataclasses
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from mirl.dataloaders import Batch, build_train_loader
from mirl.engine.transfer.classification.augmentation import BatchAugmentation, soft_cross_entropy
from mirl.engine.transfer.classification.rand_augment import RandAugment, make_operation
from mirl.engine.transfer.random_state import seeded
from mirl.errors import UserError
from tests.engine.conftest import write_classes
from tests.support.launch import CHECKOUT, launch_environment

SIZE, MEAN, STD, CLASSES = (16, 24), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 7
CPU = torch.device("cpu")


def make_batch(count: int = 6, first: int = 0, epoch: int = 1) -> Batch:
    """Images ``first`` ... of one fixed set."""
    images = torch.randint(0, 256, (64, *SIZE, 3), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    positions = np.arange(first, first + count)
    return Batch(
        images=images[positions], sample_ids=positions, epoch=epoch, positions=positions,
        labels=torch.from_numpy(positions % CLASSES),
    )  # fmt: skip


def rand_augment(**options) -> RandAugment:
    return RandAugment(**({"image_size": SIZE, "mean": MEAN, "seed": 5, "workers": 0} | options))


def batch_augmentation(**options) -> BatchAugmentation:
    defaults = {"num_classes": CLASSES, "mean": MEAN, "std": STD, "seed": 5, "micro_batch": 6, "device": CPU}
    return BatchAugmentation(**(defaults | options))


OFF = {"random_erase": 0.0, "mixup": 0.0, "cutmix": 0.0, "label_smoothing": 0.0}


def test_rand_augment_depends_on_seed_and_place_alone():
    transform = rand_augment()
    whole = transform(make_batch(6)).images
    parts = [transform(make_batch(3, first)).images for first in (3, 0)]
    assert torch.equal(whole, torch.cat(parts[::-1]))
    assert whole.dtype == torch.uint8 and whole.shape == (6, *SIZE, 3)
    assert not torch.equal(whole, make_batch(6).images)
    assert not torch.equal(whole, transform(make_batch(6, epoch=2)).images)
    assert not torch.equal(whole, rand_augment(seed=6)(make_batch(6)).images)
    # each image in its own way: the same picture at two places
    twice = dataclasses.replace(make_batch(32), images=make_batch(1).images.expand(32, -1, -1, -1))
    assert len({image.numpy().tobytes() for image in transform(twice).images}) > 8


@pytest.mark.parametrize("magnitude", [0, 9, 10])
def test_every_operator_works_at_every_magnitude(magnitude):
    """Pillow 13 refuses to keep 0 bits, which timm asks for at magnitude 10."""
    image = Image.fromarray(make_batch(1).images[0].numpy())
    for inc in (0, 1):
        for operator in make_operation(f"rand-m{magnitude}-p1-inc{inc}", SIZE, MEAN).ops:
            operator.prob = 1.0
            assert operator(image).size == image.size, operator.name


def test_rand_augment_refuses_what_it_cannot_do():
    with pytest.raises(UserError, match="images have 4 channels.*set --rand-augment off"):
        rand_augment(mean=(0.5,) * 4)
    for form in ("rand-m9-x3", "augmix-m3", "rand-mstdbig", ""):
        with pytest.raises(UserError, match="give off, or timm's notation"):
            rand_augment(form=form)
    floats = dataclasses.replace(make_batch(), images=torch.zeros(6, 3, *SIZE))
    with pytest.raises(UserError, match="arrays of floats"):
        rand_augment()(floats)


@pytest.mark.slow
def test_workers_do_the_same_and_leave_when_they_should():
    batch = make_batch(13)
    transform = rand_augment(workers=2)
    try:
        assert torch.equal(transform(batch).images, rand_augment()(batch).images)
        workers = psutil.Process().children(recursive=True)
        workers = [process for process in workers if "spawn_main" in " ".join(process.cmdline())]
        assert len(workers) == 2
        for process in workers:  # a scheduler that ends a job, and a terminal, signal the whole group
            for number in (signal.SIGTERM, signal.SIGINT):
                subprocess.run(["kill", f"-{number.value}", str(process.pid)], check=True)
        time.sleep(0.2)
        assert torch.equal(transform(batch).images, rand_augment()(batch).images)
        workers[0].kill()  # as when memory runs out: an error, not a hang
        deadline = time.monotonic() + 60  # the pool has to notice
        with pytest.raises(BrokenProcessPool):
            while time.monotonic() < deadline:
                transform(batch)
    finally:
        transform.close()
        transform.close()
    assert psutil.wait_procs(workers, timeout=20)[1] == []


ORPHAN = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from tests.engine.transfer.classification.test_augmentation import make_batch, rand_augment
import psutil
if __name__ == "__main__":
    transform = rand_augment(workers=1)
    transform(make_batch(2))
    print(*[child.pid for child in psutil.Process().children(recursive=True)], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_workers_leave_when_the_run_is_killed(tmp_path):
    script = tmp_path / "orphan.py"
    script.write_text(ORPHAN)
    done = subprocess.run(
        [sys.executable, str(script), str(CHECKOUT)],
        env=launch_environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    pids = [int(pid) for pid in done.stdout.split()]
    assert pids
    deadline = time.monotonic() + 20
    while any(psutil.pid_exists(pid) for pid in pids):
        assert time.monotonic() < deadline, "a worker outlived its run"
        time.sleep(0.1)


SIGNALLED = """
import os, signal, subprocess, sys
sys.path.insert(0, sys.argv[1])
from tests.engine.transfer.classification.test_augmentation import make_batch, rand_augment
import torch
if __name__ == "__main__":
    numbers = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
    for number in numbers:
        signal.signal(number, lambda *arguments: None)
    transform = rand_augment(workers=2)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set(), "the run itself can no longer be told to stop"
    for _ in range(3):  # at once, while its workers import, and when they work
        for number in numbers:
            subprocess.run(["kill", f"-{number.value}", "--", f"-{os.getpgid(0)}"], start_new_session=True, check=True)
        assert torch.equal(transform(make_batch(13)).images, rand_augment()(make_batch(13)).images)
    transform.close()
"""


@pytest.mark.slow
def test_workers_outlive_signals_to_the_whole_group(tmp_path):
    """With threads that a library starts as it is imported, before any line of ours runs in a worker."""
    script = tmp_path / "signalled.py"
    script.write_text(SIGNALLED)
    done = subprocess.run(
        [sys.executable, str(script), str(CHECKOUT)], start_new_session=True,
        env=launch_environment() | {"OPENBLAS_NUM_THREADS": "2"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_the_loader_gives_the_same_augmented_images_after_a_resume_and_on_two_ranks(tmp_path):
    data = write_classes(tmp_path / "train", {"a": 6, "b": 6})

    def images(steps: int, *, rank=0, world_size=1, state=None) -> dict:
        found = {}
        with build_train_loader(
            data, image_size=SIZE, micro_batch=4 // world_size, rank=rank, world_size=world_size, seed=5, threads=1,
            labels=True, batch_transform=rand_augment(),
        ) as loader:  # fmt: skip
            if state is not None:
                loader.load_state_dict(state)
            for _ in range(steps):
                batch = loader.next_micro_batch()
                keys = [(batch.epoch, int(position)) for position in batch.positions]
                found |= dict(zip(keys, [image.numpy().tobytes() for image in batch.images], strict=True))
            return found | {"state": loader.state_dict()}

    two = images(2)
    four = images(4)
    later = images(2, state=two["state"])
    assert two | later == four | {"state": later["state"]}
    halves = images(2, rank=0, world_size=2) | images(2, rank=1, world_size=2)
    assert halves == two


def test_batches_are_a_function_of_their_place_and_global_generators_stay():
    augmentation = batch_augmentation()
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    first = augmentation(make_batch())
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[:2]
    assert torch.equal(torch.get_rng_state(), states[2])
    random.random(), np.random.rand(), torch.rand(3)
    second = batch_augmentation()(make_batch())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], augmentation(make_batch(epoch=2))[0])
    assert not torch.equal(first[0], batch_augmentation(seed=6)(make_batch())[0])


@pytest.mark.gpu
def test_on_a_gpu():
    device = torch.device("cuda", torch.cuda.current_device())
    batch = make_batch()
    on_gpu = dataclasses.replace(batch, images=batch.images.to(device), labels=batch.labels.to(device))
    assert torch.equal(rand_augment()(on_gpu).images, rand_augment()(batch).images)
    state = torch.cuda.get_rng_state(device)
    first, second = (batch_augmentation(device=device)(on_gpu) for _ in range(2))
    assert all(a.is_cuda and torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(torch.cuda.get_rng_state(device), state)
    # what is not noise is drawn on the host: the same as on a CPU, to the rounding of a multiply-add
    options = {"random_erase": 0.0}
    expected = batch_augmentation(**options)(batch)
    found = batch_augmentation(device=device, **options)(on_gpu)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, atol=1e-5, rtol=1e-5)


def test_global_generators_stay_after_an_error():
    before = random.getstate()
    with pytest.raises(KeyError), seeded(3, CPU):
        raise KeyError
    assert random.getstate() == before


def test_all_off_normalises_and_nothing_else():
    batch = make_batch()
    images, targets = batch_augmentation(**OFF)(batch)
    expected = (batch.images.permute(0, 3, 1, 2) / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[
        :, None, None
    ]
    torch.testing.assert_close(images, expected, atol=1e-6, rtol=1e-6)  # a division and a product round apart
    assert torch.equal(targets, F.one_hot(batch.labels, CLASSES).float())
    floats = dataclasses.replace(batch, images=images)
    assert torch.equal(batch_augmentation(**OFF)(floats)[0], images)


def test_smoothing_alone_is_that_of_cross_entropy():
    batch = make_batch()
    logits = torch.randn(6, CLASSES, generator=torch.Generator().manual_seed(0))
    _, targets = batch_augmentation(**OFF | {"label_smoothing": 0.1})(batch)
    expected = F.cross_entropy(logits, batch.labels, label_smoothing=0.1)
    torch.testing.assert_close(soft_cross_entropy(logits, targets), expected)
    assert soft_cross_entropy(logits.bfloat16(), targets).dtype == torch.float32


def test_erasing_paints_noise_over_a_quarter_of_the_images():
    augmentation = batch_augmentation(**OFF | {"random_erase": 0.25})
    plain = batch_augmentation(**OFF)
    shares = []
    for first in range(0, 60, 6):
        for epoch in range(10):
            batch = make_batch(first=first, epoch=epoch)
            changed = (augmentation(batch)[0] != plain(batch)[0]).any(dim=1)
            shares += changed.flatten(1).float().mean(dim=1).tolist()
    erased = [share for share in shares if share]
    assert len(erased) / len(shares) == pytest.approx(0.25, abs=0.06)  # 600 draws: three deviations are 0.053
    # 2 % to a third of the area, and the rounding of the sides of a box in 16 x 24 pixels
    assert min(erased) > 0.01 and max(erased) < 0.36
    batch = make_batch()
    floats = plain(batch)[0]
    kept = floats.clone()
    batch_augmentation(**OFF | {"random_erase": 1.0})(dataclasses.replace(batch, images=floats))
    assert torch.equal(floats, kept)  # what the loader gave is not written to


@pytest.mark.parametrize(("part", "count"), [("mixup", 0), ("cutmix", 2), (None, 1)])
def test_mixing(part, count):
    """Targets are the mixed one-hot rows; cutmix pastes, mixup blends; with both each batch takes one of the two."""
    options = OFF | ({part: 1.0} if part else {"mixup": 0.8, "cutmix": 1.0})
    plain = batch_augmentation(**OFF)
    kinds = Counter()
    for epoch in range(40):
        batch = make_batch(epoch=epoch)
        (images, targets), (clean, onehot) = batch_augmentation(**options)(batch), plain(batch)
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(6))
        ratio = targets[0, batch.labels[0]]
        torch.testing.assert_close(targets, ratio * onehot + (1 - ratio) * onehot.flip(0))
        pasted = (images == clean).all(dim=1) | (images == clean.flip(0)).all(dim=1)
        if pasted.all():
            kinds["cutmix"] += 1
            share = (images == clean)[0].all(dim=0).float().mean()
            torch.testing.assert_close(share, ratio)  # the ratio is that of the area, after the box was clipped
        else:
            kinds["mixup"] += 1
            torch.testing.assert_close(images, ratio * clean + (1 - ratio) * clean.flip(0))
    if part:
        assert kinds[part] >= 39  # a ratio that rounds to 0 or 1 looks like the other
    else:
        assert min(kinds.values()) >= 10


def test_wrong_settings_are_named():
    with pytest.raises(UserError, match="micro_batch is 5 .* --mixup 0 --cutmix 0"):
        batch_augmentation(micro_batch=5)
    batch_augmentation(micro_batch=5, mixup=0.0, cutmix=0.0)
    for name, value in (("random_erase", 1.5), ("mixup", -1.0), ("cutmix", -0.1), ("label_smoothing", 2.0)):
        with pytest.raises(UserError, match=f"{name} is {value}"):
            batch_augmentation(**{name: value})
