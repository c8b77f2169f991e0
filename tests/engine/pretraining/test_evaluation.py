"""Evaluation while pre-training: the figures are those of the checkpoint, and the run is the one without it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import mirl
from mirl.dataloaders import build_eval_loader
from mirl.engine.analysis.features import features as analysed
from mirl.engine.analysis.features import load_frozen_encoder
from mirl.engine.configuration.config import PretrainConfig
from mirl.engine.distributed.launch import Ranks
from mirl.engine.pretraining import evaluation_data
from mirl.engine.pretraining.evaluating import (
    MASK_SEED,
    MOST_PERCENT,
    Evaluation,
    EvaluationSets,
    complete_best,
    default_interval,
    pooled_features,
)
from mirl.engine.training.noise import mask_noise
from mirl.engine.training.run_folder import Progress
from mirl.errors import UserError
from tests.engine.conftest import write_classes
from tests.support.runs import equal_tensors, losses, records

SMALL = {
    "warmup_steps": 1, "batch_size": 4, "precision": "fp32", "image_size": 32, "depth": 4, "width": 32, "heads": 2,
    "decoder_width": 32, "decoder_heads": 2, "pictures": 0, "tensorboard": False, "loader_threads": 1,
    "watchdog_minutes": 0.0, "log_every": 1, "checkpoint_every": 2, "drop_path": 0.2, "cpu_threads": 1,
}  # fmt: skip
ONE = Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("evaluated")
    write_classes(root / "held", {"x": 9, "y": 4})
    (root / "held" / "x" / "03.png").write_bytes(b"broken")
    write_classes(root / "labelled", {"blue": 11, "red": 10})
    return {"val": str(root / "held"), "probe": str(root / "labelled")}


def recipe(photographs: Path, out: Path, **changes) -> PretrainConfig:
    return mirl.recipe("tiny", data=str(photographs), out=str(out), **(SMALL | {"steps": 4} | changes))


@pytest.fixture(scope="module")
def evaluated(photographs, folders, tmp_path_factory) -> Path:
    """A run of four steps that was evaluated after the second and the fourth."""
    return mirl.pretrain(recipe(photographs, tmp_path_factory.mktemp("run") / "with", eval_every=2, **folders))


def evaluations(out: Path) -> list[dict]:
    return [record for record in records(out) if "val_loss" in record]


def test_training_is_the_same_to_the_bit_without_it(evaluated, photographs, tmp_path):
    plain = mirl.pretrain(recipe(photographs, tmp_path / "without"))
    assert losses(plain) == losses(evaluated) and len(losses(plain)) == 4
    assert equal_tensors(*(out / "checkpoints" / "step-00000004" for out in (plain, evaluated)))
    assert not evaluations(plain)


def test_the_held_out_loss_is_that_of_the_checkpoint_and_counts_each_image_once(evaluated, folders):
    model = mirl.load_pretrained(evaluated).eval()
    found = []
    with build_eval_loader(
        folders["val"], image_size=(32, 32), batch_size=13, mean=model.config.mean, std=model.config.std, labels=False,
        threads=1,
    ) as loader:  # fmt: skip
        (batch,) = loader
        for number in np.flatnonzero(batch.valid):
            noise = mask_noise(MASK_SEED, 0, int(number), 1, model.config.num_patches)
            with torch.no_grad():
                found.append(model(batch.images[number : number + 1], noise=noise).loss.item())
    told = evaluations(evaluated)
    assert [record["step"] for record in told] == [2, 4]
    assert told[1]["val_images"] == len(found) == 12
    # float32 sums in another order
    assert told[1]["val_loss"] == pytest.approx(np.mean(found), rel=1e-5)
    assert told[0]["val_loss"] != pytest.approx(told[1]["val_loss"], rel=1e-5)
    log = (evaluated / "log.txt").read_text()
    assert "evaluated every 2 steps and at the end: loss of 13 images from 13 files" in log
    assert f"held-out loss {told[1]['val_loss']:.4f} of 12 images" in log and "linear probe top-1" in log
    assert "the evaluations take" in log  # so short a run has no time for them


def test_the_probe_sees_the_features_that_mirl_probe_sees(evaluated):
    model, frozen = mirl.load_pretrained(evaluated).eval(), load_frozen_encoder(evaluated)
    images = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(pooled_features(model, images), analysed(frozen, images, pool="avg"))


def test_a_resumed_run_knows_the_best_so_far(evaluated, folders, photographs, tmp_path):
    first, second = evaluations(evaluated)
    best = min((first, second), key=lambda record: record["val_loss"])
    # The evaluation after a step follows its checkpoint, which has the one before.
    state = json.loads((evaluated / "checkpoints" / "step-00000004" / "state.json").read_text())
    assert state["best"]["val_loss"] == [first["val_loss"], 2]
    assert state["best"]["probe_top1_percent"] == [first["probe_top1_percent"], 2]
    out = shutil.copytree(evaluated, tmp_path / "again")
    config = recipe(photographs, out, eval_every=9, steps=5, resume="auto", change=("steps",), **folders)
    mirl.pretrain(config)
    said = (out / "log.txt").read_text()
    assert f"best so far: val_loss {best['val_loss']:.4f} at step {best['step']}" in said
    assert evaluations(out)[-1]["step"] == 5
    assert evaluations(out)[-1]["best_val_loss"] == min(record["val_loss"] for record in evaluations(out))


def test_the_best_is_completed_from_the_records_up_to_the_checkpoint(tmp_path):
    lines = [{"step": 2, "val_loss": 0.5}, {"step": 4, "val_loss": 0.3, "probe_top1_percent": 40.0}]
    lines += [{"step": 6, "val_loss": None}, {"step": 8, "val_loss": 0.1, "probe_top1_percent": 90.0}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n"x"\n{"step": 3, "val')
    best = {"val_loss": [0.4, 3]}
    complete_best(best, tmp_path, 7)
    assert best == {"val_loss": [0.3, 4], "probe_top1_percent": [40.0, 4]}
    complete_best(best, tmp_path / "nowhere", 7)


def test_a_checkpoint_of_before_has_no_best():
    progress = Progress(step=4, applied_steps=4, images=16, best={"val_loss": [0.5, 2]})
    state = json.loads(json.dumps(progress.to_dict()))
    assert Progress.from_state(state | {"config": {}}) == progress
    del state["best"]
    assert Progress.from_state(state).best == {}


# --- what it costs


class Log:
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.values: list[dict] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def metrics(self, values: dict, line: str) -> None:
        self.values.append(values)


def evaluation(config: PretrainConfig, folder: str, clock, log: Log, batch_size: int = 5) -> Evaluation:
    model = config.model
    val = build_eval_loader(
        folder, image_size=(32, 32), batch_size=batch_size, mean=model.mean, std=model.std, labels=False, threads=1
    )
    sets = EvaluationSets(val=val, probe=None)
    return Evaluation(config, sets, ranks=ONE, log=log, total_steps=100, best={}, clock=clock)  # type: ignore[arg-type]


def run(one: Evaluation, model, step: int, *, last: bool = False, interrupted=lambda: False) -> None:
    one.run(model, step, last=last, features=lambda images: {}, interrupted=interrupted)


def test_the_share_of_the_time_is_measured_and_told_once_when_it_is_too_much(folders, photographs, tmp_path, evaluated):
    # Built at 0; each evaluation takes one second: 1 % of 100 s, then 2 of 80 s, 3 of 90 s, 4 of 95 s.
    times = iter([0.0, 99.0, 100.0, 79.0, 80.0, 89.0, 90.0, 94.0, 95.0])
    log, model = Log(), mirl.load_pretrained(evaluated)
    one = evaluation(recipe(photographs, tmp_path, eval_every=1), folders["val"], lambda: next(times), log)
    for step in (1, 2):
        run(one, model, step)
    assert [values["evaluation_percent"] for values in log.values] == [1.0, 2.5] and log.lines == []
    for step in (3, 4):
        run(one, model, step, last=step == 4)
    (told,) = log.lines
    assert told == "the evaluations take 3.3% of the time, above 2%: give fewer images, or --eval-every above 1"
    one.sets.val.close()


def test_one_that_is_cut_short_leaves_the_model_and_the_best_as_they_were(folders, photographs, tmp_path, evaluated):
    log, model = Log(), mirl.load_pretrained(evaluated).train()
    answers = iter([False, True])
    one = evaluation(recipe(photographs, tmp_path), folders["val"], lambda: 0.0, log)
    run(one, model, 7, interrupted=lambda: next(answers))
    assert log.lines == ["step 7  the evaluation was cut short"] and not log.values and not one.best
    assert model.training and list(answers) == []
    one.sets.val.close()


def test_by_default_there_are_ten_or_as_few_as_cost_little(photographs, folders, tmp_path):
    config = recipe(photographs, tmp_path)
    with build_eval_loader(folders["val"], image_size=(32, 32), batch_size=4, labels=False, threads=1) as loader:
        sets = EvaluationSets(val=loader, probe=None)
        for batch_size in (4, 16, 4096):
            sized = dataclasses.replace(config, optim=dataclasses.replace(config.optim, batch_size=batch_size))
            every = default_interval(sized, sets, 1000)
            # A pass without gradients is a third of one with them.
            assert 100 <= every <= 1000
            assert loader.num_images / 3 <= every * batch_size * MOST_PERCENT / 100
        assert default_interval(sized, sets, 1000) == 100 and default_interval(config, sets, 20) == 20


# --- data


def test_a_part_of_each_class_is_set_aside_the_same_each_time():
    labels = np.array([0] * 20 + [1] * 3 + [2] * 1 + [3] * 10)
    fit, measure = evaluation_data._set_aside(labels)
    assert sorted([*fit, *measure]) == list(range(34))
    assert np.bincount(labels[measure], minlength=4).tolist() == [4, 1, 0, 2]
    again = evaluation_data._set_aside(labels)
    assert (again[0] == fit).all() and (again[1] == measure).all()


def test_many_images_are_thinned_out_evenly(monkeypatch):
    monkeypatch.setattr(evaluation_data, "MOST_PROBED", 10)
    labels = np.array([0, 1] * 20)
    chosen = evaluation_data._spread(np.arange(40), labels)
    assert np.bincount(labels[chosen]).tolist() == [5, 5] and len(set(chosen)) == 10
    assert (evaluation_data._spread(np.arange(8), labels) == np.arange(8)).all()


def _empty(root: Path) -> dict:
    root.mkdir()
    return {"val": str(root)}


def _flat(root: Path) -> dict:
    write_classes(root, {"only": 3})
    return {"probe": str(root / "only")}


def _one_class(root: Path) -> dict:
    write_classes(root, {"only": 3})
    return {"probe": str(root)}


def _single_images(root: Path) -> dict:
    write_classes(root, {"a": 1, "b": 1})
    return {"probe": str(root)}


def _other_channels(root: Path) -> dict:
    root.mkdir()
    for number in range(3):
        np.save(root / f"{number}.npy", np.zeros((40, 40, 5), np.uint8))
    return {"val": str(root)}


def _zero3(root: Path) -> dict:
    write_classes(root, {"a": 2, "b": 2})
    return {"probe": str(root), "deepspeed_config": "zero3"}


def _other_classes(root: Path) -> dict:
    write_classes(root / "train", {"a": 2, "b": 2})
    write_classes(root / "val", {"a": 2, "c": 2})
    return {"probe": str(root)}


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (_empty, "bad"),
        (_flat, "bad/only"),
        (_one_class, "^probe is .*bad, which has one class: give images of two or more$"),
        (_single_images, "^probe is .*bad, where no class has two images: give more of them$"),
        (_other_channels, "^val is .*bad, where 3 of 3 images tried cannot be read: .*channels"),
        (_zero3, "^probe is .* and zero3 is ZeRO stage 3, where no rank has the whole encoder: use --deepspeed_config"),
        (_other_classes, r"the classes of probe \(train\) and probe \(val\) differ"),
    ],
)
def test_what_cannot_be_evaluated_on_is_refused_before_training(make, told, photographs, tmp_path):
    changes = make(tmp_path / "bad")
    with pytest.raises(UserError, match=told) as refused:
        mirl.pretrain(recipe(photographs, tmp_path / "out", **changes))
    assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()


# --- ranks


def test_two_ranks_find_what_one_finds(server, evaluated, folders, photographs, tmp_path):
    """From one checkpoint, by one step without a rate worth the name: 13 images do not divide by two ranks."""
    flags = ["--data", photographs, "--steps", 1, "--warmup-steps", 0, "--lr", 1e-12, "--pictures", 0]
    flags += ["--val", folders["val"], "--probe", folders["probe"], "--init-from", evaluated]
    found = {}
    for ranks, stage in ((1, "zero2"), (2, "zero1")):
        out = f"{stage}-{ranks}"
        given = server.start(tmp_path, *flags, "--deepspeed_config", stage, "--out", out, ranks=ranks)
        assert given.end() == [0] * ranks, given.output()[-3000:]
        (found[out],) = evaluations(tmp_path / out)
    one, two = found["zero2-1"], found["zero1-2"]
    assert one["val_images"] == two["val_images"] == 12
    # float32 sums in another order
    assert two["val_loss"] == pytest.approx(one["val_loss"], rel=1e-5)
    assert two["probe_top1_percent"] == one["probe_top1_percent"]
