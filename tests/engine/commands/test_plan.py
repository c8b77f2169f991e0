"""`mirl plan`: what it predicts, in which words, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from mirl.engine.accounting import forecast
from mirl.engine.accounting.forecast import StepForecast
from mirl.engine.accounting.machines import MACHINES, fit
from mirl.engine.accounting.predict import Times
from mirl.engine.accounting.run_memory import pretraining_footprint
from mirl.engine.commands.plan import IMAGENET_IMAGES, main
from mirl.engine.pretraining.command_line import parse_pretrain
from mirl.errors import UserError
from tests.support.launch import CHECKOUT, launch_environment

SMALL = ["--recipe", "vit_s_300", "--depth", "4", "--segments", "4"]


def planned(capsys, *flags: str) -> dict:
    assert main([*SMALL, *flags, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_has_what_a_program_needs(capsys):
    found = planned(capsys, "--batch-size", "256", "--gpu", "h100")
    assert found["prediction"] is True and found["gpu"] == "H100" and found["recipe"] == "vit_s_300"
    assert found["step_ms"] == pytest.approx(max(found["device_ms"], found["host_ms"]))
    assert found["images_per_s"] == pytest.approx(256 / found["step_ms"] * 1e3)
    assert found["days"] == pytest.approx(300 * IMAGENET_IMAGES / found["images_per_s"] / 86400)
    assert sum(found["shares"].values()) == pytest.approx(100) and found["shares"]["gemm"] > 10
    assert 0 < found["mfu_percent"] < found["plain_mfu_percent"] < 100
    assert found["launches"] > 500 and found["bytes_gb"] > 5
    assert found["fits"] and found["memory_of_gpu_gib"] == 80


def test_the_length_is_that_of_all_image_sizes_and_the_rest_of_the_whole_one(capsys, monkeypatch):
    """With steps of made-up lengths: a real one is predicted in the other tests."""

    def as_long_as_its_images(build, device, *, gpus, micro_batch, accumulation, **_):
        step_s = build().config.image_height / 224
        times = Times(device_s=step_s, host_s=0.0, launches=1, bytes=1.0, optimiser_bytes=1.0, shares={"gemm": 1.0})
        return StepForecast(times=times, gpus=gpus, images=micro_batch * accumulation, shown_link_s=0.0)

    monkeypatch.setattr(forecast, "forecast_step", as_long_as_its_images)
    flags = ("--depth", "2", "--segments", "2", "--batch-size", "8", "--gpu", "H100")
    one = planned(capsys, *flags)
    found = planned(capsys, *flags, "--image-sizes", "112", "224@0.75")
    assert found["days"] == pytest.approx((0.75 * 0.5 + 0.25) * one["days"], rel=1e-5)
    (remark,) = found.pop("remarks")
    assert remark.startswith("image sizes 112 224@0.75: the length is of all of them, 62 % of that of one size; ")
    assert {key: value for key, value in found.items() if key != "days"} == {
        key: value for key, value in one.items() if key not in ("days", "remarks")
    }


def test_our_attention_kernels_can_be_priced(capsys):
    flags = ("--batch-size", "256", "--gpu", "H100")
    found, flash = planned(capsys, *flags, "--attention-kernels", "own"), planned(capsys, *flags)
    assert found["remarks"] == ["attention by our own kernels, where they can: no GPU has run them yet"]
    assert flash["remarks"] == []
    # Fewer bytes by the gradients that are not brought together, and no float32 gradient of q.
    assert found["bytes_gb"] < 0.97 * flash["bytes_gb"] and found["launches"] < flash["launches"]
    assert found["optimiser_gb"] == flash["optimiser_gb"]
    assert found["shares"]["attention"] * found["device_ms"] < 0.7 * flash["shares"]["attention"] * flash["device_ms"]


def test_it_takes_the_micro_batch_that_a_run_would_take(capsys):
    found = planned(capsys, "--batch-size", "65536", "--gpu", "H100")
    footprint = pretraining_footprint(parse_pretrain([*SMALL, "--batch-size", "65536"]), "bf16", on_gpu=True)
    micro, size = fit(MACHINES[2], footprint, 65536)
    assert MACHINES[2].name == "GPU of 80 GB" and micro < 65536
    assert (found["micro_batch"], found["accumulation"]) == (micro, 65536 // micro)
    assert found["memory_gib"] == pytest.approx(size / 2**30)
    assert main([*SMALL, "--batch-size", "65536", "--gpu", "H100", "--micro-batch", "auto"]) == 0
    assert f"= {micro} x {65536 // micro} accumulation x 1 GPUs, with which auto begins" in capsys.readouterr().out


def test_gpus_images_and_slower_devices_count(capsys):
    one = planned(capsys, "--batch-size", "2048", "--micro-batch", "256")
    eight = planned(capsys, "--batch-size", "2048", "--gpus", "8", "--images", "10M")
    assert (one["micro_batch"], one["accumulation"], eight["micro_batch"], eight["accumulation"]) == (256, 8, 256, 1)
    assert 6 < eight["images_per_s"] / one["images_per_s"] < 9
    ratio = eight["days"] / one["days"] * eight["images_per_s"] / one["images_per_s"]
    assert ratio == pytest.approx(10e6 / IMAGENET_IMAGES)
    assert planned(capsys, "--batch-size", "256", "--gpu", "4090")["device_ms"] > one["device_ms"] / 8


def test_it_says_that_nothing_was_measured_and_what_would_fit(capsys):
    assert main([*SMALL, "--gpu", "L4", "--batch-size", "16384", "--micro-batch", "16384"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "A prediction from counted operators: nothing below was measured."
    assert any(line.startswith("a step has") and line.endswith(" without the optimiser") for line in lines)
    assert any(line.startswith("GPU figures") and "NVIDIA L4 data sheet" in line for line in lines)
    (note,) = [line for line in lines if line.startswith("note")]
    micro = int(note.rsplit("--micro-batch ", 1)[1].split()[0])
    assert "micro-batch 16384 does not fit into 24 GiB" in note and 16384 % micro == 0
    assert planned(capsys, "--gpu", "L4", "--batch-size", "16384", "--micro-batch", str(micro))["fits"]
    assert not planned(capsys, "--gpu", "L4", "--batch-size", "16384", "--micro-batch", str(2 * micro))["fits"]


REFUSED = {
    "device": (["--gpu", "V100"], "gpu is V100: choose one of"),
    "gpus": (["--gpus", "0"], "gpus is 0: give 1 or more"),
    "ranks": (["--gpus", "3"], "batch_size is 4096 and there are 3 ranks: give a multiple of 3"),
    "images": (["--images", "many"], "'many' is no number of images: give e.g. 1281167 or 1.28M"),
    "no images": (["--images", "0"], "'0' is no number of images"),
    "precision": (["--precision", "fp32"], "precision is fp32: mirl plan predicts runs in bf16"),
    "a flag of runs": (["--batchsize", "3"], "unknown flag --batchsize: did you mean --batch-size?"),
    "recipe": (["--recipe", "vit_z"], "vit_z"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_planned_is_refused_by_name(name):
    flags, message = REFUSED[name]
    with pytest.raises(UserError) as refused:
        main([*SMALL, *flags])
    assert message in str(refused.value)


@pytest.mark.process
@pytest.mark.parametrize("flags", [["--help"], ["--gpu", "V100"], ["--batchsize", "3"]])
def test_help_and_wrong_flags_wait_for_no_torch(flags):
    code = (
        "import sys\nfrom mirl.errors import UserError\nfrom mirl.engine.commands.plan import main\n"
        "try:\n    main(sys.argv[1:])\nexcept (UserError, SystemExit):\n    pass\nprint('torch' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *flags], cwd=CHECKOUT, env=launch_environment(), capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == "False", done.stdout + done.stderr


def test_it_is_a_command_with_an_own_line():
    from mirl.engine.cli import COMMANDS, dispatch

    assert "predict" in COMMANDS["plan"][1]
    with pytest.raises(UserError, match="gpu is V100"):
        dispatch(["plan", "--gpu", "V100"])
