"""The experiment on Fig. 2: its views, its pairs, its parts that resume, and the statistics that it is read by."""

from __future__ import annotations

import dataclasses
import json
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from benchmarks.science import power, predicted, run_fresh_blocks
from benchmarks.science.fresh_blocks import METHODS, NONE, SCALES, run_unit
from benchmarks.science.paired import (
    detectable,
    deviation_limit,
    estimate,
    seeds_needed,
    variance_parts,
)
from benchmarks.science.paired import power as power_of
from benchmarks.science.views import CELLS, CLASSES, HELD_OUT, TRAINING, photographs, square, views
from benchmarks.science.worth import STATISTICS, gain, repeats_by_seed, table
from mirl.engine.models import MIRL


def test_views_are_fixed_balanced_and_held_out_ones_have_centres_of_their_own(monkeypatch):
    images, labels = views(2 * CLASSES, 16, held_out=False)
    assert images.shape == (2 * CLASSES, 16, 16, 3) and images.dtype == torch.uint8
    assert labels.bincount().tolist() == [2] * CLASSES
    views.cache_clear()
    found, made = [], square

    def watched(label, across, rng):
        found.append((label, across, made(label, across, rng)))
        return found[-1][2]

    monkeypatch.setattr("benchmarks.science.views.square", watched)
    assert torch.equal(views(2 * CLASSES, 16, held_out=False)[0], images)
    views(2 * CLASSES, 16, held_out=True)
    assert [across for _, across, _ in found] == [TRAINING] * 2 * CLASSES + [HELD_OUT] * 2 * CLASSES
    for label, (low, high), (left, top, length) in found:
        height, width = photographs()[label // CELLS**2].shape[:2]
        assert top + length <= height and left + length <= width
        across = left / (width - length) * CELLS - label % CELLS
        assert low - 0.05 < across < high  # to whole pixels


def test_every_method_begins_with_the_same_encoder():
    # Where nothing is learnt in pre-training, each is what is not pre-trained at all.
    still = dataclasses.replace(SCALES["tiny"], pretrain_lr=0.0, repeats=1)
    mae, mirl, plain = (run_unit(still, method, 3, "cpu") for method in (*METHODS, NONE))
    kept = [[curve for curve in one["finetune"] if not curve["fresh_blocks"]] for one in (mae, mirl, plain)]
    assert kept[0] == kept[1] == kept[2] and len(kept[2]) == 1
    assert mae["probe_top1_percent"] == mirl["probe_top1_percent"] == plain["probe_top1_percent"]
    # Heads begin at zero, so that the loss is a function of images and masks.
    assert mae["last_loss"] == mirl["last_loss"] and "last_loss" not in plain


def test_the_methods_are_those_of_the_figure():
    mae, mirl = (MIRL(SCALES["tiny"].model(method)) for method in METHODS)
    assert [len(decoder.blocks) for decoder in mae.decoders.values()] == [4]
    assert [len(decoder.blocks) for decoder in mirl.decoders.values()] == [2, 2]
    assert all(scale.pretrain_steps("mae") == scale.pretrain_steps("mirl") for scale in SCALES.values())


def test_a_unit_repeats_to_the_bit():
    record, again = (run_unit(SCALES["tiny"], "mirl", 3, "cpu") for _ in range(2))
    assert record["seconds"].keys() == {"pretrain", "look_inside", "finetune"}
    assert {name: value for name, value in record.items() if name != "seconds"} == {
        name: value for name, value in again.items() if name != "seconds"
    }
    kinds = [(curve["repeat"], curve["fresh_blocks"]) for curve in record["finetune"]]
    assert kinds == [(0, 0), (0, 4), (1, 0), (1, 4)]
    losses = [tuple(curve["cross_entropy"]) for curve in record["finetune"]]
    assert len(set(losses)) == 4 and all(len(curve) == 2 for curve in losses)
    assert len(record["gradient_norm"]) == len(record["probe_top1_percent"]) == 12


def record_of(method, seed, worth=0.0, seconds=50.0, repeats=2):
    """Of which the last blocks are worth ``worth`` points, and a tenth more in every second repeat."""
    curves = [
        {"repeat": repeat, "fresh_blocks": fresh, "cross_entropy": [2.0, 1.0],
         "top1_percent": [10.0, 50.0 + seed + (0 if fresh else worth + 0.1 * repeat)]}
        for repeat in range(repeats) for fresh in (0, 4)
    ]  # fmt: skip
    return {
        "method": method, "seed": seed, "last_loss": 0.5, "gradient_norm": [1.0] * 8 + [0.1] * 4,
        "probe_top1_percent": [40.0] * 11 + [40.0 + worth], "finetune": curves,
        "seconds": {"pretrain": seconds, "look_inside": 10.0, "finetune": 40.0},
    }  # fmt: skip


def test_parts_resume_and_other_settings_are_refused(tmp_path, monkeypatch, capsys):
    path, made = tmp_path / "records.json", []

    def runner(scale, method, seed, device):
        made.append((method, seed))
        if (method, seed) == ("mirl", 1) and len(made) == 5:
            raise KeyboardInterrupt
        return record_of(method, seed)

    def part(minutes):
        with ThreadPoolExecutor(1) as pool:
            return run_fresh_blocks.run(
                path, "tiny", run_fresh_blocks.units(0, 2), pool, device="cpu", workers=1, minutes=minutes,
                runner=runner,
            )  # fmt: skip

    with pytest.raises(KeyboardInterrupt):
        part(60)
    assert made == [("mae", 0), ("mirl", 0), ("none", 0), ("mae", 1), ("mirl", 1)]  # seed by seed
    assert part(0) == 2 and len(made) == 5
    assert part(60) == 0 and made[5:] == [("mirl", 1), ("none", 1)]
    content = json.loads(path.read_text())
    assert [(r["method"], r["seed"]) for r in content["records"]] == run_fresh_blocks.units(0, 2)
    assert "mae seed 0" in capsys.readouterr().out and list(tmp_path.iterdir()) == [path]
    for flags, said in ((["--seeds", "0"], "--seeds is 0: give 1 or more"), (["--device", "cuda"], "finds no GPU")):
        if said == "finds no GPU" and torch.cuda.is_available():
            continue
        monkeypatch.setattr(sys, "argv", ["run_fresh_blocks", "--records", str(path), *flags])
        with pytest.raises(SystemExit) as stopped:
            run_fresh_blocks.main()
        assert stopped.value.code == 2 and said in capsys.readouterr().err
    content["settings"]["steps"] += 1
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="made with other settings"):
        part(60)


def test_statistics_of_pairs():
    found = estimate([1.0, 2.0, 3.0, 4.0])
    # Deviation 1.291, 3.182 standard errors of 0.645.
    assert (found.mean, found.n) == (2.5, 4) and found.half_width == pytest.approx(2.054, abs=1e-3)
    assert found.verdict == "higher" and estimate([-1.0, 1.0, 3.0]).verdict == "undecided"
    assert estimate([-2.0, -2.1]).verdict == "lower" and estimate([5.0]).verdict == "undecided"
    # The lower 20 % point of chi-square with 3 degrees of freedom is 1.005.
    assert deviation_limit(found) == pytest.approx(1.291 * (3 / 1.005) ** 0.5, rel=1e-3)
    # Cohen's tables, paired: 34 pairs for half a deviation, 15 for 0.8, 199 for 0.2.
    assert [seeds_needed(effect, 1.0) for effect in (0.5, -0.8, 0.2)] == [34, 15, 199]
    assert seeds_needed(1e-4, 1.0) is None and seeds_needed(1.0, float("inf")) is None
    assert power_of(0.0, 1.0, 20) == pytest.approx(0.05) and power_of(1.0, 1.0, 1) == 0.0
    assert detectable(2.0, 34) == pytest.approx(1.0, rel=0.02) and detectable(1.0, 1) == float("inf")


def test_the_spread_divides_into_seeds_and_repeats():
    # Seeds differ by 2 and repeats by 0.2 around each: variance 2 between, 0.02 within.
    parts = variance_parts([[1.1, 0.9], [3.1, 2.9]])
    assert parts is not None and parts.within == pytest.approx(0.02) and parts.between == pytest.approx(1.99)
    assert parts.best_repeats(100.0, 1.0) == 1
    many = variance_parts([[0.0, 2.0], [0.2, 2.2], [0.4, 2.2]])
    assert many is not None and many.between == 0.0 and many.best_repeats(1.0, 1.0) == 100
    assert variance_parts([[1.0], [2.0]]) is None and variance_parts([[1.0, 2.0]]) is None


def test_reading_pairs_seeds():
    records = [record_of("mae", seed, worth=-1.0 + 0.2 * seed) for seed in range(3)]
    records += [record_of("mirl", seed, worth=2.0 + 0.1 * seed) for seed in (0, 1, 7)]
    end, curve, loss, probe, gradients = STATISTICS
    by_seed = repeats_by_seed(records, end, 4, "mirl - mae")
    assert list(by_seed) == [0, 1]
    assert by_seed[0] == pytest.approx([3.0, 3.0]) and by_seed[1] == pytest.approx([2.9, 2.9])
    assert repeats_by_seed(records, end, 4, "mae")[0] == pytest.approx([-1.0, -0.9])
    assert repeats_by_seed(records, curve, 4, "mae")[0] == pytest.approx([-0.5, -0.45])
    assert repeats_by_seed(records, probe, 4, "mirl")[7] == pytest.approx([2.7])
    assert repeats_by_seed(records, gradients, 4, "mirl")[0] == pytest.approx([-1.0])
    assert repeats_by_seed(records, loss, 4, "mae")[0] == [0.0, 0.0]
    records[0]["finetune"][0]["cross_entropy"] = [1.0, 1.0]  # as pre-trained, half a nat less over the curve
    assert repeats_by_seed(records, loss, 4, "mae")[0] == [0.5, 0.0]
    # MIRL with seed 1: 10 and 51 + 2.1, in the second repeat a tenth more; no pre-training 12. Only one seed has both.
    plain = record_of("none", 1)
    plain["finetune"] = [one | {"top1_percent": [4.0, 20.0]} for one in plain["finetune"] if not one["fresh_blocks"]]
    gained = gain([*records, plain], "mirl")
    assert gained is not None and gained.n == 1 and gained.mean == pytest.approx(19.575)
    text = table([*records, plain], 4)
    assert "| fine-tuned, at the end, points | mirl - mae | +2.950 (" in text and "| 2 | higher |" in text
    assert "| mirl | +19.575 (one seed) |  | 1 | undecided |" in text


def test_the_report_counts_what_a_seed_costs(tmp_path, monkeypatch, capsys):
    records = [record_of("mae", seed, worth=seed) for seed in range(3)]
    records += [record_of("mirl", seed, worth=1.0 + 1.5 * seed, seconds=150.0) for seed in range(3)]
    content = {
        "device": "a CPU", "versions": {"torch": "2"}, "commit": "none", "scale": "cpu", "settings": {"fresh": 4},
        "records": records,
    }  # fmt: skip
    # 50 + 150 of pre-training, twice 10 and twice 40.
    text = power.report(content, "cpu", 6000.0)
    assert "finetune 80 + look_inside 20 + pretrain 200 = 300 core-seconds" in text
    assert "6000 core-seconds pay for 6000 / 300 = 20 seeds" in text
    # Differences 1, 1.5, 2: deviation 0.5, at most 0.5 (2 / 0.446)^0.5. By the tables of paired t-tests 20 pairs find
    # 0.66 deviations, and 1.8 of them take 5 pairs, 0.85 of them 13.
    assert (
        "| fine-tuned, at the end, points | 0.500 (1.058) | 0.330 (0.699) | 5 (13); 20 have a power of 100 % (" in text
    )
    # Nights: 9,000 steps instead of 800; 400 steps of 64 and 4 looks at 2,048 instead of 80 and 1,024.
    cost = power.seed_seconds_of(SCALES["nights"], power.seed_seconds(records), SCALES["cpu"])
    assert cost["pretrain"] == pytest.approx(200 * 9000 / 800)
    assert cost["finetune"] == pytest.approx(80 * (400 * 64 + 8192 / 3) / (80 * 64 + 4096 / 3))
    path = tmp_path / "records.json"
    path.write_text(json.dumps(content))
    monkeypatch.setattr(sys, "argv", ["power", str(path), "--out", str(tmp_path / "worth")])
    power.main()
    assert (tmp_path / "worth.png").stat().st_size > 5000 and (
        tmp_path / "worth.md"
    ).read_text() in capsys.readouterr().out + "\n"
    for wrong, said in ((["--scale", "gpu"], "--scale has another width"), (["--predict", "gpu"], "one of them")):
        monkeypatch.setattr(sys, "argv", ["power", str(path), *wrong])
        with pytest.raises(SystemExit) as stopped:
            power.main()
        assert stopped.value.code == 2 and said in capsys.readouterr().err
    with pytest.raises(ValueError, match="no seed of both methods"):
        power.report(content | {"records": records[:3]}, "cpu", 1.0)


def test_the_prediction_counts_every_step_and_says_what_it_is(monkeypatch):
    monkeypatch.setattr(predicted, "step", lambda build, batch, gpu: predicted.Step(1.0, 2.0, 100))
    # 2 steps, 4 fine-tunings of 2, and at 2 looks of each 72 views forward: 8 x 9 steps' images / 3.
    device_s, host_s, text = predicted.seconds_of_unit(SCALES["tiny"], "mae", "H100")
    assert (device_s, host_s) == (34.0, 68.0) and text.startswith("mae: 2 steps x (device 1000.0 ms, host 2000.0 ms")
    lines = predicted.total("tiny", "H100", 4, 2, [(60.0, 10.0, "a"), (120.0, 20.0, "b")])
    # 4 x 180 s of one device; of each of two workers four units of 15 s.
    assert "nothing here was measured" in lines and "device 12.0 minutes" in lines and "workers 1.0 minutes" in lines
    assert lines.endswith("14.0 minutes")
